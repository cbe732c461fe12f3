"""From a batch to what the model takes: log-mels, or a frozen backbone's stored features."""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm import tqdm

from data.augment import Augmentation
from data.batch import Batch
from data.frontend import AudioFrontend
from data.loader import Cycles, batches_of, derived_seed, read_ahead
from models.build import ConditionedAST
from models.conditioner import Features
from utils.common.files import atomic_write, write_error
from utils.common.lock import held
from utils.training.device import Runtime

logger = logging.getLogger(__name__)


def heard(
    frontend: AudioFrontend, hears: bool, waveform: Tensor, length: Tensor, seed: int | None
) -> Features:
    """Waveforms [B, S] -> spectrograms and, where a method `hears`, the padded and augmented clips
    that they are of."""
    if not hears:
        return Features(frontend(waveform, length, seed))
    clips = frontend.clips(waveform, length, seed)
    return Features(frontend.transform(clips, seed), waveform=clips)


class Inputs:
    """Rows -> batches -> spectrograms [B, 1, F, T], computed on the device for every batch."""

    def __init__(
        self, frontend: AudioFrontend, runtime: Runtime, data: Cycles, hears: bool = False
    ):
        """hears: a method of the model needs the clips' waveforms as well."""
        self.frontend, self.runtime, self.data = frontend.to(runtime.device), runtime, data
        self.hears = hears

    def prepare(self, rows: np.ndarray) -> None:
        """Called with the rows [n] that will be read; nothing to do here."""

    def batches(self, parts: Iterable[np.ndarray]) -> Iterator[Batch]:
        """One batch per array of row numbers, on the device, in order, read ahead of use."""
        device = self.runtime.device

        def read(rows: np.ndarray) -> Batch:
            batch = self.read(rows)
            return batch.pin_memory() if device.type == "cuda" else batch

        for batch in read_ahead(read, parts):
            yield batch.to(device, non_blocking=True)

    def read(self, rows: np.ndarray) -> Batch:
        """The given rows [B] as a batch on the CPU; called in its own thread."""
        return self.data.batch(rows)

    def __call__(self, batch: Batch, seed: int | None) -> Features:
        """A batch on the device -> what the model takes.

        seed: of the augmentation; None: none.
        """
        return heard(self.frontend, self.hears, batch.waveform, batch.length, seed)

    def views(self, batch: Batch, seed: int, count: int) -> Features:
        """`count` independent augmentation draws of a batch, one after the other: [V B, ...]."""
        if count == 1:
            return self(batch, seed)
        seeds = [seed, *(derived_seed(seed, view) for view in range(1, count))]
        parts = [self(batch, one) for one in seeds]
        waveform = torch.cat([part.waveform for part in parts]) if self.hears else None
        return Features(torch.cat([part.values for part in parts]), waveform=waveform)


class SpectrogramInputs(Inputs):
    """Rows -> batches of ready-made spectrograms -> [B, 1, F, T], with SpecAugment in training."""

    hears = False

    def __init__(self, augmentation: Augmentation | None, runtime: Runtime, data: Cycles):
        self.augmentation, self.runtime, self.data = augmentation, runtime, data

    @torch.no_grad()
    def __call__(self, batch: Batch, seed: int | None) -> Features:
        values = batch.features
        if seed is not None and self.augmentation is not None:
            plan = self.augmentation.draw(len(batch), seed)
            frames = values.transpose(1, 2).contiguous()  # [B, T, F]
            values = self.augmentation.mask(frames, plan).transpose(1, 2)
        return Features(values.unsqueeze(1).contiguous())


class KnownInputs(Inputs):
    """Rows -> features [B, V, W] that trained models give, computed once per row and kept.

    compute: rows [n] -> [n, V, W], in their order. Rows are computed when they are first needed,
        so that the test part is not read before its time.
    """

    def __init__(self, compute: Callable[[np.ndarray], Tensor], runtime: Runtime, data: Cycles):
        self.compute, self.runtime, self.data = compute, runtime, data
        self.known = np.zeros(len(data.table), bool)
        self.features = torch.empty(0)

    def prepare(self, rows: np.ndarray) -> None:
        rows = rows[~self.known[rows]]
        if len(rows) == 0:
            return
        found = self.compute(rows)
        if not len(self.features):
            self.features = torch.zeros(len(self.known), *found.shape[1:])
        self.features[rows], self.known[rows] = found, True

    def read(self, rows: np.ndarray) -> Batch:
        batch = self.data.batch(rows, waveforms=False)
        return replace(batch, features=self.features[rows])

    def __call__(self, batch: Batch, seed: int | None) -> Features:
        return Features(batch.features)


class FrozenInputs(Inputs):
    """Rows -> the frozen prefix's tokens [B, N, D], computed once per clip and stored on disk, each
    in the room of the longest clip.

    The store is one file per (waveforms, front end, frozen weights, precision) and a table with a
    CRC-32 of every clip in it. Rows are computed when they are first needed, so that the test
    part is not read before its time; what was stored before is checked at that moment (0.8 ms per
    clip of 1214 x 768 tokens, once per process) and computed again if it is damaged.
    """

    DTYPE = torch.bfloat16  # half the disk and reading time; the residual stream stays in fp32
    PART = 256  # clips between two entries in the table
    VERSION = 2  # part of every name; raise it when front end or backbone compute something else

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
        self.shapes = [self._shape(samples) for samples in data.clip_samples]  # of each bucket
        self.clip_bytes = self._bytes(-1)
        text = (
            f"{self.VERSION} {data.store.folder.name} {settings} {model.prefix_fingerprint()} "
            f"{runtime.precision} {self.DTYPE}"
        )
        name = f"frozen-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self.path = Path(cache_dir) / f"{name}.features"
        self.table = Path(cache_dir) / f"{name}.crc32"
        self.checked = np.zeros(len(data.table), bool)  # rows that this process may read
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
        """Compute what is not stored yet or damaged; the processes share the work."""
        rows = rows[~self.checked[rows]]
        if len(rows) == 0:
            return
        main = self.runtime.is_main
        # another run may be filling the same file: whoever comes second finds it filled
        with held(self.path, wait=True) if main else nullcontext():
            batches = broadcast_object_list([self._missing(rows) if main else None])[0]
            clips = sum(map(len, batches))
            size = clips * self.clip_bytes
            if clips:
                text = "frozen backbone: storing %d clips (%.2f GB) in %s"
                logger.info(text, clips, size / 1e9, self.path)
            with tqdm(total=clips, desc="frozen features", disable=None, leave=False) as bar:
                step = -(-self.PART // self.batch_size)
                for start in range(0, len(batches), step):
                    size -= self._fill(batches[start : start + step], size, bar)
        self.checked[rows] = True

    def _missing(self, rows: np.ndarray) -> list[np.ndarray]:
        """The batches that hold those of the given rows that are not stored, or damaged.

        A clip is always computed in the same batch, whatever else is missing: rounding depends on
        it, and what is computed again must be what was computed before.
        """
        crc = self._stored()
        stored = rows[crc[rows] >= 0]
        good = [
            row
            for row, bucket in zip(stored, self.data.bucket[stored], strict=True)
            if zlib.crc32(self.features[row, : self._bytes(bucket)]) == crc[row]
        ]
        if len(good) < len(stored):
            text = "%s: %d of %d stored clips are damaged; they are computed again"
            logger.warning(text, self.path, len(stored) - len(good), len(stored))
        part = np.zeros(len(crc), np.int64)
        for number, name in enumerate(("train", "val", "test"), start=1):
            part[getattr(self.data.split, name)] = number
        batches = [
            batch
            for own in (np.flatnonzero(part == number) for number in range(4))
            for batch in batches_of(own, self.data.bucket[own], self.batch_size)
        ]
        missing = np.setdiff1d(rows, good)
        return [batch for batch in batches if np.isin(batch, missing).any()]

    def _fill(self, batches: list[np.ndarray], needed: int, bar: tqdm) -> int:
        """Compute and store some batches of rows, and enter them in the table; returns the bytes.

        needed: bytes of these and of all that are still to come, for the message of a full disk.
        """
        done = []
        try:
            # written, not assigned to the map: there, a full disk would be a SIGBUS
            with self.path.open("r+b") as file:
                for rows in batches[self.runtime.rank :: self.runtime.world]:
                    for row, tokens in zip(rows.tolist(), self._prefix(rows).cpu(), strict=True):
                        content = tokens.contiguous().view(torch.uint8).numpy()
                        file.seek(row * self.clip_bytes)
                        file.write(content)
                        done.append((row, zlib.crc32(content)))
        except OSError as error:
            raise write_error(self.path, error, needed) from error
        done = gather_object(done)
        bar.update(len(done))
        if self.runtime.is_main:
            crc = self._stored()
            for row, value in done:
                crc[row] = value
            with atomic_write(self.table) as file:
                file.write(crc.tobytes())
        return len(done) * self.clip_bytes

    def _stored(self) -> np.ndarray:
        """CRC-32 of each row that is stored, -1 of any other: [N] int64."""
        content = self.table.read_bytes() if self.table.is_file() else b""
        if len(content) != 8 * len(self.data.table):
            return np.full(len(self.data.table), -1)
        return np.frombuffer(content, np.int64).copy()

    def _prefix(self, rows: np.ndarray) -> Tensor:
        """rows [B] -> [B, N, D] on the device, in the type they are stored in."""
        batch = self.data.batch(rows).to(self.runtime.device)
        return self._tokens(super().__call__(batch, None).values)

    @torch.no_grad()
    def _tokens(self, spectrogram: Tensor) -> Tensor:
        mode = self.model.training
        self.model.eval()
        with self.runtime.autocast():
            prefix = self.model.frozen_prefix(spectrogram)
        self.model.train(mode)
        return prefix.to(self.DTYPE)

    def _shape(self, samples: int) -> tuple[int, ...]:
        """(N, D) of clips of so many samples."""
        silence = torch.zeros(1, samples, device=self.runtime.device)
        length = torch.tensor([samples], device=self.runtime.device)
        return tuple(self._tokens(self.frontend(silence, length)).shape[1:])

    def _bytes(self, bucket: int) -> int:
        return int(np.prod(self.shapes[bucket])) * self.DTYPE.itemsize

    def read(self, rows: np.ndarray) -> Batch:
        """The given rows [B] with their stored tokens [B, N, D] in place of the waveform."""
        bucket = int(self.data.bucket[rows[0]])
        stored = torch.from_numpy(self.features[rows, : self._bytes(bucket)]).view(self.DTYPE)
        batch = self.data.batch(rows, waveforms=False)
        return replace(batch, features=stored.view(-1, *self.shapes[bucket]))

    def __call__(self, batch: Batch, seed: int | None) -> Features:
        return Features(batch.features, from_prefix=True)
