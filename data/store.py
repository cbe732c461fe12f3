"""The waveform store: every cycle at the working sample rate, in one file read by position.

Decoding and resampling take minutes, an epoch should not. One pass over the recordings writes all
cycles as float32 into `<cache_dir>/waveforms-<key>/`; later runs open that at once. The key is a
hash of everything that the samples depend on, the recordings' content included, so a changed
recording, annotation or setting makes a new store, never a wrong one.

    samples.f32   the cycles one after another; cycle i begins at offsets[i]
    cycles.i64    [3, N] int64: offsets, lengths in samples (0: left out), CRC-32 of the samples
    index.json    what the store was made from, the recordings that were left out, checksums
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd

from utils.common.errors import UserError

log = logging.getLogger(__name__)

#: Part of every key; raise it when samples or layout change.
STORE_VERSION = 2
#: Bytes that a fingerprint reads at the head, at the tail, and at each of BLOCKS places between.
ENDS, BLOCK, BLOCKS = 8192, 4096, 6
WHOLE = 1 << 20  # bytes read at a time where all are


@dataclass
class WaveformStore:
    """Cycles of a table as float32 samples; row numbers are those of the table.

    A cycle is read when it is asked for. A mapping of the whole file would show every cycle ever
    read as this process's memory, and mapping each by itself takes four times as long. Nothing
    stays open, so a store can be pickled and forked.

    Attributes:
        folder: where the store lies.
        lengths: [N] int64, samples of each cycle; 0 where `bad`.
        checksums: [N] int64, CRC-32 of each cycle; compared when a process first reads it.
        bad: [N] bool, cycles of recordings that were left out (on_bad_recording="skip" only).
        report: one line per recording that was left out.
    """

    folder: Path
    offsets: np.ndarray
    lengths: np.ndarray
    checksums: np.ndarray
    report: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.bad = self.lengths == 0
        self._checked = np.zeros(len(self.lengths), bool)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, cycle: int) -> np.ndarray:
        """Samples [lengths[cycle]] float32, an array of the caller's own."""
        out = np.empty((1, self.lengths[cycle]), np.float32)
        self.read(np.array([cycle]), out)
        return out[0]

    def read(self, cycles: np.ndarray, out: np.ndarray) -> None:
        """Copy the first samples of the cycles [n] into the rows of out [n, S] float32; what lies
        after the end of a shorter cycle stays as it is.

        Raises:
            UserError: a cycle was left out, or the file is not what was written.
        """
        for cycle in cycles[self.bad[cycles]]:
            raise UserError(f"cycle {cycle} was left out of {self.folder}: {self.report}")
        with (self.folder / "samples.f32").open("rb", buffering=0) as file:
            for row, cycle in zip(out, cycles, strict=True):
                length = int(self.lengths[cycle])
                samples = row[:length]
                file.seek(4 * int(self.offsets[cycle]))
                if file.readinto(samples) != samples.nbytes:
                    damaged(self.folder, "samples.f32 is cut off")
                if not self._checked[cycle]:
                    rest = file.read(4 * length - samples.nbytes)
                    if zlib.crc32(rest, zlib.crc32(samples)) != self.checksums[cycle]:
                        damaged(self.folder, f"cycle {cycle} has another checksum")
                    self._checked[cycle] = True


@dataclass
class StorePlan:
    """What a store of a table consists of, before any sound is decoded.

    Attributes:
        settings: what else the samples depend on.
        recordings: path of each recording, in the table's order of appearance.
        prints: `fingerprint` of each; full_hash: of all its bytes.
        cycles: row numbers of each recording's cycles.
        starts, ends: [N] int64, first sample and the one after the last, at the working rate.
        offsets: [N] int64, where each cycle begins in the file.
    """

    settings: dict
    recordings: list[str]
    prints: list[list]
    cycles: list[np.ndarray]
    starts: np.ndarray
    ends: np.ndarray
    offsets: np.ndarray
    full_hash: bool = False

    @classmethod
    def of(
        cls, table: pd.DataFrame, sample_rate: int, resampler: str, full_hash: bool = False
    ) -> StorePlan:
        """Plan from a cycle table; reads the fingerprints of the files, not the files."""
        starts = (table["CycleStart"].to_numpy(np.float64) * sample_rate).astype(np.int64)
        ends = (table["CycleEnd"].to_numpy(np.float64) * sample_rate).astype(np.int64)
        empty = np.flatnonzero((ends <= starts) | (starts < 0))
        if len(empty):
            row = table.iloc[empty[0]]
            raise UserError(
                f"cycle from {row.CycleStart} s to {row.CycleEnd} s of {row.Filename} is empty; "
                f"fix its annotation ({len(empty)} such cycles)"
            )
        groups = table.groupby("Recording", sort=False).indices
        if "" in groups:
            raise UserError("the cycle table was made without audio; read it with its recordings")
        sizes = ends - starts
        return cls(
            settings={
                "version": STORE_VERSION,
                "sample_rate": sample_rate,
                "resampler": resampler,
            },
            recordings=list(groups),
            prints=[fingerprint(Path(path), full_hash) for path in groups],
            cycles=list(groups.values()),
            starts=starts,
            ends=ends,
            offsets=np.cumsum(sizes) - sizes,
            full_hash=full_hash,
        )

    def job(self, number: int) -> dict:
        """All that a worker must know to cut the cycles of one recording."""
        rows = self.cycles[number]
        return {
            "number": number,
            "path": self.recordings[number],
            "print": self.prints[number],
            "full_hash": self.full_hash,
            "starts": self.starts[rows].tolist(),
            "ends": self.ends[rows].tolist(),
            "offsets": self.offsets[rows].tolist(),
            "sample_rate": self.settings["sample_rate"],
            "resampler": self.settings["resampler"],
        }

    @property
    def samples(self) -> int:
        """Samples that the file has room for."""
        return int((self.ends - self.starts).sum())

    @property
    def name(self) -> str:
        """Of the store's folder: a hash of settings, recordings' content and cycles."""
        rows = [rows.tolist() for rows in self.cycles]
        digest = hashlib.sha256(json.dumps([self.settings, self.prints, rows]).encode())
        digest.update(self.starts.tobytes() + self.ends.tobytes())
        return f"waveforms-{digest.hexdigest()[:24]}"


def fingerprint(path: Path, full_hash: bool = False) -> list:
    """[file name, size, hash of its head, its tail and some blocks between]: 40 kB are read.

    full_hash: of every byte instead.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = file.seek(0, 2)
            digest = hashlib.blake2b(digest_size=12, person=b"full" if full_hash else b"")
            step = max(1, (size - BLOCK) // (BLOCKS + 1))
            starts = (0, *range(step, step * (BLOCKS + 1), step), max(0, size - ENDS))
            for start in range(0, size, WHOLE) if full_hash else starts:
                file.seek(start)
                block = ENDS if start in (0, size - ENDS) else BLOCK
                digest.update(file.read(WHOLE if full_hash else block))
    except OSError as error:
        raise UserError(
            f"recording {path} cannot be read ({error.strerror}); restore it or leave it out"
        ) from error
    return [path.name, size, digest.hexdigest()]


def damaged(folder: Path, reason: object) -> NoReturn:
    """Every damage of a store ends here."""
    raise UserError(f"{folder} is damaged ({reason}); delete it to have it built again")


def checksum(index: dict) -> int:
    """CRC-32 of the index, without its own entry for it."""
    return zlib.crc32(json.dumps({**index, "checksum": 0}).encode())


def open_folder(folder: Path, plan: StorePlan, on_bad_recording: str) -> WaveformStore:
    """Open a finished store and check it against its plan.

    Raises:
        UserError: it is damaged, or lacks bad recordings under on_bad_recording "error".
    """
    try:
        index = json.loads((folder / "index.json").read_bytes())
        if not isinstance(index, dict) or index.get("checksum") != checksum(index):
            raise ValueError("index.json has another checksum")
        content = (folder / "cycles.i64").read_bytes()
        if index["cycles"] != zlib.crc32(content):
            raise ValueError("cycles.i64 has another checksum")
        size = (folder / "samples.f32").stat().st_size
    except (OSError, ValueError, RecursionError) as error:
        damaged(folder, error)
    if index["settings"] != plan.settings or index["prints"] != plan.prints:
        damaged(folder, "it was made from other recordings")
    offsets, lengths, checksums = np.frombuffer(content, np.int64).reshape(3, -1)
    if size != 4 * plan.samples:
        damaged(folder, f"samples.f32 has {size} bytes instead of {4 * plan.samples}")
    report = index["bad"]
    if report and on_bad_recording == "error":
        raise UserError(
            f"{len(report)} recordings cannot be used; the first: {report[0]}. Repair or remove "
            f"them, or set dataset.on_bad_recording: skip"
        )
    store = WaveformStore(folder, offsets, lengths, checksums, report)
    if report:
        log.warning("%d recordings (%d cycles) are left out", len(report), store.bad.sum())
    return store
