"""The waveform store: every cycle at the working sample rate, in one file read by position.

Decoding and resampling take minutes, an epoch should not. One pass over the recordings writes all
cycles as float32 into `<cache_dir>/waveforms-<key>/`; later runs open that at once. The key is a
hash of everything that the samples depend on, so a changed recording, annotation or setting makes
a new store, never a wrong one.

    samples.f32   the cycles one after another; cycle i begins at offsets[i]
    cycles.npy    [2, N] int64: offsets and lengths in samples (length 0: left out)
    index.json    what the store was made from, and the recordings that were left out

Where a cycle begins in the file follows from the annotations alone. So several processes can
write at once, and a build that was killed goes on where it stood (store_build.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from utils.common.errors import UserError

log = logging.getLogger(__name__)

#: Part of every key; raise it when samples or layout change.
STORE_VERSION = 1


@dataclass
class WaveformStore:
    """Cycles of a table as float32 samples; row numbers are those of the table.

    A cycle is read when it is asked for. A mapping of the whole file would show every cycle ever
    read as this process's memory, and mapping each by itself takes four times as long. Nothing
    stays open, so a store can be pickled and forked.

    Attributes:
        folder: where the store lies.
        lengths: [N] int64, samples of each cycle; 0 where `bad`.
        bad: [N] bool, cycles of recordings that were left out (on_bad_recording="skip" only).
        report: one line per recording that was left out.
    """

    folder: Path
    offsets: np.ndarray
    lengths: np.ndarray
    bad: np.ndarray
    report: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, cycle: int) -> np.ndarray:
        """Samples [lengths[cycle]] float32, an array of the caller's own."""
        out = np.empty((1, self.lengths[cycle]), np.float32)
        self.read(np.array([cycle]), out)
        return out[0]

    def read(self, cycles: np.ndarray, out: np.ndarray) -> None:
        """Copy the first samples of the cycles [n] into the rows of out [n, S] float32; what lies
        behind the end of a shorter cycle stays as it is.

        Raises:
            UserError: a cycle was left out, or the file is shorter than it was.
        """
        for cycle in cycles[self.bad[cycles]]:
            raise UserError(f"cycle {cycle} was left out of {self.folder}: {self.report}")
        sizes = np.minimum(self.lengths[cycles], out.shape[1])
        with (self.folder / "samples.f32").open("rb", buffering=0) as file:
            for row, start, size in zip(out, self.offsets[cycles], sizes, strict=True):
                file.seek(4 * int(start))
                if file.readinto(row[:size]) != 4 * size:
                    raise UserError(
                        f"{self.folder} is damaged (cut off); delete it and start again"
                    )


@dataclass
class StorePlan:
    """What a store of a table consists of, before any sound is read.

    Attributes:
        settings: what else the samples depend on.
        recordings: path of each recording, in the table's order of appearance.
        prints: (file name, size, mtime in ns) of each, or None where the file is not there.
        cycles: row numbers of each recording's cycles.
        starts, ends: [N] int64, first sample and the one after the last, at the working rate.
        offsets: [N] int64, where each cycle begins in the file.
    """

    settings: dict
    recordings: list[str]
    prints: list[tuple[str, int, int] | None]
    cycles: list[np.ndarray]
    starts: np.ndarray
    ends: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, table: pd.DataFrame, sample_rate: int, resampler: str) -> StorePlan:
        """Plan from a cycle table; reads the files' sizes and times, not the files."""
        starts = (table["CycleStart"].to_numpy(np.float64) * sample_rate).astype(np.int64)
        ends = (table["CycleEnd"].to_numpy(np.float64) * sample_rate).astype(np.int64)
        empty = np.flatnonzero((ends <= starts) | (starts < 0))
        if len(empty):
            row = table.iloc[empty[0]]
            raise UserError(
                f"cycle from {row.CycleStart} s to {row.CycleEnd} s of {row.Filename} is empty; "
                f"mend its annotation ({len(empty)} such cycles)"
            )
        groups = table.groupby("Recording", sort=False).indices
        if "" in groups:
            raise UserError("the cycle table was made without audio; read it with its recordings")
        sizes = ends - starts
        offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]) if len(sizes) else sizes
        recordings = list(groups)
        return cls(
            settings={
                "version": STORE_VERSION,
                "sample_rate": sample_rate,
                "resampler": resampler,
            },
            recordings=recordings,
            prints=[fingerprint(Path(path)) for path in recordings],
            cycles=[groups[path] for path in recordings],
            starts=starts,
            ends=ends,
            offsets=offsets,
        )

    def job(self, number: int) -> dict:
        """All that a worker must know to cut the cycles of one recording."""
        rows = self.cycles[number]
        return {
            "number": number,
            "path": self.recordings[number],
            "print": self.prints[number],
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
    def table_key(self) -> str:
        """Hash of settings, file names and cycles: all but the recordings' content."""
        names = [[Path(path).name, rows.tolist()] for path, rows in self._named()]
        digest = hashlib.sha256(json.dumps([self.settings, names]).encode())
        digest.update(self.starts.tobytes() + self.ends.tobytes())
        return digest.hexdigest()[:12]

    def _named(self):
        return zip(self.recordings, self.cycles, strict=True)

    @property
    def key(self) -> str:
        """Name of the store: hash of the table, then of the recordings' fingerprints."""
        content = hashlib.sha256(json.dumps(self.prints).encode()).hexdigest()[:12]
        return f"{self.table_key}-{content}"

    def find(self, cache_dir: Path) -> Path | None:
        """Finished store of this plan, if there is one.

        Recordings that are gone by now do not matter: any store of the same table will do whose
        other recordings are unchanged.
        """
        if None not in self.prints:
            folder = cache_dir / f"waveforms-{self.key}"
            return folder if folder.is_dir() else None
        missing = [p for p, print_ in zip(self.recordings, self.prints, strict=True) if not print_]
        for folder in sorted(cache_dir.glob(f"waveforms-{self.table_key}-????????????")):
            stored = [tuple(p) for p in _read_index(folder)["prints"]]
            pairs = zip(self.prints, stored, strict=True)
            if all(here is None or here == there for here, there in pairs):
                log.warning(
                    "%d recordings are gone (%s, ...); their cycles come from %s",
                    len(missing), missing[0], folder,
                )  # fmt: skip
                return folder
        raise UserError(
            f"{len(missing)} recordings are missing, the first is {missing[0]}; restore them or "
            f"leave them out of the table"
        )


def fingerprint(path: Path) -> tuple[str, int, int] | None:
    """Name, size and modification time: they change when the content does."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return path.name, stat.st_size, stat.st_mtime_ns


def _read_index(folder: Path) -> dict:
    try:
        return json.loads((folder / "index.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is damaged ({error}); delete it, it will be built again") from (
            error
        )


def open_folder(folder: Path, plan: StorePlan, on_bad_recording: str) -> WaveformStore:
    """Open a finished store and check it against its plan."""
    index = _read_index(folder)
    report = index["bad"]
    if report and on_bad_recording == "error":
        raise UserError(
            f"{len(report)} recordings can not be used; the first: {report[0]}. Mend or remove "
            f"them, or set dataset.on_bad_recording: skip"
        )
    try:
        offsets, lengths = np.load(folder / "cycles.npy")
        size = (folder / "samples.f32").stat().st_size
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is damaged ({error}); delete it, it will be built again"
        ) from error
    if len(lengths) != len(plan.starts) or size != 4 * plan.samples:
        raise UserError(f"{folder} is damaged (wrong size); delete it, it will be built again")
    bad = lengths == 0
    if report:
        log.warning("%d recordings (%d cycles) are left out", len(report), bad.sum())
    return WaveformStore(folder, offsets, lengths, bad, list(report))
