"""Metadata: the file `icbhi_metadata.csv`, and the numbers that models are conditioned on.

    python -m data.metadata --data-folder DIR --output FILE

writes the file from annotations and tables; no audio is needed.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from data.corpora.icbhi import read_cycles
from data.cycle_table import COLUMNS
from utils.common.cli import command
from utils.common.errors import UserError
from utils.common.files import write_text

log = logging.getLogger(__name__)

_TEXT = ("Filename", "Split", "Device", "Sex", "Disease", "AuscLoc")
_TOLERANCE = 1e-6  # of numbers in the file, in their own unit
_SHOWN = 5  # differing rows that an error names


def build_metadata(data_folder: str | Path) -> pd.DataFrame:
    """The rows of `icbhi_metadata.csv`, made from annotations and tables; no audio is needed.

    Raises:
        UserError: see `data.corpora.icbhi.read_cycles`.
    """
    return read_cycles(data_folder, require_audio=False)[list(COLUMNS)]


def read_cycles_and_metadata(
    data_folder: str | Path,
    path: str | Path | None,
    *,
    report: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """Cycle table of a folder, with the metadata file written if absent and checked if present.

    Args:
        data_folder: folder of recordings.
        path: `icbhi_metadata.csv`, whose Fold column is used; None: no file.
        report: as in `data.corpora.icbhi.read_cycles`; None raises at the first problem.

    Raises:
        UserError: the data are faulty, or the file differs from them.
    """
    problems: list[str] = []

    def leave_out(problem: str) -> None:
        problems.append(problem)
        report(problem)

    table = read_cycles(data_folder, **({"report": leave_out} if report else {}))
    if path is None:
        return table
    if Path(path).exists():
        return check_metadata(table, path, whole=not problems)
    if problems:  # the file would contradict the data as soon as they are repaired
        log.warning("%s is not written, because recordings were left out", path)
        return table
    try:
        write_metadata(table, path)
        log.info("wrote %s", path)
    except UserError as error:  # a data folder is often read-only; the table is in memory
        log.warning("%s; continuing without that file", error)
    return table


def write_metadata(table: pd.DataFrame, path: str | Path) -> None:
    """Write the table's `COLUMNS` as CSV, whole or not at all.

    Raises:
        UserError: the path can not be written.
    """
    write_text(path, table.to_csv(columns=list(COLUMNS), index=False, lineterminator="\n"))


def read_metadata(path: str | Path) -> pd.DataFrame:
    """Read `icbhi_metadata.csv`; missing text is None, missing numbers NaN.

    Raises:
        UserError: the file can not be read, or is not such a file.
    """
    path = Path(path)
    remedy = "remove the file, and it is written anew, or give another dataset.cycle_metadata_path"
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(_TEXT, str), encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # pandas' parser and decoding errors are ValueErrors
        raise UserError(f"{path}: can not be read as CSV ({error}); {remedy}") from error
    missing = [name for name in COLUMNS if name not in table.columns]
    if missing:
        raise UserError(f"{path}: column {', '.join(missing)} is missing; {remedy}")
    table = table[list(COLUMNS)].copy()
    for name in COLUMNS:
        if name in _TEXT:
            table[name] = table[name].astype(object).where(table[name].notna(), None)
            continue
        numbers = pd.to_numeric(table[name], errors="coerce")
        wrong = np.flatnonzero(numbers.isna() & table[name].notna())
        if len(wrong):
            raise UserError(
                f"{path}, row {wrong[0] + 2}: {name} is '{table[name].iloc[wrong[0]]}', "
                f"a number expected; {remedy}"
            )
        table[name] = numbers
    return table


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
    remedy = "correct it, or remove the file and it is written anew"
    keys = ["Filename", "CycleIndex"]
    twice = np.flatnonzero(file.duplicated(keys))
    if len(twice):
        raise UserError(f"{path}, row {twice[0] + 2}: the cycle is there twice; {remedy}")
    wanted = pd.MultiIndex.from_frame(table[keys])
    given = pd.MultiIndex.from_frame(file[keys])
    for lacking, where in (
        (wanted.difference(given), "annotated but not in the file"),
        (given.difference(wanted) if whole else [], "in the file but not annotated"),
    ):
        if len(lacking):
            first = ", ".join(f"{stem} cycle {index}" for stem, index in lacking[:_SHOWN])
            raise UserError(f"{path}: {len(lacking)} cycles are {where} ({first}); {remedy}")
    place = given.get_indexer(wanted)  # row of the file behind each row of the table
    aligned = file.iloc[place].reset_index(drop=True)
    differences = list(_differences(table, aligned, place))
    if differences:
        raise UserError(
            f"{path} differs from the annotations and tables in {len(differences)} values: "
            f"{'; '.join(differences[:_SHOWN])}; {remedy}"
        )
    return table.assign(Fold=_checked_folds(aligned, path, remedy))


def _differences(table: pd.DataFrame, file: pd.DataFrame, place: np.ndarray) -> Iterable[str]:
    found = []
    for name in COLUMNS:
        if name == "Fold":
            continue
        ours, theirs = table[name], file[name]
        same = (ours.isna() & theirs.isna()).to_numpy()
        if name in _TEXT:
            same = same | (ours == theirs).to_numpy()
        else:
            close = np.isclose(ours.to_numpy(float), theirs.to_numpy(float), 0, _TOLERANCE)
            same = same | close
        found += [(row, name, ours.iloc[row], theirs.iloc[row]) for row in np.flatnonzero(~same)]
    for row, name, ours, theirs in sorted(found, key=lambda entry: place[entry[0]]):
        yield (
            f"row {place[row] + 2} ({table['Filename'].iloc[row]}): {name} is {theirs}, "
            f"should be {ours}"
        )


def _checked_folds(file: pd.DataFrame, path: str | Path, remedy: str) -> np.ndarray:
    wrong = ~file["Fold"].isin(range(5))
    if wrong.any():
        first = file[wrong].iloc[0]
        raise UserError(
            f"{path}: Fold of {first['Filename']} is {first['Fold']}, 0..4 expected; {remedy}"
        )
    folds = file.groupby("PID")["Fold"].nunique()
    if (folds > 1).any():
        raise UserError(
            f"{path}: patient {folds.index[folds > 1][0]} is in more than one Fold; {remedy}"
        )
    return file["Fold"].to_numpy(np.int64)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m data.metadata", description=__doc__)
    parser.add_argument("--data-folder", required=True, help="annotations and tables (no audio)")
    parser.add_argument("--output", required=True, help="CSV file to write")
    options = parser.parse_args(arguments)
    table = build_metadata(options.data_folder)
    write_metadata(table, options.output)
    log.info(
        "%s: %d cycles of %d recordings and %d patients",
        *(options.output, len(table), table["Filename"].nunique(), table["PID"].nunique()),
    )


if __name__ == "__main__":
    sys.exit(main())
