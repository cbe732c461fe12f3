"""How fast a run is: measured while it trains, kept in its record.json, read for estimates.

record.json, "pace":
    device   name, as `device_name` gives it
    step     s per optimiser step, without the first one
    epoch    s per epoch: its steps and its evaluation (0 s of it before the first has ended)
    memory   bytes: the device's peak on CUDA, else the process's
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict, dataclass

import torch

from utils.training.runfolder import RunFolder

FIRST = 60.0  # s of training after which a run that has ended no epoch says how fast it is
EPOCHS = 2  # the last epoch that is measured; the first one may have compiled


def device_name(device: str | torch.device = "auto") -> str:
    """Of training.device or a device: what a pace belongs to."""
    if str(device) != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name(None if str(device) == "auto" else device)
    return f"CPU, {os.cpu_count()} cores"


@dataclass(frozen=True)
class Pace:
    """What record.json holds; see above."""

    device: str
    step: float
    epoch: float
    memory: int

    @classmethod
    def of(cls, folder: RunFolder) -> Pace | None:
        """The pace of a run; None where none was measured."""
        try:
            return cls(**folder.read_record()["pace"])
        except (KeyError, TypeError):
            return None


def _peak_memory() -> int:
    """Bytes that this process had at most; 0 on Windows, which does not say."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class PaceMeter:
    """Called by the loop at the start of an epoch's training, after each step and at its end.

    Args:
        folder: of the run; None measures nothing.
        steps: of an epoch.
    """

    def __init__(self, folder: RunFolder | None, device: torch.device, steps: int):
        self.folder, self.device, self.steps = folder, device, steps
        self.epochs, self.kept = 0, False

    def start(self) -> None:
        self.times: list[float] = [time.monotonic()]  # start, end of the first and the last step
        self.done = 0  # steps

    def step(self) -> None:
        now = time.monotonic()
        self.times, self.done = [*self.times[:2], now], self.done + 1
        if not self.kept and now - self.times[0] > FIRST:
            self._keep(0.0)

    def end(self) -> None:
        """After the evaluation."""
        self.epochs += 1
        if self.epochs <= EPOCHS and self.done:
            self._keep(time.monotonic() - self.times[-1])

    def _keep(self, evaluation: float) -> None:
        if self.folder is None:
            return
        self.kept, few = True, self.done < 2
        began, steps = (self.times[0], self.done) if few else (self.times[1], self.done - 1)
        step = (self.times[-1] - began) / steps
        if self.device.type == "cuda":
            name, memory = device_name(self.device), torch.cuda.max_memory_reserved(self.device)
        else:
            name, memory = device_name("cpu"), _peak_memory()
        pace = Pace(name, step, self.steps * step + evaluation, memory)
        self.folder.write_record(pace=asdict(pace))
