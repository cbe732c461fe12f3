"""Which parts of a recording are classified: cycles, or sliding windows and their averages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.store_build import END_TOLERANCE
from data.stream import Stream
from utils.common.errors import UserError


class Segment(NamedTuple):
    """A part of a recording, in s; the events heard in it where somebody has annotated them."""

    start: float
    end: float
    crackle: int | None = None
    wheeze: int | None = None


def window_spans(samples: int, window: int, hop: int) -> np.ndarray:
    """[n, 2] first sample and the one after the last; the last window ends with the recording."""
    starts = np.arange(0, max(samples - window, 0) + 1, hop)
    if starts[-1] + window < samples:
        starts = np.append(starts, samples - window)
    return np.stack([starts, np.minimum(starts + window, samples)], axis=1)


def cycle_spans(cycles: Sequence[Segment], stream: Stream) -> np.ndarray:
    """[n, 2] as `window_spans`, of cycles in any order, cut as training's are.

    Raises:
        UserError: there is none, or one is empty or not inside the recording.
    """
    if not cycles:
        raise UserError(f"{stream.path}: no cycle was given; leave them out to have windows")
    rate, latest = stream.sample_rate, stream.seconds + END_TOLERANCE
    times = np.array([cycle[:2] for cycle in cycles], np.float64)
    bad = ~((times[:, 0] >= 0) & (times[:, 0] < stream.seconds) & (times[:, 1] <= latest))
    spans = (np.where(bad[:, None], 0, times) * rate).astype(np.int64)
    bad |= spans[:, 0] >= spans[:, 1]
    if bad.any():
        start, end = times[bad.argmax()]
        raise UserError(
            f"{stream.path} is {stream.seconds:.3f} s long; a cycle from {start:g} s to {end:g} s "
            "is not in it or is empty; correct it"
        )
    return np.minimum(spans, stream.samples)


def average(
    spans: np.ndarray, edges: np.ndarray, *values: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Mean over the windows that contain each step's middle.

    Args:
        spans: windows [n, 2], both columns rising; edges: of the steps [s + 1]; values: [n, K].

    Returns:
        windows [s] of each step, and the means [s, K].
    """
    middle = (edges[:-1] + edges[1:]) / 2
    first = np.searchsorted(spans[:, 1], middle, side="right")
    last = np.searchsorted(spans[:, 0], middle, side="right")
    sums = (np.cumsum(np.vstack([0 * v[:1], v]), axis=0) for v in values)
    count = last - first
    return count, [(total[last] - total[first]) / count[:, None] for total in sums]
