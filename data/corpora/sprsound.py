"""SPRSound, the SJTU paediatric respiratory sound database -> one cycle table, one row per event.

Zhang et al., "SPRSound: Open-source SJTU paediatric respiratory sound database", IEEE TBioCAS 16
(2022); the release counts 2,683 recordings, 9,089 events and 292 children (IEEE DataPort,
doi 10.21227/nfkk-1x47). A recording is `patient_age_sex_location_number.wav` with a `.json` of the
same stem; the release keeps both in folders per year and part, so pairs are looked for anywhere
below the given folder. Events are not breathing cycles: they may overlap.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data.cycle_table import COLUMNS, Completeness, count_cycles
from data.splits import assign_folds
from utils.common.errors import UserError
from utils.common.readers import read_json

log = logging.getLogger(__name__)

DEVICE = "Yunting"
#: Location in the file name -> auscultation site as ICBHI names it; p5 to p8 (2024 on) are unknown.
SITES = {"p1": "Pl", "p2": "Ll", "p3": "Pr", "p4": "Lr"}
#: Event type -> (crackle, wheeze): continuous adventitious sounds are wheezes, discontinuous ones
#: crackles, as in ICBHI's two labels.
LABELS: dict[str, tuple[int, int]] = {
    "Normal": (0, 0),
    "Rhonchi": (0, 1),
    "Wheeze": (0, 1),
    "Stridor": (0, 1),
    "Coarse Crackle": (1, 0),
    "Fine Crackle": (1, 0),
    "Wheeze+Crackle": (1, 1),
}
FULL_COUNTS = {"recordings": 2683, "events": 9089, "patients": 292}


def _fail(problem: str) -> None:
    raise UserError(problem)


def read_sprsound(
    data_folder: str | Path,
    *,
    label_map: Mapping[str, tuple[int, int]] | None = None,
    report: Callable[[str], None] = _fail,
) -> pd.DataFrame:
    """Cycle table of a folder: `data.cycle_table.COLUMNS`, `Recording` and `Part`.

    Split is train or test where the path of the annotation says so, else empty; Part is the folder
    of the annotation relative to `data_folder`, such as
    `test_classification_json/2022/inter_test_json`. BMI, weight, height and disease are unknown.

    Args:
        data_folder: searched with all folders below it.
        label_map: event type -> (crackle, wheeze), replacing or extending `LABELS`.
        report: called with each problem; a function that returns makes the reader leave the
            faulty recording out.

    Raises:
        UserError: a file is missing or faulty, or there is none.
    """
    folder = Path(data_folder).expanduser()
    labels = LABELS | {name: tuple(bits) for name, bits in (label_map or {}).items()}
    annotations, audio = _stems(folder, ".json", report), _stems(folder, ".wav", report)
    if not annotations:
        raise UserError(f"{folder}: no .json annotation found there or below; set data_folder")
    for stem in sorted(annotations.keys() ^ audio.keys()):
        report(f"recording {stem} has no {'.wav' if stem in annotations else '.json'}; restore it")
    rows, empty, patients = [], 0, set()
    stems = sorted(annotations.keys() & audio.keys())
    for stem in stems:
        try:
            events = _recording(stem, annotations[stem], audio[stem], folder, labels)
        except UserError as error:
            report(str(error))
            continue
        empty += not events
        patients.add(stem.split("_")[0])
        rows += events
    log.info(
        "%d recordings of %d patients; %d have no event (poor quality) and are left out",
        *(len(stems), len(patients), empty),
    )
    if not rows:
        raise UserError(f"{folder}: no usable recording")
    table = pd.DataFrame(rows).sort_values(["Filename", "CycleIndex"], ignore_index=True)
    table["BMIDerived"] = table["BMI"]
    table["Fold"] = assign_folds(table)
    return table[[*COLUMNS, "Recording", "Part"]]


def completeness(table: pd.DataFrame) -> Completeness:
    """Compare a table with the release by its events: children without any are not in the table."""
    counts = count_cycles(table)
    events, children = counts["all_cycles"], counts["all_patients"]
    if events == FULL_COUNTS["events"]:
        return Completeness(False, "", counts)
    more = events > FULL_COUNTS["events"]  # the test part of 2023 came later
    message = (
        f"{'NOT THE 2022 RELEASE' if more else 'PARTIAL DATA'}: "
        f"{events:,} of {FULL_COUNTS['events']:,} SPRSound events, "
        f"{children} of {FULL_COUNTS['patients']} children; not comparable"
    )
    return Completeness(True, message, counts)


def _stems(folder: Path, suffix: str, report: Callable[[str], None]) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"data folder {folder} does not exist; set dataset.data_folder")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() == suffix and p.is_file())
    for stem, count in Counter(path.stem for path in paths).items():
        if count > 1:
            report(f"{stem}{suffix} is there {count} times below {folder}; keep one of them")
    return {path.stem: path for path in reversed(paths)}  # the first one of equal names


def _recording(
    stem: str, annotation: Path, audio: Path, folder: Path, labels: Mapping[str, tuple[int, int]]
) -> list[dict[str, Any]]:
    """Rows of one recording, in order of their start.

    Raises:
        UserError: the name or the annotation is faulty.
    """
    patient, age, sex, location = _parse_stem(stem, annotation)
    part = annotation.parent.relative_to(folder).as_posix()
    shared = {
        "PID": patient,
        "Filename": stem,
        "Split": _split(part),
        "Device": DEVICE,
        "Age": age,
        "Sex": sex,
        **dict.fromkeys(("BMI", "CW", "CH"), np.nan),
        "Disease": None,
        "AuscLoc": SITES.get(location),
        "Recording": str(audio),
        "Part": part,
    }
    rows = []
    for number, (start, end, kind) in enumerate(sorted(_events(annotation))):
        if kind not in labels:
            known = ", ".join(labels)
            raise UserError(
                f"{annotation}: event type {kind!r} is not known ({known}); give it a label in "
                "dataset.label_map"
            )
        crackle, wheeze = labels[kind]
        rows.append(
            shared
            | {
                "CycleIndex": number,
                "CycleStart": start,
                "CycleEnd": end,
                "Crackles": int(crackle),
                "Wheezes": int(wheeze),
                "Duration": round(end - start, 6),
            }
        )
    return rows


def _parse_stem(stem: str, path: Path) -> tuple[int, float, str, str]:
    parts = stem.split("_")
    try:
        patient, age, sex, location, _ = parts
        return int(patient), float(age), {"0": "M", "1": "F"}[sex], location
    except (ValueError, KeyError):
        raise UserError(
            f"{path}: the name is not patient_age_sex_location_number; rename or remove it"
        ) from None


def _events(path: Path) -> list[tuple[float, float, str]]:
    """(start s, end s, type) of an annotation file."""
    try:
        content = read_json(path, "restore it")
        events = [
            (float(e["start"]) / 1000, float(e["end"]) / 1000, str(e["type"]))
            for e in content["event_annotation"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no SPRSound annotation ({error}); restore it") from None
    for start, end, kind in events:
        if not 0 <= start < end:
            raise UserError(f"{path}: {kind} from {start} to {end} s has no extent; correct it")
    return events


def _split(part: str) -> str:
    """train | test by the folder's name; empty where it says neither."""
    name = part.lower()
    return "test" if "test" in name else "train" if "train" in name else ""
