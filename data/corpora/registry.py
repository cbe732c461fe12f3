"""Corpora: from files to the one cycle table (`data.cycle_table`).

A corpus is one module here and one entry in `CORPORA`: a function (section `dataset`, report) ->
cycle table with the column Recording, and its devices and sites in the order of their embeddings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from data.config import DatasetConfig
from data.corpora import icbhi, manifest, spectrograms, sprsound
from data.cycle_table import Completeness, check_metadata, count_cycles, write_metadata
from utils.common.errors import UserError

log = logging.getLogger(__name__)


class Corpus(NamedTuple):
    """What the rest of the code needs to know of a corpus.

    Attributes:
        read: (section `dataset`, report=...) -> cycle table; calls `report` with each problem.
        completeness: cycle table -> how it compares with the whole corpus.
        devices, sites: vocabularies, whose order is part of every checkpoint; None: the names
            that the training rows have, in alphabetical order.
    """

    read: Callable[..., pd.DataFrame]
    completeness: Callable[[pd.DataFrame], Completeness]
    devices: tuple[str, ...] | None = None
    sites: tuple[str, ...] | None = None


def _read_icbhi(dataset: DatasetConfig, **report) -> pd.DataFrame:
    return icbhi.read_cycles(dataset.data_folder, **report)


def _read_manifest(dataset: DatasetConfig, **_) -> pd.DataFrame:
    return manifest.read_manifest(
        dataset.data_folder,
        allow_shared_patients=dataset.allow_shared_patients,
        allow_overlaps=dataset.allow_overlaps,
    )


def _read_sprsound(dataset: DatasetConfig, **report) -> pd.DataFrame:
    return sprsound.read_sprsound(dataset.data_folder, label_map=dataset.label_map, **report)


def _read_spectrograms(dataset: DatasetConfig, **_) -> pd.DataFrame:
    table = spectrograms.read_spectrograms(
        dataset.data_folder, allow_shared_patients=dataset.allow_shared_patients
    )
    if dataset.split_strategy == "recordings" and table["Filename"].str.startswith("row ").any():
        raise UserError(
            f"{dataset.data_folder}: dataset.split_strategy=recordings needs to know the recording "
            "of every row; fill the manifest's column recording"
        )
    return table


def _read_parts(dataset: DatasetConfig, **report) -> pd.DataFrame:
    """The parts' tables one after the other; Number, Corpus, Role and OwnSplit say where from."""
    tables = []
    for number, part in enumerate(dataset.parts):
        keys = asdict(part)
        role, label = keys.pop("role"), keys.pop("label") or part.name
        one = replace(dataset, parts=[], cycle_metadata_path=None, **keys)
        table = CORPORA[part.name].read(one, **report)
        if role == "official" and not table["Split"].isin(["train", "test"]).all():
            raise UserError(
                f"dataset.parts[{number}].role=official cannot be: {part.data_folder} does not "
                "say which cycles train and which test; give it the role train, val or test"
            )
        own = table["Split"]
        tables.append(
            table.assign(
                PID=f"{label}:" + table["PID"].map(str),
                Filename=f"{label}:" + table["Filename"],
                Split=own if role == "official" else role,
                **{"Number": number, "Corpus": part.name, "Role": role, "OwnSplit": own},
            )
        )
    table = pd.concat([one.astype(object) for one in tables], ignore_index=True)
    table = table.astype({name: kind for one in tables for name, kind in one.dtypes.items()})
    for column, what in (("Filename", "recording"), ("PID", "patient")):
        found = table.groupby(column)[["Number", "Split"]].nunique()
        bad = (found["Number"] > 1) & ((found["Split"] > 1) | (column == "Filename"))
        if bad.any() and (what == "recording" or not dataset.allow_shared_patients):
            numbers = table.loc[table[column] == bad.idxmax(), "Number"].unique()
            raise UserError(
                f"{what} {bad.idxmax()} is in dataset.parts[{numbers[0]}] and [{numbers[1]}]; "
                "leave it out of one, or give the parts different labels if they are two"
            )
    return table


def _complete_parts(table: pd.DataFrame) -> Completeness:
    parts = []
    for _, rows in table.groupby("Number"):
        first = rows.iloc[0]
        own = CORPORA[first["Corpus"]].completeness(rows.assign(Split=rows["OwnSplit"])).message
        label = first["Filename"].split(":")[0]
        remark = f"; {own.split(';')[0]}" if own else ""
        parts.append(f"{label} as {first['Role']}, {len(rows):,} cycles{remark}")
    message = f"SEVERAL CORPORA: {' + '.join(parts)}; not comparable with figures on one"
    return Completeness(True, message, count_cycles(table))


def _complete(table: pd.DataFrame) -> Completeness:
    return Completeness(False, "", count_cycles(table))


CORPORA: dict[str, Corpus] = {
    "icbhi": Corpus(_read_icbhi, icbhi.completeness, icbhi.DEVICES, icbhi.SITES),
    "manifest": Corpus(_read_manifest, _complete),
    "sprsound": Corpus(_read_sprsound, sprsound.completeness),
    "spectrograms": Corpus(_read_spectrograms, spectrograms.completeness),
    "parts": Corpus(_read_parts, _complete_parts),
}


def read_corpus(
    dataset: DatasetConfig, report: Callable[[str], None] | None = None
) -> pd.DataFrame:
    """Cycle table of a configuration, its metadata file written if absent, else checked.

    Args:
        report: called with each problem, whose recording is left out; by default the first one
            raises, or is a warning under `on_bad_recording: skip`.

    Raises:
        UserError: the data are faulty, or the metadata file differs from them.
    """
    if report is None and dataset.on_bad_recording == "skip":
        report = log.warning
    problems: list[str] = []

    def leave_out(problem: str) -> None:
        problems.append(problem)
        report(problem)

    read, path = CORPORA[dataset.name].read, dataset.cycle_metadata_path
    table = read(dataset, **({"report": leave_out} if report else {}))
    if path is None or dataset.name != "icbhi":  # the file is ICBHI's
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
