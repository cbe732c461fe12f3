"""One cell as a process, and what it leaves: its log, and next to it, as JSON, how it ended."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.common.cli import EXIT_BUSY, EXIT_INTERRUPTED, EXIT_PREEMPTED
from utils.common.files import write_json

#: Exit statuses of a cell that was stopped, or never started: the same command resumes it.
INTERRUPTED = (EXIT_INTERRUPTED, -signal.SIGINT)
STOPPED = (EXIT_BUSY, EXIT_PREEMPTED, *INTERRUPTED, -signal.SIGTERM)


def start_process(
    words: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen:
    """Start `python words`, which appends what it prints to a log file.

    Args:
        environment: variables in addition to those of this process.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    log.with_suffix(".json").unlink(missing_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment or {}),
        )


def keep_ending(log: Path, status: int) -> None:
    """Write down how a cell's process ended, for every machine that sees the folder."""
    if status != EXIT_BUSY:  # it is another process's cell then
        ending = {"status": status, "time": time.time(), "last": last_words(log)[-1]}
        write_json(log.with_suffix(".json"), ending)


def read_ending(log: Path) -> dict[str, Any]:
    """What `keep_ending` wrote, if the cell has not been started again since; else empty."""
    try:
        return json.loads(log.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def last_words(log: Path) -> list[str]:
    """The error at the end of a log: from the last "error:" or traceback on, at most ten lines."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    starts = [i for i, line in enumerate(lines) if re.match(r"error:|Traceback", line)]
    return lines[starts[-1] if starts else 0 :][-10:] or [f"{log} is empty"]


def described(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"status {status}"
    return f"{signal.Signals(-status).name}" + (" (out of memory?)" if status == -9 else "")
