"""Corpora: from files to the one cycle table (`data.cycle_table`).

A corpus is one module here and one entry in `READERS`: a function (folder, report) -> cycle table
with the column Recording, and the names of its devices and sites in the order of their embeddings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from data.config import DatasetConfig
from data.corpora import icbhi
from data.cycle_table import check_metadata, write_metadata
from utils.common.errors import UserError

log = logging.getLogger(__name__)


class Corpus(NamedTuple):
    """What the rest of the code needs to know of a corpus.

    Attributes:
        read: (folder, report=...) -> cycle table; calls `report` with each problem.
        devices, sites: vocabularies; their order is part of every checkpoint.
    """

    read: Callable[..., pd.DataFrame]
    devices: tuple[str, ...]
    sites: tuple[str, ...]


CORPORA: dict[str, Corpus] = {"icbhi": Corpus(icbhi.read_cycles, icbhi.DEVICES, icbhi.SITES)}


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
    table = read(dataset.data_folder, **({"report": leave_out} if report else {}))
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
