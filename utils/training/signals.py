"""Signals between the device, the operating system and the loop.

Per optimiser step three flags matter: was the gradient finite, shall the run stop (SIGTERM), is a
checkpoint due. They are combined over the processes on the device and read one step later, when
the copy has long arrived, so that the step itself never waits for the device.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Flags(NamedTuple):
    """What was decided at a step; rows are this process's cycles of that step."""

    nonfinite: bool
    stop: bool
    save: bool
    rows: Tensor


class Signals:
    """Posts the flags of each step and hands out those of the step before.

    Args:
        device: where the gradients are.
        world: number of processes.
        interval_s: seconds between two checkpoints.
    """

    def __init__(self, device: torch.device, world: int, interval_s: float):
        self.device, self.world, self.interval_s = device, world, interval_s
        self._stop = False
        self._saved_at = time.monotonic()
        self._pending: tuple[Tensor, torch.cuda.Event | None, Tensor] | None = None
        self._previous_handler = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        return self

    def __exit__(self, kind, *_) -> None:
        if self._previous_handler is None:
            return
        signal.signal(signal.SIGTERM, self._previous_handler)
        if self._stop and kind is None:  # it came after the last look: for whoever is next
            os.kill(os.getpid(), signal.SIGTERM)

    def _on_sigterm(self, *_) -> None:
        self._stop = True

    def saved(self) -> None:
        """A checkpoint was written: the interval starts again."""
        self._saved_at = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether this process finds a checkpoint due; the decision is made together, by `post`."""
        return time.monotonic() - self._saved_at >= self.interval_s

    def post(self, nonfinite: Tensor, rows: Tensor) -> Flags | None:
        """Start sending this step's flags and return those of the step before, if any.

        Args:
            nonfinite: scalar on the device, 1 where the gradient had an inf or NaN.
            rows: this process's row numbers of the step, on the CPU.
        """
        own = torch.tensor([0.0, float(self._stop), float(self.due)])
        if self.device.type == "cuda":
            own = own.pin_memory().to(self.device, non_blocking=True)
        own[0] = nonfinite
        if self.world > 1:
            dist.all_reduce(own, op=dist.ReduceOp.MAX)
        event = None
        if self.device.type == "cuda":
            host = torch.empty(3, pin_memory=True)
            host.copy_(own, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            own = host
        previous, self._pending = self._pending, (own, event, rows)
        return self._read(previous)

    def drain(self) -> Flags | None:
        """The flags of the last step, waiting for the device."""
        previous, self._pending = self._pending, None
        return self._read(previous)

    def now(self) -> Flags:
        """Ask all processes between two epochs, when no step is under way."""
        self.post(torch.zeros(()), torch.empty(0, dtype=torch.int64))
        return self.drain()

    @staticmethod
    def _read(pending) -> Flags | None:
        if pending is None:
            return None
        values, event, rows = pending
        if event is not None:
            event.synchronize()
        nonfinite, stop, save = (bool(v) for v in values.tolist())
        return Flags(nonfinite, stop, save, rows)
