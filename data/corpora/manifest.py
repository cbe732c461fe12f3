"""One's own recordings: a CSV with one row per cycle -> the cycle table.

Columns `file, start, end, crackle, wheeze, patient` are required; `device, site, age, bmi, sex,
split, recording` are optional, and an empty cell is unknown. Times in s, age in years, BMI in
kg/m2, split train or test; paths are relative to the CSV. Any names of devices and sites will do:
the vocabulary comes from the training rows.

    python -m data.corpora.manifest --icbhi DIR --output FILE.csv

writes the manifest of an ICBHI folder, and FILE.yaml, the configuration that reads it.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile

from data.corpora.icbhi import read_cycles
from data.cycle_table import COLUMNS
from data.splits import assign_folds
from utils.common.cli import command
from utils.common.errors import UserError
from utils.common.files import write_text
from utils.common.readers import read_csv

log = logging.getLogger(__name__)

REQUIRED = ("file", "start", "end", "crackle", "wheeze", "patient")
OPTIONAL = ("device", "site", "age", "bmi", "sex", "split", "recording")
#: Column of the manifest -> column of the cycle table.
NAMES = {
    "patient": "PID",
    "start": "CycleStart",
    "end": "CycleEnd",
    "crackle": "Crackles",
    "wheeze": "Wheezes",
    "split": "Split",
    "device": "Device",
    "age": "Age",
    "sex": "Sex",
    "bmi": "BMI",
    "site": "AuscLoc",
    "recording": "Filename",
    "duration": "Duration",
}
#: Number that a user may know -> lowest and highest accepted value: years, kg/m2.
NUMBERS = {"age": (0.0, 130.0), "bmi": (1.0, 150.0)}
_TOLERANCE = 0.01  # s, a cycle may end this much after the recording


def read_manifest(
    path: str | Path,
    *,
    allow_shared_patients: bool = False,
    allow_overlaps: bool = False,
    check_audio: bool = True,
) -> pd.DataFrame:
    """Cycle table of a manifest: `data.cycle_table.COLUMNS` and `Recording`.

    Args:
        path: CSV file.
        allow_shared_patients: accept patients in both halves (a warning names them).
        allow_overlaps: accept cycles of a recording that overlap, as events do.
        check_audio: open every recording's header to check that its cycles lie inside.

    Raises:
        UserError: the file or a row is faulty; the row and the remedy are named.
    """
    path = Path(path).expanduser()
    rows = read_rows(path)
    where = Where(path)
    check_cells(rows, where, ("start", "end"))
    _check_times(rows, where)
    files = _resolved(rows["file"], path)
    if check_audio:
        _check_audio(rows, files, where)
    rows["recording"] = rows["recording"].where(rows["recording"] != "", _stems(rows["file"]))
    _check_recordings(rows, files, where)
    if not allow_overlaps:
        _check_overlaps(rows, where)
    check_halves(rows, where, allow_shared_patients)
    rows["duration"] = (rows["end"] - rows["start"]).round(6)
    rows["Recording"] = [files[name] for name in rows["file"]]
    return cycle_table(rows.sort_values(["recording", "start", "end"], kind="stable"))


def cycle_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Checked rows of a manifest in their final order -> `COLUMNS` and every capitalised column."""
    table = rows.rename(columns=NAMES).reset_index(drop=True)
    for name in ("Device", "AuscLoc", "Sex"):
        table[name] = table[name].astype(object).where(table[name] != "", None)
    if rows["patient"].str.fullmatch("0|[1-9][0-9]{0,17}").all():
        table["PID"] = table["PID"].astype(np.int64)  # as ICBHI's: equal data are split equally
    table["CycleIndex"] = table.groupby("Filename").cumcount()
    table = table.assign(CW=np.nan, CH=np.nan, Disease=None, BMIDerived=table["BMI"])
    table["Fold"] = assign_folds(table)
    return table[[*COLUMNS, *(n for n in table if n[0].isupper() and n not in COLUMNS)]]


class Where(str):
    """Names a row of the manifest in an error."""

    def __new__(cls, path: Path):
        return super().__new__(cls, path)

    def fail(self, row: int, problem: str) -> None:
        raise UserError(f"{self}, row {row + 2}: {problem}")

    def refuse(self, bad: np.ndarray | pd.Series, problem) -> None:
        """Fail at the first True of `bad` [N]; problem: a text, or a function of the row."""
        found = np.flatnonzero(bad)
        if len(found):
            row = int(found[0])
            self.fail(row, problem(row) if callable(problem) else problem)


def read_rows(
    path: Path, required: Sequence[str] = REQUIRED, optional: Sequence[str] = OPTIONAL
) -> pd.DataFrame:
    """The cells of a manifest as text, one column per name, "" where empty or absent."""
    if not path.is_file():
        raise UserError(f"no manifest {path}; set dataset.data_folder to a CSV file")
    rows = read_csv(path, "save it as UTF-8 CSV", dtype=str, keep_default_na=False)
    rows = rows.rename(columns=str.strip)
    missing = [name for name in required if name not in rows]
    if missing and ";" in "".join(rows):
        raise UserError(f"{path} is separated by semicolons; save it with commas")
    if missing:
        raise UserError(f"{path} lacks the column {', '.join(missing)}; add it")
    unknown = sorted(set(rows) - {*required, *optional})
    if unknown:
        log.warning("%s: columns without a meaning here: %s", path, ", ".join(unknown))
    if rows.empty:
        raise UserError(f"{path} has no rows; write one per breathing cycle")
    rows = rows.reindex(columns=[*required, *optional], fill_value="")
    return rows.apply(lambda column: column.str.strip())


def check_cells(rows: pd.DataFrame, where: Where, needed: Sequence[str]) -> None:
    """Numbers become numbers, labels 0 or 1; each fault names its row.

    Args:
        needed: number columns that may not be empty.
    """
    where.refuse(rows["patient"] == "", "patient is empty; fill it in")
    for name in {*needed, "age", "bmi", "duration"} & set(rows):
        to_number(rows, where, name, needed=name in needed)
    for name in ("crackle", "wheeze"):
        text = rows[name]
        bad = ~text.isin(["0", "1"])
        where.refuse(bad, lambda row, n=name, t=text: f"{n} is {t[row]!r}; write 0 or 1")
        rows[name] = text.astype(int)
    rows["split"] = rows["split"].str.lower()
    bad = ~rows["split"].isin(["train", "test", ""])
    where.refuse(bad, lambda row: f"split is {rows['split'][row]!r}; write train, test or nothing")
    some = rows["split"] != ""
    if some.any():
        where.refuse(~some, "split is empty here but not in other rows; fill in all or none")


def to_number(rows: pd.DataFrame, where: Where, name: str, needed: bool) -> None:
    """A column of text becomes float64, NaN where empty; `needed`: it may not be."""
    text, (low, high) = rows[name], NUMBERS.get(name, (-np.inf, np.inf))
    values = pd.to_numeric(text, errors="coerce").astype(float)
    wrong = ~np.isfinite(values) & ((text != "") | needed)
    where.refuse(wrong, lambda row: f"{name} is {text[row]!r}; a number is needed")
    outside = (values < low) | (values > high)
    where.refuse(outside, lambda row: f"{name} is {text[row]}, outside {low:g}..{high:g}; "
                                      "correct it")  # fmt: skip
    rows[name] = values


def _check_times(rows: pd.DataFrame, where: Where) -> None:
    where.refuse(rows["file"] == "", "file is empty; fill it in")
    where.refuse(
        (rows["start"] < 0) | (rows["end"] <= rows["start"]),
        lambda row: (
            f"the cycle runs from {rows['start'][row]:g} to {rows['end'][row]:g} s; "
            "correct it: the start is at least 0, and the end after the start"
        ),
    )
    twice = rows.duplicated(["file", "start", "end"])
    where.refuse(twice, "the same cycle stands in an earlier row; remove one")


def _resolved(names: pd.Series, path: Path) -> dict[str, str]:
    """File cell -> path, relative to the manifest."""
    outside = [name for name in names.unique() if ".." in Path(name).parts]
    if outside:
        log.warning("%s: files that lie outside its folder (..): %d", path, len(outside))
    files, first, where = {}, {}, Where(path)
    for row, name in names.drop_duplicates().items():
        if Path(name).is_absolute():
            where.fail(row, f"{name} is an absolute path; write it relative to the CSV")
        files[name] = str(path.parent / name)
        if (other := first.setdefault(os.path.realpath(files[name]), name)) != name:
            where.fail(row, f"{name} is the file {other} of an earlier row; write one name for it")
    return files


def _stems(names: pd.Series) -> pd.Series:
    return names.map(lambda name: Path(name).with_suffix("").as_posix())


def _check_audio(rows: pd.DataFrame, files: dict[str, str], where: Where) -> None:
    lengths = {}
    for row, name in rows["file"].drop_duplicates().items():
        file = files[name]
        if not Path(file).is_file():
            where.fail(row, f"there is no file {file}; correct the path or remove the row")
        try:
            lengths[name] = soundfile.info(file).duration
        except (soundfile.LibsndfileError, RuntimeError) as error:
            where.fail(row, f"{file} cannot be read as audio ({error}); convert it to wav")
    length = rows["file"].map(lengths)
    where.refuse(
        rows["end"] > length + _TOLERANCE,
        lambda row: (
            f"the cycle ends at {rows['end'][row]:g} s, after the end of the recording "
            f"({length[row]:.3f} s); correct it"
        ),
    )


def _check_recordings(rows: pd.DataFrame, files: dict[str, str], where: Where) -> None:
    """A recording is one file of one patient."""
    for name in ("file", "patient"):
        per = rows.groupby("recording")[name].transform("nunique")
        where.refuse(
            per > 1,
            lambda row, n=name: (
                f"recording {rows['recording'][row]} has more than one {n}; correct the rows or "
                "name the recordings differently"
            ),
        )


def _check_overlaps(rows: pd.DataFrame, where: Where) -> None:
    ordered = rows.sort_values(["file", "start", "end"])
    previous = ordered.groupby("file")["end"].shift()
    late = ordered.index[(ordered["start"] < previous - 1e-9).to_numpy()]
    if len(late):
        where.fail(
            int(late[0]),
            "the cycle overlaps an earlier one of the same recording; correct the times, or set "
            "dataset.allow_overlaps=true for events",
        )


def check_halves(rows: pd.DataFrame, where: Where, allowed: bool) -> None:
    halves = rows.groupby("patient")["split"].transform("nunique")
    shared = sorted(rows.loc[halves > 1, "patient"].unique())
    if shared and not allowed:
        where.fail(
            int(np.flatnonzero(halves > 1)[0]),
            f"patient {shared[0]} is in train and in test ({len(shared)} in all); separate them, "
            "or set dataset.allow_shared_patients=true",
        )
    if shared:
        log.warning("patients in both halves: %s", ", ".join(shared))


def write_icbhi_manifest(data_folder: str | Path, output: str | Path) -> Path:
    """ICBHI's own manifest, with derived BMI, and the YAML that reads it.

    Returns:
        path of the YAML file.
    """
    output = Path(output)
    table = read_cycles(data_folder)
    folder = output.resolve().parent
    files = [os.path.relpath(Path(p).resolve(), folder) for p in table["Recording"]]
    rows = pd.DataFrame({name: table[column] for name, column in NAMES.items()})
    rows = rows.assign(file=files, bmi=table["BMIDerived"])
    write_text(output, rows[[*REQUIRED, *OPTIONAL]].to_csv(index=False, lineterminator="\n"))
    yaml = output.with_suffix(".yaml")
    write_text(
        yaml,
        "# ICBHI read through its manifest; patients 156 and 218 are in both halves.\n"
        "dataset:\n  name: manifest\n"
        f"  data_folder: {output}\n  cycle_metadata_path: null\n  allow_shared_patients: true\n",
    )
    return yaml


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m data.corpora.manifest", description=__doc__)
    parser.add_argument("--icbhi", required=True, metavar="DIR", help="folder of the database")
    parser.add_argument("--output", required=True, metavar="FILE.csv", help="manifest to write")
    options = parser.parse_args(arguments)
    yaml = write_icbhi_manifest(options.icbhi, options.output)
    print(f"wrote {options.output} and {yaml}")


if __name__ == "__main__":
    sys.exit(main())
