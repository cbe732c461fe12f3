"""From a batch to what the model takes: log-mels, or a frozen backbone's stored features."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from data.batch import Batch
from data.frontend import AudioFrontend
from data.loader import Cycles, read_ahead
from models.build import ConditionedAST
from models.conditioner import Features
from utils.common.files import atomic_write, write_error
from utils.training.device import Runtime

logger = logging.getLogger(__name__)


class Inputs:
    """Rows -> batches -> spectrograms [B, 1, F, T], computed on the device for every batch."""

    def __init__(self, frontend: AudioFrontend, runtime: Runtime, data: Cycles):
        self.frontend, self.runtime, self.data = frontend.to(runtime.device), runtime, data

    def prepare(self, rows: np.ndarray) -> None:
        """Called with the rows [n] that will be asked for; nothing to do here."""

    def batches(self, parts: Iterable[np.ndarray]) -> Iterator[Batch]:
        """One batch per array of row numbers, on the device, in order, read ahead of use."""
        device = self.runtime.device

        def read(rows: np.ndarray) -> Batch:
            batch = self.read(rows)
            return batch.pin_memory() if device.type == "cuda" else batch

        for batch in read_ahead(read, parts):
            yield batch.to(device, non_blocking=True)

    def read(self, rows: np.ndarray) -> Batch:
        """The given rows [B] as a batch on the CPU; called in a thread of its own."""
        return self.data.batch(rows)

    def __call__(self, batch: Batch, seed: int | None) -> Features:
        """A batch on the device -> what the model takes.

        seed: of the augmentation; None: none.
        """
        return Features(self.frontend(batch.waveform, batch.length, seed))


class FrozenInputs(Inputs):
    """Rows -> the frozen prefix's tokens [B, N, D], computed once per clip and stored on disk.

    The store is one file per (waveforms, front end, frozen weights, precision) and a table of the
    rows that are in it. Rows are computed when they are first asked for, so that the test half is
    not read before its time. Two runs may fill the same store: they write the same values.
    """

    DTYPE = torch.bfloat16  # half the disk and reading time; the residual stream goes on in fp32
    PART = 256  # clips between two entries in the table
    VERSION = 1  # part of every name; raise it when front end or backbone compute something else

    def __init__(
        self,
        frontend: AudioFrontend,
        runtime: Runtime,
        model: ConditionedAST,
        data: Cycles,
        cache_dir: str | Path,
        *,
        settings: str,
        batch_size: int,
    ):
        """settings: everything the front end depends on, as text."""
        super().__init__(frontend, runtime, data)
        self.model, self.batch_size = model, batch_size
        self.shape = tuple(self._prefix(data.split.train[:1]).shape[1:])
        self.clip_bytes = int(np.prod(self.shape)) * self.DTYPE.itemsize
        text = (
            f"{self.VERSION} {data.store.folder.name} {settings} {model.prefix_fingerprint()} "
            f"{runtime.precision} {self.DTYPE}"
        )
        name = f"frozen-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self.path = Path(cache_dir) / f"{name}.features"
        self.table = Path(cache_dir) / f"{name}.rows"
        self._open()

    def _open(self) -> None:
        """Map the file at its full size, sparse until it is filled."""
        size = len(self.data.table) * self.clip_bytes
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:  # append: never shortens what another run wrote
                file.truncate(size)
            self.features = np.memmap(
                self.path, np.uint8, "r", shape=(len(self.data.table), self.clip_bytes)
            )
        except OSError as error:
            raise write_error(self.path, error, size) from error

    def prepare(self, rows: np.ndarray) -> None:
        """Compute what is not stored yet; the processes share the work."""
        # one process looks and tells the others: another run may be filling the same table
        missing = broadcast_object_list([rows[~self._stored()[rows]]])[0]
        if len(missing) == 0:
            return
        logger.info(
            "frozen backbone: storing %d clips (%.2f GB) in %s",
            len(missing),
            len(missing) * self.clip_bytes / 1e9,
            self.path,
        )
        # a killed filling goes on behind its last part
        parts = [missing[i : i + self.PART] for i in range(0, len(missing), self.PART)]
        with tqdm(
            total=len(missing), desc="frozen features", disable=None, leave=False, ncols=100
        ) as bar:
            for number, part in enumerate(parts):
                self._fill(part, (len(missing) - number * self.PART) * self.clip_bytes, bar)

    def _fill(self, rows: np.ndarray, needed: int, bar: tqdm) -> None:
        """Compute and store the given rows, and enter them in the table once they are on the disk.

        needed: bytes of these and of all that are still to come, for the message of a full disk.
        """
        own = rows[self.runtime.rank :: self.runtime.world]
        try:
            # written, not assigned to the map: there, a full disk would be a SIGBUS
            with self.path.open("r+b") as file:
                for start in range(0, len(own), self.batch_size):
                    part = own[start : start + self.batch_size]
                    for row, tokens in zip(part, self._prefix(part).cpu(), strict=True):
                        file.seek(int(row) * self.clip_bytes)
                        file.write(tokens.contiguous().view(torch.uint8).numpy())
                    bar.update(len(part) * self.runtime.world)
                file.flush()
                os.fsync(file.fileno())  # the table below must not outlive the features
        except OSError as error:
            raise write_error(self.path, error, needed) from error
        self.runtime.barrier()
        if self.runtime.is_main:
            stored = self._stored()
            stored[rows] = True
            with atomic_write(self.table) as file:
                file.write(np.packbits(stored).tobytes())
        self.runtime.barrier()

    def _stored(self) -> np.ndarray:
        """Which rows are stored, [N] bool."""
        count = len(self.data.table)
        bits = np.frombuffer(self.table.read_bytes() if self.table.is_file() else b"", np.uint8)
        if len(bits) != -(-count // 8):
            return np.zeros(count, bool)
        return np.unpackbits(bits, count=count).astype(bool)

    @torch.no_grad()
    def _prefix(self, rows: np.ndarray) -> Tensor:
        """rows [B] -> [B, N, D] on the device, in the type they are stored in."""
        batch = self.data.batch(rows).to(self.runtime.device)
        mode = self.model.training
        self.model.eval()
        with self.runtime.autocast():
            prefix = self.model.frozen_prefix(super().__call__(batch, None).values)
        self.model.train(mode)
        return prefix.to(self.DTYPE)

    def read(self, rows: np.ndarray) -> Batch:
        """The given rows [B] with their stored tokens [B, N, D] in place of the waveform."""
        stored = torch.from_numpy(self.features[rows]).view(self.DTYPE)
        batch = self.data.batch(rows, waveforms=False)
        return replace(batch, features=stored.view(-1, *self.shape))

    def __call__(self, batch: Batch, seed: int | None) -> Features:
        return Features(batch.features, from_prefix=True)
