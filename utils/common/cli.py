"""What every command shares: messages that fit the terminal, and exit statuses that mean something.

0 done; 2 something the user can fix; 73 another process is at work on the same run, store or grid;
75 preempted by SIGTERM with the state saved (the same command resumes); 130 interrupted; 141 the
output pipe was closed before the end.
"""

from __future__ import annotations

import logging
import os
import select
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from logging.handlers import MemoryHandler
from pathlib import Path

from utils.common.errors import Busy, Preempted, UserError
from utils.common.files import write_error

WIDTH = 100
EXIT_USER, EXIT_BUSY, EXIT_PREEMPTED, EXIT_INTERRUPTED, EXIT_NO_READER = 2, 73, 75, 130, 141
_HANDLER = "metadata-conditioned-ast"


class _Wrapped(logging.Formatter):
    """Plain messages; warnings and errors say so, banners need not; long ones are wrapped."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.WARNING and not text.startswith("\n"):
            text = f"{record.levelname.lower()}: {text}"
        lines = text.splitlines()
        return "\n".join(
            textwrap.fill(
                line,
                WIDTH,
                subsequent_indent="    ",
                break_on_hyphens=False,
                break_long_words=False,
            )
            if len(line) > WIDTH
            else line
            for line in lines
        )


def set_up_logging(quiet: bool = False) -> None:
    """Messages of this repository go to stderr; of other libraries, warnings only.

    Args:
        quiet: only errors, for all but the main process of several.
    """
    root = logging.getLogger()
    for handler in [h for h in root.handlers if h.get_name() == _HANDLER]:
        root.removeHandler(handler)
    handler = logging.StreamHandler()
    handler.set_name(_HANDLER)
    handler.setFormatter(_Wrapped("%(message)s"))
    handler.setLevel(logging.ERROR if quiet else logging.INFO)
    handler.addFilter(_ours_or_warning)
    root.addHandler(handler)
    root.setLevel(logging.INFO)


def _ours_or_warning(record: logging.LogRecord) -> bool:
    ours = record.name.split(".")[0] in ("__main__", "benchmarks", "data", "models", "utils")
    return ours or record.levelno >= logging.WARNING


class _LogFile(logging.FileHandler):
    """A log file that a full disk costs lines, but never the run."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.told:
            self.told = True  # first, because the warning comes here as well
            error = sys.exc_info()[1]
            logging.getLogger(__name__).warning(
                "%s can not be written (%s); what is printed is not kept",
                self.baseFilename,
                getattr(error, "strerror", None) or error,
            )

    def close(self) -> None:
        with suppress(OSError):  # what the disk did not take was told
            super().close()


class log_to:
    """Context in which messages are appended to a file as well.

    Raises:
        UserError: the file can not be opened.
    """

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> log_to:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.handler = _LogFile(self.path, encoding="utf-8")
        except OSError as error:
            raise write_error(self.path, error) from error
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.handler.addFilter(_ours_or_warning)
        logging.getLogger().addHandler(self.handler)
        return self

    def __exit__(self, *_) -> None:
        logging.getLogger().removeHandler(self.handler)
        self.handler.close()


@contextmanager
def kept_messages() -> Iterator[MemoryHandler]:
    """Context in which messages are kept for a log file that is not open yet; see `hand_over`."""
    handler = MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)
    handler.addFilter(_ours_or_warning)
    logging.getLogger().addHandler(handler)
    try:
        yield handler
    finally:
        logging.getLogger().removeHandler(handler)


def hand_over(kept: MemoryHandler, log: log_to) -> None:
    """Write what was kept into a log file that is open now, and keep no more."""
    logging.getLogger().removeHandler(kept)
    kept.setTarget(log.handler)
    kept.close()


def _nobody_reads() -> bool:
    """Whether the output goes into a pipe whose reader has gone: `| head` has seen enough."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, AttributeError):  # no file behind it, or a system without poll
        return False


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Run `main` and turn its end into an exit status; a number that it returns is one already."""

    @wraps(main)
    def run(*arguments, **options) -> int:
        set_up_logging()
        status, ended = None, False
        try:
            status = main(*arguments, **options)
            ended = True
            sys.stdout.flush()
        except BrokenPipeError:
            if not _nobody_reads():  # some other pipe
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not ended:
                return EXIT_NO_READER
        except UserError as error:
            logging.getLogger(__name__).error("%s", error)
            return EXIT_BUSY if isinstance(error, Busy) else EXIT_USER
        except Preempted:
            logging.getLogger(__name__).warning(
                "stopped by SIGTERM; the state is saved: the same command goes on from here"
            )
            return EXIT_PREEMPTED
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        return status or 0

    return run
