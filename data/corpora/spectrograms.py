"""Ready-made spectrograms: one array and a manifest whose `row` stands for file, start and end.

A corpus is a folder with `spectrograms.npy`, [cycles, bands, frames] of any number type, and
`manifest.csv` with the columns `row, crackle, wheeze, patient` and, optionally, `device, site,
age, bmi, sex, split, recording, duration` (s). There is no sound: store and front end are
replaced, waveform augmentation is off, SpecAugment stays.

    python -m data.corpora.spectrograms --from DIR --output DIR

unpacks a folder that holds the array xz-compressed (`*.npy.xz`, uint8 levels of 80 dB below the
cycle's maximum) with an `index.csv` into such a corpus, and writes its configuration, corpus.yaml.
"""

from __future__ import annotations

import argparse
import lzma
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data.corpora.manifest import (
    NAMES,
    OPTIONAL,
    Where,
    check_cells,
    check_halves,
    cycle_table,
    read_rows,
)
from data.cycle_table import Completeness, count_cycles, derive
from utils.common.cli import command
from utils.common.errors import UserError
from utils.common.files import atomic_write, write_text
from utils.common.readers import read_csv

ARRAY, MANIFEST, YAML = "spectrograms.npy", "manifest.csv", "corpus.yaml"
CONFIGURATION = """\
# Ready-made spectrograms of {bands} bands x {frames} frames; stack it on a variant's configuration.
dataset:
  name: spectrograms
  data_folder: {folder}
  cycle_metadata_path: null
  allow_shared_patients: true   # said wherever there are any
  h: {bands}
  w: {frames}

models:
  "*":
    input_fdim: {bands}
    input_tdim: {frames}
"""
REQUIRED = ("row", "crackle", "wheeze", "patient")


def read_spectrograms(folder: str | Path, *, allow_shared_patients: bool = False) -> pd.DataFrame:
    """Cycle table of a spectrogram corpus: `COLUMNS` and `Row`, place in the array.

    CycleStart is 0 and CycleEnd the duration; both and Duration are NaN where it is not given.

    Raises:
        UserError: the manifest or the array is missing or faulty.
    """
    path = Path(folder).expanduser() / MANIFEST
    rows, where = read_rows(path, REQUIRED, (*OPTIONAL, "duration")), Where(path)
    check_cells(rows, where, ("row",))
    total = len(open_array(path.parent))
    outside = (rows["row"] < 0) | (rows["row"] >= total) | (rows["row"] % 1 != 0)
    where.refuse(outside, lambda n: f"row is {rows['row'][n]:g}; the array has 0 to {total - 1}")
    where.refuse(rows["row"].duplicated(), "the same row of the array stands above; remove one")
    check_halves(rows, where, allow_shared_patients)
    unnamed = rows["recording"] == ""
    rows["recording"] = rows["recording"].where(~unnamed, "row " + rows["row"].astype(int).map(str))
    rows = rows.rename(columns={"row": "Row"}).astype({"Row": np.int64})
    rows = rows.assign(start=0.0 * rows["duration"], end=rows["duration"])
    rows["Recording"] = str(path.parent / ARRAY)  # its content is part of a run's fingerprint
    return cycle_table(rows)


def open_array(folder: str | Path) -> np.ndarray:
    """The array [cycles, bands, frames] of a corpus, mapped from the disk.

    Raises:
        UserError: it is missing, damaged, or of another shape.
    """
    path = Path(folder).expanduser() / ARRAY
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}); unpack or write it again") from None
    if array.ndim != 3 or array.dtype.kind not in "iuf":
        raise UserError(f"{path} is {array.dtype} {array.shape}; [cycles, bands, frames] is needed")
    return array


def completeness(table: pd.DataFrame) -> Completeness:
    """Whatever its counts, a table of ready-made spectrograms is not comparable with audio."""
    counts = count_cycles(table)
    message = f"READY-MADE SPECTROGRAMS: {counts['all_cycles']:,} cycles without audio; "
    return Completeness(True, message + "not comparable with figures on audio", counts)


@dataclass
class SpectrogramStore:
    """Spectrograms of a cycle table's rows.

    Attributes:
        arrays: [cycles, bands, frames] each, on disk; one per corpus, all of one size.
        source: [N] int64, in which array each row of the table lies.
        rows: [N] int64, its place there.
        mean, std: of the training rows' values; `read` returns (x - mean) / (2 std), the scale
            that the waveform front end has.
    """

    arrays: list[np.ndarray]
    source: np.ndarray
    rows: np.ndarray
    mean: float = 0.0
    std: float = 0.5

    @classmethod
    def of(cls, table: pd.DataFrame) -> SpectrogramStore:
        """The spectrograms of a cycle table with the columns Recording and Row.

        Raises:
            UserError: an array is missing or damaged, or two differ in size.
        """
        source, paths = pd.factorize(table["Recording"])
        arrays = [open_array(Path(path).parent) for path in paths]
        for path, array in zip(paths, arrays, strict=True):
            if array.shape[1:] != arrays[0].shape[1:]:
                sizes = [" x ".join(map(str, one.shape[1:])) for one in (arrays[0], array)]
                raise UserError(
                    f"{paths[0]} has spectrograms of {sizes[0]}, {path} of {sizes[1]}; parts must "
                    "have the same bands and frames"
                )
        return cls(arrays, source, table["Row"].to_numpy(np.int64))

    @property
    def shape(self) -> tuple[int, int]:
        """(bands, frames)."""
        return self.arrays[0].shape[1:]

    def __len__(self) -> int:
        return len(self.rows)

    def level(self, train: np.ndarray) -> tuple[float, float]:
        """Mean and standard deviation of the values of the given rows [n].

        Raises:
            UserError: the training rows hold a value that is not finite, or one value only.
        """
        total, squares, count = 0.0, 0.0, 0
        for start in range(0, len(train), 256):
            values = self._values(train[start : start + 256]).astype(np.float64)
            total, count = total + values.sum(), count + values.size
            squares += np.square(values).sum()
        mean = total / max(count, 1)
        variance = squares / max(count, 1) - mean**2
        if not np.isfinite(variance) or variance <= 0:
            raise UserError("the training spectrograms are constant or not finite; check the array")
        return float(mean), float(np.sqrt(variance))

    def _values(self, cycles: np.ndarray) -> np.ndarray:
        """[n, bands, frames] float32."""
        out = np.empty((len(cycles), *self.shape), np.float32)
        for number, array in enumerate(self.arrays):
            here = self.source[cycles] == number
            out[here] = array[self.rows[cycles[here]]]
        return out

    def read(self, cycles: np.ndarray) -> np.ndarray:
        """Normalised spectrograms [n, bands, frames] float32 of the given rows of the table."""
        values = self._values(cycles)
        return (values - np.float32(self.mean)) / np.float32(2 * self.std)


def unpack(source: str | Path, output: str | Path) -> Path:
    """Unpack an xz-compressed array with its `index.csv` into a corpus folder.

    Raises:
        UserError: a file is missing or not what it should be.
    """
    source, output = Path(source), Path(output)
    packed = sorted(source.glob("*.npy.xz"))
    if len(packed) != 1 or not (source / "index.csv").is_file():
        raise UserError(f"{source} does not hold one .npy.xz and an index.csv")
    index = read_csv(source / "index.csv", "copy it again")
    renamed = {"crackles": "crackle", "wheezes": "wheeze", "split_official": "split"}
    missing = {*renamed, "recording", "cycle_index", "start", "end", "patient"} - set(index)
    if missing:
        raise UserError(f"{source / 'index.csv'} lacks {', '.join(sorted(missing))}; copy it again")
    columns = {"start": "CycleStart", "end": "CycleEnd", "bmi": "BMI"}
    columns |= {"child_weight": "CW", "child_height": "CH"}
    derived = derive(index.rename(columns=columns).reindex(columns=columns.values()))
    table = index.rename(columns=renamed).assign(
        row=np.arange(len(index)), duration=derived["Duration"], bmi=derived["BMIDerived"]
    )
    table = table.sort_values(["recording", "cycle_index"])
    names = dict.fromkeys((*REQUIRED, *NAMES))
    names = [name for name in names if name in table and name not in ("start", "end")]
    output.mkdir(parents=True, exist_ok=True)
    try:
        with lzma.open(packed[0]) as file, atomic_write(output / ARRAY) as target:
            shutil.copyfileobj(file, target, 1 << 20)
    except (lzma.LZMAError, EOFError) as error:
        raise UserError(f"{packed[0]} is damaged ({error}); copy it again") from None
    if len(open_array(output)) != len(table):
        raise UserError(f"{packed[0]} and index.csv differ in length")
    write_text(output / MANIFEST, table[names].to_csv(index=False, lineterminator="\n"))
    return output


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data.corpora.spectrograms", description=__doc__
    )
    parser.add_argument("--from", dest="source", required=True, metavar="DIR")
    parser.add_argument("--output", required=True, metavar="DIR", help="corpus folder to write")
    options = parser.parse_args(arguments)
    folder = unpack(options.source, options.output)
    bands, frames = open_array(folder).shape[1:]
    write_text(folder / YAML, CONFIGURATION.format(folder=folder, bands=bands, frames=frames))
    print(f"wrote {folder}; stack {folder / YAML} on a variant's configuration to train on it")


if __name__ == "__main__":
    sys.exit(main())
