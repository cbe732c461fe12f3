"""The one table that every corpus gives: one row per breathing cycle, and its file.

ICBHI's file is `icbhi_metadata.csv`: written where it is absent, checked where it is present.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from data.task import CLASSES
from utils.common.errors import UserError
from utils.common.files import write_text
from utils.common.readers import read_csv

#: Columns of the file, in order. Times and Duration in s, Age in years, BMI and BMIDerived in
#: kg/m2, CW (child weight) in kg, CH (child height) in cm; empty = missing. Tables in memory also
#: have `Recording`, the path of the audio file ("" where the table was made without audio).
COLUMNS: tuple[str, ...] = (
    *("PID", "Filename", "CycleIndex", "CycleStart", "CycleEnd", "Crackles", "Wheezes"),
    *("Split", "Device", "Fold", "Age", "Sex", "BMI", "CW", "CH", "Disease", "AuscLoc"),
    *("Duration", "BMIDerived"),
)
#: The last two follow from the others; files without them are completed.
DERIVED = ("Duration", "BMIDerived")
#: Column of the cycle table behind each of `data.batch.SCALARS`.
SCALAR_COLUMNS: tuple[str, ...] = ("Age", "BMIDerived", "Duration")

_TEXT = ("Filename", "Split", "Device", "Sex", "Disease", "AuscLoc")
_KEYS = ["Filename", "CycleIndex"]
_TOLERANCE = 1e-6  # of numbers in the file, in their own unit
_SHOWN = 5  # differing values that an error names
_REMEDY = "correct it, or remove the file to have it written again"


def classes_of(table: pd.DataFrame) -> np.ndarray:
    """[N] int64, index into `data.task.CLASSES` of each cycle."""
    return (table["Crackles"] + 2 * table["Wheezes"]).to_numpy(np.int64)


def derive(table: pd.DataFrame) -> pd.DataFrame:
    """The table with Duration (s, to the microsecond) and BMIDerived (kg/m2).

    BMIDerived is the adult's BMI, else weight / (height / 100)^2 within 10..60, else NaN.
    """
    duration = (table["CycleEnd"] - table["CycleStart"]).round(6)
    child = table["CW"] / (table["CH"] / 100.0) ** 2
    bmi = table["BMI"].fillna(child.where(child.between(10.0, 60.0)).round(6))
    return table.assign(Duration=duration, BMIDerived=bmi)


def write_metadata(table: pd.DataFrame, path: str | Path) -> None:
    """Write the table's `COLUMNS` as CSV, atomically.

    Raises:
        UserError: the path cannot be written.
    """
    write_text(path, table.to_csv(columns=list(COLUMNS), index=False, lineterminator="\n"))


def read_metadata(path: str | Path) -> pd.DataFrame:
    """Read a metadata file; missing text is None, missing numbers NaN.

    The 17 columns that the paper's authors publish are enough; `DERIVED` are computed.

    Raises:
        UserError: the file cannot be read, or is not such a file.
    """
    file = read_csv(path, _REMEDY, dtype=dict.fromkeys(_TEXT, str))
    if missing := [name for name in COLUMNS if name not in (*file.columns, *DERIVED)]:
        raise UserError(f"{path}: column {', '.join(missing)} is missing; {_REMEDY}")
    table = file[[name for name in COLUMNS if name in file.columns]].copy()
    for name in table.columns:
        if name in _TEXT:
            table[name] = table[name].astype(object).where(table[name].notna(), None)
            continue
        numbers = pd.to_numeric(table[name], errors="coerce")
        wrong = np.flatnonzero(numbers.isna() & table[name].notna())
        if len(wrong):
            raise UserError(
                f"{path}, row {wrong[0] + 2}: {name} is '{table[name].iloc[wrong[0]]}', "
                f"a number expected; {_REMEDY}"
            )
        table[name] = numbers
    derived = derive(table)
    return table.assign(**{n: derived[n] for n in DERIVED if n not in table})[list(COLUMNS)]


def check_metadata(table: pd.DataFrame, path: str | Path, *, whole: bool = True) -> pd.DataFrame:
    """Compare the file with the table made from annotations; take its Fold column.

    Fold is the file's own: a published assignment stays what it was. All else must agree.

    Args:
        whole: False when faulty recordings were left out of the table; the file may know them.

    Returns:
        `table` with the file's folds.

    Raises:
        UserError: rows are missing, too many or different; the first ones are named.
    """
    file = read_metadata(path)
    twice = np.flatnonzero(file.duplicated(_KEYS))
    if len(twice):
        raise UserError(f"{path}, row {twice[0] + 2}: the cycle is there twice; {_REMEDY}")
    expected, given = (pd.MultiIndex.from_frame(frame[_KEYS]) for frame in (table, file))
    for missing, where in (
        (expected.difference(given), "annotated but not in the file"),
        (given.difference(expected) if whole else [], "in the file but not annotated"),
    ):
        if len(missing):
            first = ", ".join(f"{stem} cycle {index}" for stem, index in missing[:_SHOWN])
            raise UserError(f"{path}: {len(missing)} cycles are {where} ({first}); {_REMEDY}")
    place = given.get_indexer(expected)  # row of the file behind each row of the table
    aligned = file.iloc[place].reset_index(drop=True)
    if differences := list(_differences(table, aligned, place)):
        raise UserError(
            f"{path} differs from the annotations and tables in {len(differences)} values: "
            f"{'; '.join(differences[:_SHOWN])}; {_REMEDY}"
        )
    wrong = aligned[~aligned["Fold"].isin(range(5))]
    if len(wrong):
        stem, fold = wrong.iloc[0][["Filename", "Fold"]]
        raise UserError(f"{path}: Fold of {stem} is {fold}, 0..4 expected; {_REMEDY}")
    folds = aligned.groupby("PID")["Fold"].nunique()
    if (folds > 1).any():
        pid = folds.index[folds > 1][0]
        raise UserError(f"{path}: patient {pid} is in more than one Fold; {_REMEDY}")
    return table.assign(Fold=aligned["Fold"].to_numpy(np.int64))


def _differences(table: pd.DataFrame, file: pd.DataFrame, place: np.ndarray) -> Iterator[str]:
    """Sentences on the values that differ, in the file's order of rows."""
    found = []
    for name in COLUMNS:
        ours, theirs = table[name], file[name]
        same = (ours.isna() & theirs.isna()).to_numpy()
        if name in _TEXT:
            same = same | (ours == theirs).to_numpy()
        else:
            same = same | np.isclose(ours.astype(float), theirs.astype(float), 0, _TOLERANCE)
        if name != "Fold":
            found += [(place[row], row, name) for row in np.flatnonzero(~same)]
    for number, row, name in sorted(found):
        yield (
            f"row {number + 2} ({table['Filename'].iloc[row]}): {name} is {file[name].iloc[row]}, "
            f"should be {table[name].iloc[row]}"
        )


class Completeness(NamedTuple):
    """How a cycle table compares with the whole corpus.

    Attributes:
        partial: True when the corpus is not all there, or not what published figures are made on.
        message: one line for a prominent warning; empty when nothing is missing.
        counts: this table's counts, as `count_cycles` gives them.
    """

    partial: bool
    message: str
    counts: dict[str, int]


def count_cycles(table: pd.DataFrame) -> dict[str, int]:
    """Cycles, recordings, patients and cycles per class of the published halves and of all."""
    classes = classes_of(table)
    counts: dict[str, int] = {}
    for part in ("train", "test", "all"):
        here = slice(None) if part == "all" else (table["Split"] == part).to_numpy()
        rows = table[here]
        counts[f"{part}_cycles"] = len(rows)
        counts[f"{part}_recordings"] = int(rows["Filename"].nunique())
        counts[f"{part}_patients"] = int(rows["PID"].nunique())
        for number, name in enumerate(CLASSES):
            counts[f"{part}_{name}"] = int((classes[here] == number).sum())
    return counts
