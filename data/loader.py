"""From row numbers to batches: what training, evaluation and prediction all read from.

`Cycles` holds everything about the cycles of a run and gives any rows of them as a `Batch`;
`epoch_plan` says which rows make which step; `read_ahead` prepares batches before they are needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
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
        max_samples: samples a clip has at most.
    """

    table: pd.DataFrame
    split: Split
    statistics: MetadataStatistics
    metadata: Metadata
    store: WaveformStore | SpectrogramStore
    task: Task
    completeness: Completeness
    max_samples: int

    def __post_init__(self):
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
        lengths = np.minimum(self.store.lengths[rows], self.max_samples)
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


class MicroBatch(NamedTuple):
    """One forward and backward pass of one process.

    Attributes:
        rows: row numbers, never empty.
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
    """
    steps = []
    for number, start in enumerate(range(0, len(order), batch_size)):
        chunk = order[start : start + batch_size]
        passes = []
        for part, rows in enumerate(np.array_split(chunk[rank::world], accumulation_steps)):
            share = 1.0 / len(chunk)
            if len(rows) == 0:
                rows, share = chunk[:1], 0.0
            passes.append(MicroBatch(rows, share, derived_seed(seed, epoch, number, part, rank)))
        steps.append(passes)
    return steps


def derived_seed(*entropy: int) -> int:
    """A seed that is a pure function of non-negative numbers and unlike that of any others."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint32)[0])
