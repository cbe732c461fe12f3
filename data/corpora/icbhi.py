"""A folder of ICBHI 2017 recordings -> one cycle table, one row per annotated breathing cycle.

Rocha et al., "An open access database for the evaluation of respiratory sound classification
algorithms", Physiological Measurement 40 (2019) 035001. The database is downloaded by the user;
`data.download` does it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

import pandas as pd

from data.corpora.icbhi_tables import (
    DEVICES,
    SITES,
    Demographics,
    RecordingName,
    parse_annotation,
    parse_demographics,
    parse_diagnosis,
    parse_name,
    parse_split,
)
from data.cycle_table import COLUMNS, Completeness, count_cycles, derive
from data.splits import assign_folds
from data.task import CLASSES
from utils.common.errors import UserError
from utils.common.readers import read_text

__all__ = ["DEVICES", "SITES", "completeness", "read_cycles"]

log = logging.getLogger(__name__)

BASE_URL = "https://bhichallenge.med.auth.gr/sites/default/files/ICBHI_final_database/"
#: Accepted names of each table, the official one first; in any letter case.
TABLES: dict[str, tuple[str, ...]] = {
    "split": ("ICBHI_challenge_train_test.txt",),
    "demographics": ("ICBHI_Challenge_demographic_information.txt", "demographic_info.txt"),
    "diagnosis": ("ICBHI_Challenge_diagnosis.txt", "patient_diagnosis.csv"),
}
SUBFOLDERS = ("ICBHI_final_database", "audio_and_txt_files", "recordings")
AUDIO_SUFFIXES = (".wav", ".flac")
#: Recordings whose device the split file spells differently: audio's name -> the split's name.
SPLIT_ALIASES = {"226_1b1_Pl_sc_LittC2SE": "226_1b1_Pl_sc_Meditron"}

#: What the whole database counts; classes are exclusive (a cycle with both is only in "both").
FULL_COUNTS: dict[str, int] = {
    f"{part}_{name}": count
    for part, counts in {
        "train": (4142, 539, 79, 2063, 1215, 501, 363),
        "test": (2756, 381, 49, 1579, 649, 385, 143),
        "all": (6898, 920, 126, 3642, 1864, 886, 506),
    }.items()
    for name, count in zip(("cycles", "recordings", "patients", *CLASSES), counts, strict=True)
}


def _fail(problem: str) -> NoReturn:
    raise UserError(problem)


def read_cycles(
    data_folder: str | Path,
    *,
    require_audio: bool = True,
    report: Callable[[str], None] = _fail,
) -> pd.DataFrame:
    """Cycle table of a folder: `data.cycle_table.COLUMNS` and `Recording`, path of the audio file.

    Audio and annotations lie in `data_folder` or in one of its `SUBFOLDERS`, the three tables
    there or in its parent. Rows are sorted by Filename, then CycleIndex (from 0).

    Args:
        data_folder: folder of recordings.
        require_audio: False makes the table from annotations alone; Recording is "" then.
        report: called with each problem; by default the first one raises. When it returns, the
            reader leaves the faulty recording out and continues.

    Raises:
        UserError: a file, row or table is missing or faulty.
    """
    folder = Path(data_folder).expanduser()
    if not folder.is_dir():
        _fail(
            f"data folder {folder} does not exist; set dataset.data_folder to the unpacked "
            "database (python -m data.download --output DIR fetches it)"
        )
    audio, annotations = find_recordings(folder, report)
    if not audio and (require_audio or not annotations):
        _fail(_no_audio(folder, bool(annotations)))
    if not annotations:
        _fail(f"{folder}: no annotation (.txt next to each .wav); unpack the whole database")
    parts = parse_table(folder, "split", parse_split)
    demographics = parse_table(folder, "demographics", parse_demographics)
    diagnosis = parse_table(folder, "diagnosis", parse_diagnosis)
    if require_audio:
        for stem in sorted(set(audio) ^ set(annotations)):
            path, missing = (
                (audio[stem], "annotation .txt")
                if stem in audio
                else (annotations[stem], "recording .wav")
            )
            report(f"{path} has no {missing} of the same name; restore it or remove this file")
    rows: list[dict] = []
    for stem in sorted(set(annotations) & set(audio) if require_audio else annotations):
        try:
            shared = _recording_columns(parse_name(stem), parts, demographics, diagnosis)
            cycles = parse_annotation(_text(annotations[stem]), str(annotations[stem]))
        except UserError as error:
            report(str(error))
            continue
        shared["Recording"] = str(audio[stem]) if require_audio else ""
        rows += [
            {**shared, "CycleIndex": index, "CycleStart": cycle.start, "CycleEnd": cycle.end,
             "Crackles": cycle.crackle, "Wheezes": cycle.wheeze}
            for index, cycle in enumerate(cycles)
        ]  # fmt: skip
    if not rows:
        _fail(f"{folder}: no usable recording; see the problems above")
    table = pd.DataFrame(rows).sort_values(["Filename", "CycleIndex"], ignore_index=True)
    table = derive(table.astype({"Age": float, "BMI": float, "CW": float, "CH": float}))
    return table.assign(Fold=assign_folds(table))[[*COLUMNS, "Recording"]]


def completeness(table: pd.DataFrame) -> Completeness:
    """Compare a cycle table's counts with the whole database's."""
    counts = count_cycles(table)
    if counts == FULL_COUNTS:
        return Completeness(False, "", counts)
    fewer = counts["all_recordings"] < FULL_COUNTS["all_recordings"]
    message = (
        f"{'PARTIAL DATA' if fewer else 'NOT THE ICBHI 2017 COUNTS'}: "
        f"{counts['all_recordings']:,} of 920 recordings, {counts['all_cycles']:,} of 6,898 "
        "cycles; not comparable"
    )
    return Completeness(True, message, counts)


def find_table(folder: Path, kind: str) -> Path | None:
    """Path of the table `kind` (a key of `TABLES`), or None; its names in any letter case."""
    parent = folder.resolve().parent
    places = [*_places(folder), *([parent] if os.access(parent, os.R_OK) else [])]
    for place in places:
        files = {path.name.lower(): path for path in _listing(place, "is_file")}
        for name in TABLES[kind]:
            if name.lower() in files:
                return files[name.lower()]
    return None


def parse_table(folder: Path, kind: str, parse: Callable[[str, str], dict]) -> dict:
    """Find, read and parse one of the three tables.

    Raises:
        UserError: it is missing or faulty.
    """
    path = find_table(folder, kind)
    if path is None:
        names = TABLES[kind]
        also = f" (or {names[1]})" if len(names) > 1 else ""
        _fail(
            f"{folder}: the {kind} table {names[0]}{also} is missing there and in its parent; "
            f"download it from {BASE_URL}{names[0]}"
        )
    return parse(_text(path), str(path))


def _text(path: Path) -> str:
    return read_text(path, "restore the original file", fallback="latin-1")


def find_recordings(
    folder: Path, report: Callable[[str], None] = _fail
) -> tuple[dict[str, Path], dict[str, Path]]:
    """(audio, annotations), each {stem: path}, of the folder and its `SUBFOLDERS`.

    An annotation has a recording's name (five tokens between underscores) or that of a recording
    that is there; other text files, such as <recording>_events.txt, are ignored.
    """
    audio: dict[str, Path] = {}
    texts: dict[str, Path] = {}
    for place in _places(folder):
        for path in _listing(place, "is_file"):
            suffix = path.suffix.lower()
            if suffix in AUDIO_SUFFIXES:
                found = audio
            elif suffix == ".txt" and path.stem.split("_")[0].isdigit():
                found = texts
            else:
                continue
            if path.stem in found:
                report(
                    f"recording {path.stem} is there twice, as {found[path.stem]} and as {path}; "
                    "remove one of them"
                )
            else:
                found[path.stem] = path
    ignored = [p for stem, p in texts.items() if stem.count("_") != 4 and stem not in audio]
    if ignored:
        _mention(f"{len(ignored)} text files are no annotations, the first is {ignored[0]}")
    return audio, {stem: path for stem, path in texts.items() if path not in ignored}


@lru_cache
def _mention(message: str) -> None:
    log.warning("%s", message)  # once per process, however often the folder is read


def _recording_columns(
    name: RecordingName,
    parts: dict[str, str],
    demographics: dict[int, Demographics],
    diagnosis: dict[int, str | None],
) -> dict:
    """Columns that all cycles of a recording share."""
    part = parts.get(name.stem, parts.get(SPLIT_ALIASES.get(name.stem, "")))
    if part is None:
        _fail(
            f"recording {name.stem} is not named in {TABLES['split'][0]}; add the row "
            f"'{name.stem}<TAB>train' or '...<TAB>test' to it, or remove the recording"
        )
    for table, kind in ((demographics, "demographics"), (diagnosis, "diagnosis")):
        if name.pid not in table:
            _fail(
                f"patient {name.pid} of recording {name.stem} is not in the {kind} table "
                f"{TABLES[kind][0]}; add a row (NA where nothing is known) or download it again"
            )
    patient = demographics[name.pid]
    return {
        "PID": name.pid,
        "Filename": name.stem,
        "Split": part,
        "Device": name.device,
        "Age": patient.age,
        "Sex": patient.sex,
        "BMI": patient.bmi,
        "CW": patient.weight,
        "CH": patient.height,
        "Disease": diagnosis[name.pid],
        "AuscLoc": name.site,
    }


def _no_audio(folder: Path, annotated: bool) -> str:
    zips = [path.name for path in _listing(folder, "is_file") if path.suffix.lower() == ".zip"]
    if zips:
        return f"{folder}: no .wav found, but {zips[0]}; unpack it there (unzip {zips[0]})"
    found = "annotations but no .wav" if annotated else "no .wav and no annotation"
    return (
        f"{folder}: {found} found there or in {' or '.join(SUBFOLDERS)}; set dataset.data_folder "
        "to the folder with the recordings (python -m data.download --output DIR fetches them "
        f"from {BASE_URL})"
    )


def _places(folder: Path) -> list[Path]:
    """The folder and those of its `SUBFOLDERS` that are there."""
    names = {name.lower() for name in SUBFOLDERS}
    return [folder, *(path for path in _listing(folder, "is_dir") if path.name.lower() in names)]


def _listing(folder: Path, kind: str) -> list[Path]:
    """Sorted entries for which `os.DirEntry.<kind>()` holds, hidden ones left out."""
    try:
        with os.scandir(folder) as entries:
            found = [e.path for e in entries if getattr(e, kind)() and not e.name.startswith(".")]
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be listed ({error.strerror}); check its permissions"
        ) from error
    return sorted(map(Path, found))
