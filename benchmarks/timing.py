"""Interleaved timing: contestants take turns, so that a busy machine slows them alike."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each round; rounds of several contestants belong together one by one.

    `cpu_seconds` are the processor seconds of all the process's threads: what the work costs, also
    where other programs take turns on the same cores.
    """

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        """s."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        return _spread(self.seconds)

    def ratio(self, other: Timing) -> float:
        """How many times faster this is than `other`: median of the rounds' ratios."""
        return statistics.median(self._ratios(other))

    def ratio_spread(self, other: Timing) -> float:
        """Interquartile range of the rounds' ratios over their median."""
        return _spread(self._ratios(other))

    def _ratios(self, other: Timing) -> list[float]:
        return [b / a for a, b in zip(self.seconds, other.seconds, strict=True)]


def _spread(values) -> float:
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


def interleave(
    contestants: dict[str, Callable[[], Any]],
    *,
    rounds: int = 20,
    warmup: int = 3,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Time the contestants in turn, `rounds` times each after `warmup` untimed rounds.

    On CUDA the device is waited for before and after each call.
    """
    cuda = torch.device(device).type == "cuda"
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(warmup + rounds):
        for name, function in contestants.items():
            if cuda:
                torch.cuda.synchronize(device)
            start, cpu_start = time.perf_counter(), time.process_time()
            function()
            if cuda:
                torch.cuda.synchronize(device)
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
                cpu_seconds[name].append(time.process_time() - cpu_start)
    return {name: Timing(tuple(seconds[name]), tuple(cpu_seconds[name])) for name in contestants}


def print_result(result: dict[str, Any]) -> None:
    """Print a result as a table of its keys, then as the last line, JSON (4 digits)."""
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in result.items()}
    for key, value in rounded.items():
        print(f"{key:32} {value}")
    print(json.dumps(rounded))
