"""Logits of any cycles: what the loop evaluates with, and what `evaluate.py` uses without a loop.

B batch, K logits, n rows, M kinds of metadata.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data.batch import Metadata
from data.loader import Cycles, batches_of
from models.build import ConditionedAST
from utils.training.device import Runtime
from utils.training.inputs import Inputs


class Predictor:
    """Computes logits with a model as it is, in eval mode and without augmentation.

    Args:
        data: the cycles.
        model: on the run's device.
        inputs: gives batches, and what the model takes of them.
        runtime: device, precision; several processes share the rows.
        batch_size: cycles per forward pass. Rounding depends on it, the meaning does not.
    """

    def __init__(
        self,
        data: Cycles,
        model: ConditionedAST,
        inputs: Inputs,
        runtime: Runtime,
        batch_size: int,
    ):
        self.data, self.model, self.inputs = data, model, inputs
        self.runtime, self.batch_size = runtime, batch_size

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Logits [n, K] float32 of the given rows, in their order, on every process."""
        return self._predict(rows, None)[:, 0]

    def under(self, rows: np.ndarray, metadata: Sequence[Metadata]) -> np.ndarray:
        """Logits [M, n, K] of the same sounds with each of M other metadata.

        Every batch is read and turned into spectrograms once for all of them.

        Args:
            rows: row numbers [n].
            metadata: each of length n, in the order of `rows`.
        """
        return self._predict(rows, metadata).swapaxes(0, 1)

    @torch.no_grad()
    def _predict(self, rows: np.ndarray, metadata: Sequence[Metadata] | None) -> np.ndarray:
        """[n, M, K]; M is 1 for the cycles' own metadata (None)."""
        self.inputs.prepare(rows)
        self.model.eval()
        device = self.runtime.device
        places = np.arange(len(rows))[self.runtime.rank :: self.runtime.world]
        parts = batches_of(places, self.data.bucket[rows[places]], self.batch_size)
        shape = (1 if metadata is None else len(metadata), len(self.data.task.outputs))
        results = []
        batches = self.inputs.batches(rows[part] for part in parts)
        for part, batch in zip(parts, batches, strict=True):
            place = torch.from_numpy(part)
            given = (
                [batch.metadata] if metadata is None else [m[place].to(device) for m in metadata]
            )
            with self.runtime.autocast():
                features = self.inputs(batch, None)
                logits = [self.model(features, m).logits for m in given]
            results.append((place.to(device), torch.cat(logits, dim=1)))
        found, record = gather_rows(self.runtime, results, shape[0] * shape[1])
        logits = np.empty((len(rows), *shape), np.float32)
        logits[found] = record.reshape(-1, *shape)
        return logits


def gather_rows(
    runtime: Runtime, parts: Sequence[tuple[Tensor, Tensor]], width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [n] and what belongs to them [n, width] from all processes, without padding.

    Args:
        parts: (numbers [B], values [B, width]) on the run's device.
    """
    device = runtime.device
    rows = torch.cat([torch.empty(0, dtype=torch.int64, device=device)] + [r for r, _ in parts])
    record = torch.cat([torch.empty(0, width, device=device)] + [v for _, v in parts])
    rows = runtime.gather(rows, -1)
    record = runtime.gather(record, 0.0)
    keep = rows >= 0
    return rows[keep].cpu().numpy(), record[keep].cpu().numpy()
