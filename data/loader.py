"""From row numbers to batches: what training, evaluation and prediction all read from.

`Cycles` holds everything about the cycles of a run and gives any rows of them as a `Batch`;
`epoch_plan` says which rows make which step; `read_ahead` prepares batches before they are needed.

Buckets (`audio.buckets`): a cycle's bucket is the shortest clip length that holds it. All cycles of
a forward pass are of one bucket, and nothing else depends on it: neither which cycles an epoch
takes, nor how many steps it has, nor the weight of a cycle in its step.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from data.batch import Batch, Metadata
from data.corpora.spectrograms import SpectrogramStore
from data.cycle_table import Completeness
from data.splits import Split
from data.statistics import MetadataStatistics
from data.store import WaveformStore
from data.task import Task

PREFETCH = 2  # batches prepared ahead; one is enough to hide the copy, two absorb a slow page-in


@dataclass
class Cycles:
    """The cycles of a run.

    Attributes:
        table: one row per cycle; a row's number is the cycle's id everywhere.
        split: row numbers of the train, val and test parts.
        statistics: fitted on the training rows (or taken from a checkpoint).
        metadata: `Metadata` of all rows.
        store: waveforms of all rows, 16 kHz, or ready-made spectrograms.
        task: what is classified.
        completeness: whether this is all of its corpus.
        clip_samples: samples of a clip in each bucket, ascending; longer cycles are cut.
        bucket: [N] int64, place in `clip_samples` of the shortest clip that holds the cycle.
    """

    table: pd.DataFrame
    split: Split
    statistics: MetadataStatistics
    metadata: Metadata
    store: WaveformStore | SpectrogramStore
    task: Task
    completeness: Completeness
    clip_samples: Sequence[int]

    def __post_init__(self):
        self.bucket = np.zeros(len(self.table), np.int64)
        if not isinstance(self.store, SpectrogramStore):
            self.bucket = buckets_of(self.store.lengths, self.clip_samples)
        events = (self.table["Crackles"].to_numpy(), self.table["Wheezes"].to_numpy())
        self.label = torch.from_numpy(self.task.labels(*events))  # [N, C]
        self.patient = torch.from_numpy(pd.factorize(self.table["PID"])[0].astype(np.int64))  # [N]

    def classes(self, rows: np.ndarray) -> np.ndarray:
        """Class of each given row, [n] int64."""
        return self.task.true_classes(self.label[rows].numpy())

    def batch(self, rows: np.ndarray, *, waveforms: bool = True) -> Batch:
        """The given cycles as one `Batch` on the CPU; without waveforms S is 0."""
        if isinstance(self.store, SpectrogramStore):
            return self._batch(rows, features=torch.from_numpy(self.store.read(rows)))
        lengths = np.minimum(self.store.lengths[rows], self.clip_samples[-1])
        waveform = np.zeros((len(rows), int(lengths.max()) if waveforms else 0), np.float32)
        if waveforms:
            self.store.read(rows, waveform)
        return self._batch(rows, torch.from_numpy(waveform), torch.from_numpy(lengths))

    def _batch(
        self,
        rows: np.ndarray,
        waveform: torch.Tensor | None = None,
        length: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
    ) -> Batch:
        index = torch.from_numpy(rows)
        return Batch(
            waveform=torch.zeros(len(rows), 0) if waveform is None else waveform,
            length=torch.zeros_like(index) if length is None else length,
            features=features,
            metadata=self.metadata[index],
            label=self.label[index],
            cycle=index,
            patient=self.patient[index],
        )


def read_ahead(read: Callable[[np.ndarray], Batch], parts: Iterable[np.ndarray]) -> Iterator[Batch]:
    """`read` of each array of row numbers, in order, in a thread `PREFETCH` batches ahead."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        parts = iter(parts)
        waiting = deque(pool.submit(read, rows) for rows in islice(parts, PREFETCH))
        while waiting:
            batch = waiting.popleft().result()
            waiting.extend(pool.submit(read, rows) for rows in islice(parts, 1))
            yield batch


def buckets_of(lengths: np.ndarray, clip_samples: Sequence[int]) -> np.ndarray:
    """Lengths [n] in samples -> place [n] in clip_samples of the shortest clip that holds each."""
    return np.searchsorted(clip_samples, np.minimum(lengths, clip_samples[-1]))


def batches_of(rows: np.ndarray, bucket: np.ndarray, size: int) -> list[np.ndarray]:
    """Rows [n] cut into batches of at most `size`, each of one bucket; bucket: [n], of each row."""
    parts = (rows[bucket == number] for number in np.unique(bucket))
    return [part[i : i + size] for part in parts for i in range(0, len(part), size)]


def grouped(order: np.ndarray, bucket: np.ndarray, size: int) -> np.ndarray:
    """The rows of `order` [n] so that each `size` in turn are of one bucket, but for the last few.

    Rows wait until there are `size` of their bucket; those still waiting at the end come last, one
    bucket after the other. With one bucket the order stays as it is.
    """
    waiting, places = defaultdict(list), []
    for place, number in enumerate(bucket.tolist()):
        waiting[number].append(place)
        if len(waiting[number]) == size:
            places += waiting.pop(number)
    return order[places + [place for number in sorted(waiting) for place in waiting[number]]]


class MicroBatch(NamedTuple):
    """One forward and backward pass of one process.

    Attributes:
        rows: row numbers, never empty, of one bucket.
        weight: 1 / (cycles of the whole optimiser step), or 0 for a filler that a process
            computes only because the others need its company.
        seed: of the augmentation.
    """

    rows: np.ndarray
    weight: float
    seed: int


def epoch_order(
    rows: np.ndarray, classes: np.ndarray, *, epoch: int, seed: int, sampler: str
) -> np.ndarray:
    """The training rows in the order of one epoch: a pure function of its arguments.

    sampler `shuffle` permutes them; `balanced` draws as many with replacement, all classes equally.
    """
    generator = np.random.default_rng([seed, epoch])
    if sampler == "shuffle":
        return rows[generator.permutation(len(rows))]
    counts = np.bincount(classes)
    weight = 1.0 / counts[classes]
    return rows[generator.choice(len(rows), size=len(rows), p=weight / weight.sum())]


def epoch_plan(
    order: np.ndarray,
    *,
    batch_size: int,
    bucket: np.ndarray | None = None,
    accumulation_steps: int = 1,
    rank: int = 0,
    world: int = 1,
    epoch: int = 0,
    seed: int = 0,
) -> list[list[MicroBatch]]:
    """What one process computes in each optimiser step of an epoch.

    Every step takes the next batch_size rows of `order` (the last one what is left), dealt out to
    the processes and cut into accumulation_steps micro-batches. The weights make the sum over
    all processes and micro-batches the mean over the step's cycles, whoever computes them.

    bucket: of every row by its number [N]; the order is `grouped` by it, and a micro-batch that
        still holds several buckets becomes one for each. None: all rows are of one.
    """
    bucket = np.zeros(order.max(initial=0) + 1, np.int64) if bucket is None else bucket
    order, steps = grouped(order, bucket[order], batch_size), []
    for number, start in enumerate(range(0, len(order), batch_size)):
        chunk = order[start : start + batch_size]
        passes = []
        for part in np.array_split(chunk[rank::world], accumulation_steps):
            rows, share = (part, 1.0 / len(chunk)) if len(part) else (chunk[:1], 0.0)
            for own in batches_of(rows, bucket[rows], batch_size):
                own_seed = derived_seed(seed, epoch, number, len(passes), rank)
                passes.append(MicroBatch(own, share, own_seed))
        steps.append(passes)
    return steps


def derived_seed(*entropy: int) -> int:
    """A seed that is a pure function of non-negative numbers and unlike that of any others."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint32)[0])
