"""The shape contract between data, models and training: `Metadata` and `Batch`.

B batch, S samples, C logits. Everything else in the repository refers to the shapes, units and
dtypes that are written here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from data.task import FIELDS


class TensorRecord:
    """Dataclass of tensors (or of further `TensorRecord`s, or None) moved and indexed as one."""

    def _map(self, function):
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**{k: None if v is None else function(v) for k, v in values.items()})

    def to(self, device: torch.device | str, non_blocking: bool = False):
        """Copy of this object with every tensor on `device`."""
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        """Copy in page-locked memory, so that a later `to(..., non_blocking=True)` overlaps."""
        return self._map(lambda value: value.pin_memory())

    def __getitem__(self, index):
        """Select along the batch dimension (slice, index tensor or boolean mask)."""
        return self._map(lambda value: value[index])


@dataclass
class Metadata(TensorRecord):
    """What is known about a batch of cycles except the sound.

    Attributes:
        device: [B] int64, index into `MetadataStatistics.devices`; the index after the last
            name means unknown.
        site: [B] int64, the same of `MetadataStatistics.sites`.
        rest: [B, 3] float32, `SCALARS` z-scored with the training cycles' statistics;
            0 where the value is unknown.
        known: [B, 5] bool, columns `FIELDS`. A conditioner must treat a field whose flag is
            False as unknown, whatever its value.
    """

    device: Tensor
    site: Tensor
    rest: Tensor
    known: Tensor

    def __len__(self) -> int:
        return self.device.shape[0]

    def without(self, *names: str) -> Metadata:
        """Copy in which the named `FIELDS` are unknown for the whole batch."""
        hidden = [FIELDS.index(name) for name in names]
        known = self.known.clone()
        known[:, hidden] = False
        return Metadata(
            device=torch.where(known[:, 0], self.device, 0),  # tells nothing; `known` counts
            site=torch.where(known[:, 1], self.site, 0),
            rest=torch.where(known[:, 2:], self.rest, 0.0),
            known=known,
        )


@dataclass
class Batch(TensorRecord):
    """One batch as the loader yields it; padding, augmentation and log-mel come on the device.

    Attributes:
        waveform: [B, S] float32, 16 kHz, the cycle's own samples, zero behind `length`;
            S is the longest length in the batch (at most 10 s), 0 where `features` are given.
            The front end pads to the shortest bucket that holds S samples, so the cycles of a
            batch must be of one bucket (`data.loader`).
        length: [B] int64, samples of each cycle.
        metadata: `Metadata` of the same B cycles.
        label: [B, C] float32. C = 2: (crackle, wheeze). C = 1: abnormal.
        cycle: [B] int64, row number of the cycle in the run's cycle table.
        patient: [B] int64, number of the patient in the run's cycle table.
        features: what was computed before and replaces the waveform, or None: the tokens
            [B, N, D] of a frozen backbone, or ready-made spectrograms [B, F, T].
    """

    waveform: Tensor
    length: Tensor
    metadata: Metadata
    label: Tensor
    cycle: Tensor
    patient: Tensor
    features: Tensor | None = None

    def __len__(self) -> int:
        return self.length.shape[0]


for _record in (Metadata, Batch):  # pytrees: torch.export takes them as a model's inputs
    torch.export.register_dataclass(_record)
