"""Metadata: the file `icbhi_metadata.csv`, and the numbers that models are conditioned on.

    python -m data.metadata --data-folder DIR --output FILE

writes the file from annotations and tables; no audio is needed.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from data.batch import DEVICES, FIELDS, SCALARS, SITES, Metadata
from utils.cli import command
from utils.errors import UserError
from utils.files import write_text

log = logging.getLogger(__name__)

#: Columns of `icbhi_metadata.csv`, in order. Times and Duration in s, Age in years, BMI and
#: BMIDerived in kg/m2, CW (child weight) in kg, CH (child height) in cm; empty = missing.
COLUMNS: tuple[str, ...] = (
    *("PID", "Filename", "CycleIndex", "CycleStart", "CycleEnd", "Crackles", "Wheezes"),
    *("Split", "Device", "Fold", "Age", "Sex", "BMI", "CW", "CH", "Disease", "AuscLoc"),
    *("Duration", "BMIDerived"),
)
_TEXT = ("Filename", "Split", "Device", "Sex", "Disease", "AuscLoc")
_TOLERANCE = 1e-6  # of numbers in the file, in their own unit
_SHOWN = 5  # differing rows that an error names
#: Column of the cycle table behind each of `data.batch.SCALARS`.
SCALAR_COLUMNS: tuple[str, ...] = ("Age", "BMIDerived", "Duration")


def build_metadata(data_folder: str | Path) -> pd.DataFrame:
    """The rows of `icbhi_metadata.csv`, made from annotations and tables; no audio is needed.

    Raises:
        UserError: see `data.icbhi.read_cycles`.
    """
    from data.icbhi import read_cycles  # here, because the reader itself uses this module

    return read_cycles(data_folder, require_audio=False)[list(COLUMNS)]


def derive_bmi(table: pd.DataFrame) -> pd.Series:
    """BMI [N], kg/m2: the adult value, else weight / (height / 100)^2 within 10..60, else NaN."""
    derived = table["CW"] / (table["CH"] / 100.0) ** 2
    return table["BMI"].fillna(derived.where(derived.between(10.0, 60.0)).round(6))


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


#: What was warned of already, (statistics, unseen value): loading, floors and figures of one run
#: all transform its table.
_told: set[tuple[MetadataStatistics, str]] = set()


@dataclass(frozen=True)
class MetadataStatistics:
    """What the training cycles say about the metadata; all that evaluation needs of them.

    Scalars stand in the order of `data.batch.SCALARS` (age years, BMI kg/m2, duration s). A
    missing value is imputed with `medians` and then z-scored like any other, and counts as known:
    the imputed value is what a model sees in training and at evaluation alike. (An unknown scalar,
    z = 0, is for evaluation with a field hidden, see `Metadata.without`.) Whether the BMI was
    known says the table: BMIDerived is NaN where not.

    Attributes:
        medians: of the known training values, after the derivation of BMI.
        mean, std: of the training cycles after imputation (population form); std is 1 where the
            training cycles do not differ.
        device_counts: training cycles per device, the last entry counts the unknown ones.
        site_counts: the same per site.
    """

    medians: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device_counts: tuple[int, ...]
    site_counts: tuple[int, ...]

    @classmethod
    def fit(cls, train_table: pd.DataFrame) -> MetadataStatistics:
        """Statistics of the training cycles (rows of the cycle table)."""
        values = _scalars(train_table)  # [N, 3]
        medians = [
            float(np.median(v[~np.isnan(v)])) if (~np.isnan(v)).any() else 0.0 for v in values.T
        ]  # a scalar that is never known is 0 everywhere, z = 0
        values = np.where(np.isnan(values), medians, values)
        std = values.std(axis=0)
        std[std < 1e-6 * np.maximum(np.abs(values).max(axis=0), 1.0)] = 1.0
        return cls(
            medians=tuple(medians),
            mean=tuple(values.mean(axis=0).tolist()),
            std=tuple(std.tolist()),
            device_counts=_counts(_indices(train_table["Device"], DEVICES), DEVICES),
            site_counts=_counts(_indices(train_table["AuscLoc"], SITES), SITES),
        )

    def transform(self, table: pd.DataFrame) -> Metadata:
        """`Metadata` of all N rows of a cycle table.

        A device or site that is missing, not in the vocabulary or never seen in training becomes
        unknown, with one warning that names it: a process that transforms again says no more.
        """
        values = _scalars(table)
        values = np.where(np.isnan(values), self.medians, values)
        device, device_note = _seen(table["Device"], DEVICES, self.device_counts, "device")
        site, site_note = _seen(table["AuscLoc"], SITES, self.site_counts, "site")
        notes = {
            name: n for name, n in (device_note | site_note).items() if (self, name) not in _told
        }
        if notes:
            named = "; ".join(f"{name} ({n} cycles)" for name, n in notes.items())
            log.warning("not seen in training, treated as unknown: %s", named)
            _told.update((self, name) for name in notes)
        known = np.ones((len(table), len(FIELDS)), bool)
        known[:, 0] = device < len(DEVICES)
        known[:, 1] = site < len(SITES)
        rest = (values - np.array(self.mean)) / np.array(self.std)
        return Metadata(
            device=torch.from_numpy(device),
            site=torch.from_numpy(site),
            rest=torch.from_numpy(rest.astype(np.float32)),
            known=torch.from_numpy(known),
        )

    def to_dict(self) -> dict:
        """Plain lists, numbers and strings, fit for `torch.load(weights_only=True)` and JSON."""
        return {
            "scalars": list(SCALARS),
            "medians": list(self.medians),
            "mean": list(self.mean),
            "std": list(self.std),
            "devices": list(DEVICES),
            "device_counts": list(self.device_counts),
            "sites": list(SITES),
            "site_counts": list(self.site_counts),
        }

    @classmethod
    def from_dict(cls, content: dict) -> MetadataStatistics:
        """Inverse of `to_dict`.

        Raises:
            UserError: it was made with another vocabulary, or is incomplete.
        """
        remedy = "use a checkpoint written by this version of the code"
        for key, expected in (("scalars", SCALARS), ("devices", DEVICES), ("sites", SITES)):
            if content.get(key) != list(expected):
                raise UserError(
                    f"metadata statistics: {key} is {content.get(key)}, {list(expected)} "
                    f"expected; {remedy}"
                )
        numbers = {}
        for key, length in (("medians", 3), ("mean", 3), ("std", 3),
                            ("device_counts", 5), ("site_counts", 8)):  # fmt: skip
            value = content.get(key)
            least = {"std": 1e-9, "device_counts": 0, "site_counts": 0}.get(key, -math.inf)
            if (
                not isinstance(value, list)
                or len(value) != length
                or not all(isinstance(x, int | float) and math.isfinite(x) for x in value)
                or min(value) < least
            ):
                raise UserError(f"metadata statistics: {key} is not {length} numbers; {remedy}")
            numbers[key] = tuple(value)
        return cls(**numbers)


def _scalars(table: pd.DataFrame) -> np.ndarray:
    """[N, 3] float64, columns `SCALAR_COLUMNS`; NaN where missing or not finite."""
    values = table[list(SCALAR_COLUMNS)].to_numpy(np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _indices(names: pd.Series, vocabulary: Sequence[str]) -> np.ndarray:
    """[N] int64 into the vocabulary, its length for anything else."""
    index = {name: number for number, name in enumerate(vocabulary)}
    return np.array([index.get(name, len(vocabulary)) for name in names], np.int64)


def _counts(indices: np.ndarray, vocabulary: Sequence[str]) -> tuple[int, ...]:
    return tuple(np.bincount(indices, minlength=len(vocabulary) + 1).tolist())


def _seen(
    names: pd.Series, vocabulary: Sequence[str], counts: Sequence[int], field: str
) -> tuple[np.ndarray, dict[str, int]]:
    """(indices with the unseen ones mapped to unknown, cycles by what the warning names)."""
    indices = _indices(names, vocabulary)
    unknown = len(vocabulary)
    trained = np.array([*(count > 0 for count in counts[:unknown]), False])
    unseen = ~trained[indices]
    shown = names[unseen].map(lambda name: name if isinstance(name, str) else "missing")
    notes = {f"{field} {name}": n for name, n in shown.value_counts().items()}
    return np.where(unseen, unknown, indices), notes


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
