"""What every command shares: messages, log files, and exit statuses that mean something.

0 done; 2 something the user can fix; 73 another process is at work on the same run, store or grid;
75 preempted by SIGTERM with the state saved (the same command resumes); 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, TextIO

from utils.common.errors import Busy, Preempted, UserError
from utils.common.files import write_error

logger = logging.getLogger(__name__)

EXIT_USER, EXIT_BUSY, EXIT_PREEMPTED, EXIT_INTERRUPTED = 2, 73, 75, 130
SMALLER = "lower dataset.batch_size (or --batch-size), or the sizes of model and spectrogram"
_HANDLER = "metadata-conditioned-ast"


class _Labelled(logging.Formatter):
    """Plain messages; warnings and errors say so, banners need not."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        banner = text.startswith("\n")
        label = (
            "" if record.levelno < logging.WARNING or banner else f"{record.levelname.lower()}: "
        )
        return label + text


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
    handler.setFormatter(_Labelled("%(message)s"))
    handler.setLevel(logging.ERROR if quiet else logging.INFO)
    handler.addFilter(_ours_or_warning)
    root.addHandler(handler)
    root.setLevel(logging.INFO)


@contextmanager
def quiet(level: int = logging.WARNING, name: str = "utils") -> Iterator[None]:
    """Context (or decorator) in which messages below `level` of the loggers under `name` are
    dropped; the level is put back, as the caller's own messages come later."""
    named = logging.getLogger(name)
    before = named.level
    named.setLevel(level)
    try:
        yield
    finally:
        named.setLevel(before)


def _ours_or_warning(record: logging.LogRecord) -> bool:
    ours = record.name.split(".")[0] in ("__main__", "benchmarks", "data", "models", "utils")
    return ours or record.levelno >= logging.WARNING


class _Tolerant:
    """A stream whose end (the reader has gone, the disk is full) does not end the run: what cannot
    be written is dropped, with one warning unless a reader such as `head` has seen enough."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        self._attempt(self._stream.write, text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, method: Callable, *arguments: str) -> None:
        try:
            method(*arguments)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # also for what is buffered
            os.close(nowhere)
            if not isinstance(error, BrokenPipeError):
                name, reason = self._stream.name, error.strerror
                logger.warning("%s cannot be written (%s); the rest of it is lost", name, reason)


@contextmanager
def log_file() -> Iterator[Callable[[Path], None]]:
    """Context in which messages are kept until the function it gives is called with the path of a
    file; they are then appended to it, as all later ones are.

    Raises:
        UserError: (by that function) the file cannot be opened.
    """
    root, kept = logging.getLogger(), MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)
    kept.addFilter(_ours_or_warning)
    with ExitStack() as stack:
        root.addHandler(kept)
        stack.callback(root.removeHandler, kept)

        def open_file(path: Path) -> None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                handler = logging.StreamHandler(_Tolerant(path.open("a", encoding="utf-8")))
            except OSError as error:
                raise write_error(path, error) from error
            stack.callback(handler.stream.close)
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            handler.addFilter(_ours_or_warning)
            kept.setTarget(handler)
            kept.flush()
            # Not through `kept` from here on: logging.config.dictConfig, which libraries call when
            # they are imported, closes all handlers, and a closed MemoryHandler drops its target.
            root.addHandler(handler)
            stack.callback(root.removeHandler, handler)
            root.removeHandler(kept)

        yield open_file


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """Context in which SIGTERM ends the process with the status of a preempted run at once. Nothing
    is lost: whoever has something to save first replaces the handler while it has."""

    def stop(*_: Any) -> None:
        logger.warning("stopped by SIGTERM; the same command resumes from the last checkpoint")
        raise SystemExit(EXIT_PREEMPTED)  # no `except Exception` on the way out may hold it

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _is_out_of_memory(error: Exception) -> bool:
    """Of Python, numpy, torch's allocators on the processor (two wordings) and on the GPU."""
    kind, text = type(error).__name__, str(error)
    words = ("allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or "OutOfMemory" in kind or any(w in text for w in words)


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Run `main` and turn its end into an exit status; a number that it returns is one already."""

    @wraps(main)
    def run(*arguments, **options) -> int:
        streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (stream and _Tolerant(stream) for stream in streams)
        set_up_logging()
        try:
            with sigterm_exits():
                return main(*arguments, **options) or 0
        except UserError as error:
            logger.error("%s", error)
            return EXIT_BUSY if isinstance(error, Busy) else EXIT_USER
        except Preempted:
            logger.warning("stopped by SIGTERM; the state is saved: the same command resumes")
            return EXIT_PREEMPTED
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0] or "MemoryError"
            logger.error("out of memory (%s); %s", reason, SMALLER)
            return EXIT_USER
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        finally:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
            sys.stdout, sys.stderr = streams

    return run
