"""What runs the sections of benchmarks.gpu: time limits, records, the result files."""

from __future__ import annotations

import gc
import json
import platform
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_report import rounded, to_markdown
from utils.common.files import write_text

#: packages of this repository: one of them missing is a fault, not a reason to skip
OWN = ("benchmarks", "data", "models", "utils")

Parts = Iterator[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Setting:
    """Where and at what size a section measures.

    Attributes:
        device: "cuda" or "cpu".
        quick: tiny sizes, to see whether everything runs; such figures mean nothing.
        folder: scratch space, gone at the end.
    """

    device: str
    quick: bool
    folder: Path


class NeedsCuda(Exception):
    """Raised by a section that makes no sense on a CPU."""


class _OutOfTime(BaseException):
    """Not an Exception: nothing on the way up may take it for an error of its own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `_OutOfTime` in the block after so many seconds (main thread only).

    An import is let finish: half a module would stay behind and break every later section.
    """

    def stop(_, frame):
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                signal.setitimer(signal.ITIMER_REAL, 0.2)
                return
            frame = frame.f_back
        raise _OutOfTime

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def measure(
    function: Callable[[Setting], Parts],
    setting: Setting,
    seconds: float,
    record: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Fill `record` (status, message, seconds, results) part by part; never raises an Exception."""
    began = time.monotonic()
    record |= {"status": "running", "message": "", "seconds": 0.0, "results": {}}
    try:
        with time_limit(seconds):
            for name, figures in function(setting):
                record["results"][name] = figures
                record["seconds"] = time.monotonic() - began
                save()
        record["status"] = "done"
    except _OutOfTime:
        record |= {"status": "out of time", "message": f"cut off after {seconds:.0f} s"}
    except NeedsCuda:
        record |= {"status": "skipped", "message": "needs CUDA"}
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0]
        if missing and missing not in OWN:
            record |= {"status": "skipped", "message": f"package {missing} is not installed"}
        else:
            traceback.print_exc()
            reason = str(error).strip().splitlines()
            text = f"{type(error).__name__}: {reason[0] if reason else ''}"
            record |= {"status": "failed", "message": text}
    record["seconds"] = time.monotonic() - began
    save()
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def describe(setting: Setting) -> dict[str, Any]:
    """What was measured on, and with what."""
    content: dict[str, Any] = {"program": "benchmarks.gpu", "device": "cpu"}
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        content |= {
            "device": properties.name,
            "memory_gib": properties.total_memory / 2**30,
            "multiprocessors": properties.multi_processor_count,
        }
    return content | {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if setting.device == "cuda" else None,
        "python": platform.python_version(),
        "cpu_threads": torch.get_num_threads(),
        "quick": setting.quick,
        "sections": {},
    }


class Results:
    """The two files, written anew after every part; none as long as nothing was measured."""

    def __init__(self, folder: Path, content: dict[str, Any]):
        slug = re.sub(r"[^a-z0-9]+", "-", content["device"].lower()).strip("-")
        self.path = folder / f"{slug}_{content['date']}.json"
        self.content = content | {"sections": self._earlier(content)}

    def _earlier(self, content: dict[str, Any]) -> dict[str, Any]:
        """Sections that an earlier call on the same device and day left."""
        if not self.path.is_file():
            return {}
        found = json.loads(self.path.read_text(encoding="utf-8"))
        same = all(found.get(key) == content[key] for key in ("device", "date", "torch", "quick"))
        return found["sections"] if same else {}

    def record(self, name: str, words: str) -> dict[str, Any]:
        """A fresh record of a section, in place of an earlier one."""
        self.content["sections"][name] = {"command": words}
        return self.content["sections"][name]

    def save(self) -> None:
        if any(section.get("results") for section in self.content["sections"].values()):
            text = json.dumps(rounded(self.content), indent=1)
            write_text(self.path, text + "\n")
            write_text(self.path.with_suffix(".md"), to_markdown(rounded(self.content)))
