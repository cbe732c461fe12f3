"""What a folder of ICBHI recordings holds, what is missing, and what is wrong with it.

    python -m data.inspect --data-folder DIR

Prints counts by split, class, device and site, durations, missing metadata, the traps of the
split and every problem found; exit status 1 when there are problems, 2 when nothing can be read.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
from tqdm import tqdm

from data.audio import read_recording, silent_cycles
from data.batch import DEVICES, SITES
from data.corpora.icbhi import completeness, find_recordings, read_cycles
from data.splits import classes_of, patients_in_both_halves, split_cycles
from data.store_build import END_TOLERANCE
from data.task import CLASSES
from utils.common.cli import command
from utils.common.errors import UserError

WIDTH = 100  # columns of the text
PARTS = ("train", "test")
_SHOWN = 50  # problems that are printed


def inspect_folder(data_folder: str | Path) -> tuple[pd.DataFrame, list[str]]:
    """Read as much of the folder as can be read.

    Returns:
        the cycle table of the recordings without fault, and one sentence per problem.

    Raises:
        UserError: there is no folder, no table or no usable recording at all.
    """
    problems: list[str] = []
    has_audio = Path(data_folder).is_dir() and bool(find_recordings(Path(data_folder), _ignore)[0])
    table = read_cycles(data_folder, require_audio=has_audio, report=problems.append)
    if has_audio:
        problems += audio_problems(table)
    return table, problems


def audio_problems(table: pd.DataFrame) -> list[str]:
    """Decode every recording and say what is wrong, with the verdicts that training would give."""
    problems = []
    recordings = table.groupby("Recording", sort=True)[["CycleStart", "CycleEnd"]]
    for path, cycles in tqdm(recordings, "decode", disable=None, ncols=WIDTH):
        try:
            samples, rate = read_recording(path)
        except UserError as error:
            problems.append(str(error))
            continue
        (starts, ends), seconds = cycles.to_numpy().T, len(samples) / rate
        if ends.max() > seconds + END_TOLERANCE or starts.max() >= seconds:
            problems.append(
                f"{path} lasts {seconds:.3f} s, but its annotation ends at {ends.max():.3f} s; "
                "unpack the recording again or correct the annotation"
            )
        elif muted := silent_cycles(samples, rate, starts, ends):
            problems.append(
                f"{path}: {muted} cycles are silent throughout (equal samples), which training "
                "takes as they are; get the recording again or remove them from the annotation"
            )
    return problems


def describe(table: pd.DataFrame, problems: Sequence[str]) -> str:
    """The whole report, lines of at most `WIDTH` columns."""
    state = completeness(table)
    sections = [
        ("", state.message or "Complete: all counts are those of the ICBHI 2017 database."),
        ("Cycles by part and class", _by_class(table)),
        ("Cycles by device", _by_value(table, "Device", DEVICES)),
        ("Cycles by auscultation site", _by_value(table, "AuscLoc", SITES)),
        ("Cycle length", _durations(table)),
        ("Missing metadata", _missing(table)),
        ("Recordings", _audio(table)),
        ("Traps of the split", "\n".join(f"- {trap}" for trap in traps(table))),
        ("Parts under the default protocol", _parts(table)),
        ("Problems", "\n".join(_listed(problems)) or "none found"),
    ]
    blocks = [f"{title}\n{'-' * len(title)}\n{text}" if title else text for title, text in sections]
    return "\n\n".join(_wrapped(block) for block in blocks)


def traps(table: pd.DataFrame) -> list[str]:
    """Sentences on what makes this split easy to misread."""
    found = []
    both = patients_in_both_halves(table)
    test = table[table["Split"] == "test"]
    if both:
        shared = int(test["PID"].isin(both).sum())
        found.append(
            f"Patients {', '.join(map(str, both))} are in both halves ({shared} of {len(test):,} "
            f"test cycles); split_strategy official_disjoint leaves {len(test) - shared:,}."
        )
    else:
        found.append("No patient is in both halves.")
    abnormal = classes_of(table) > 0
    for device in DEVICES:
        rows = {part: ((table["Device"] == device) & (table["Split"] == part)) for part in PARTS}
        counts = {part: int(rows[part].sum()) for part in PARTS}
        if 0 in counts.values() and any(counts.values()):
            empty = next(part for part in PARTS if counts[part] == 0)
            found.append(f"{device} has no {empty} cycle ({sum(counts.values()):,} in the other).")
        elif all(counts.values()):
            share = {part: 100 * abnormal[rows[part]].mean() for part in PARTS}
            if abs(share["train"] - share["test"]) >= 20:
                found.append(
                    f"{device} is {share['train']:.1f} % abnormal in train ({counts['train']:,} "
                    f"cycles) and {share['test']:.1f} % in test ({counts['test']:,}): what the "
                    "device tells about the class changes between the halves."
                )
    single = (table.groupby("PID")["Device"].nunique() == 1).sum()
    patients = table.drop_duplicates("PID")
    pairs = patients.dropna(subset=["Age", "BMIDerived"]).groupby(["Age", "BMIDerived"]).size()
    found.append(
        f"{single} of {len(patients)} patients have one device only and {(pairs == 1).sum()} have "
        "an (age, BMI) pair of their own: metadata is nearly a patient id."
    )
    return found


def _by_class(table: pd.DataFrame) -> str:
    counts = completeness(table).counts
    names = ("cycles", "recordings", "patients", *CLASSES)
    rows = {
        name: [counts[f"{part}_{key}"] for key in names]
        for name, part in (("official train", "train"), ("official test", "test"), ("all", "all"))
    }
    return _text(pd.DataFrame.from_dict(rows, orient="index", columns=names))


def _by_value(table: pd.DataFrame, column: str, vocabulary: Sequence[str]) -> str:
    abnormal = pd.Series(classes_of(table) > 0, index=table.index)
    frame = pd.DataFrame(index=list(vocabulary))
    for part in PARTS:
        rows = table["Split"] == part
        groups = table[rows].groupby(column)
        frame[f"{part} cycles"] = groups.size()
        frame[f"{part} patients"] = groups["PID"].nunique()
        frame[f"{part} abn. %"] = 100 * abnormal[rows].groupby(table[column]).mean()
    counts = [name for name in frame.columns if not name.endswith("%")]
    frame[counts] = frame[counts].fillna(0).astype(int)
    return _text(frame)


def _durations(table: pd.DataFrame) -> str:
    d = table["Duration"].to_numpy()
    low, median, high = np.percentile(d, (5, 50, 95))
    return (
        f"min {d.min():.3f}, 5 % {low:.3f}, median {median:.3f}, mean {d.mean():.2f}, "
        f"95 % {high:.3f}, max {d.max():.3f} s\n"
        f"{(d > 10).sum()} cycles are longer than 10 s; {d.sum() / 3600:.2f} h in total"
    )


def _missing(table: pd.DataFrame) -> str:
    columns = ["Age", "Sex", "BMI", "CW", "CH", "Disease", "BMIDerived"]
    absent = table[columns].isna()
    frame = pd.DataFrame({"cycles": absent.sum()})
    frame["patients"] = [table.loc[absent[name], "PID"].nunique() for name in columns]
    return _text(frame)


def _audio(table: pd.DataFrame) -> str:
    paths = [path for path in table["Recording"].unique() if path]
    if not paths:
        return "no audio here: annotations only"
    kinds = []
    for path in paths:
        try:
            info = soundfile.info(path)
        except (OSError, RuntimeError):
            continue  # one of the problems below
        kinds.append(f"{info.samplerate} Hz, {info.subtype}, {info.channels} channel(s)")
    counts = pd.Series(kinds, dtype=object).value_counts().sort_index()
    return "\n".join(f"{count:>5}  {kind}" for kind, count in counts.items())


def _parts(table: pd.DataFrame) -> str:
    try:
        split = split_cycles(table)
    except UserError as error:
        return str(error)
    rows = {}
    for name in ("train", "val", "test"):
        part = table.iloc[getattr(split, name)]
        classes = np.bincount(classes_of(part), minlength=len(CLASSES))
        rows[name] = [len(part), part["PID"].nunique(), *classes]
    return _text(
        pd.DataFrame.from_dict(rows, orient="index", columns=["cycles", "patients", *CLASSES])
    )


def _listed(problems: Sequence[str]) -> list[str]:
    lines = [f"- {problem}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"- and {len(problems) - _SHOWN} more")
    return lines


def _text(frame: pd.DataFrame) -> str:
    return frame.to_string(float_format=lambda x: f"{x:.1f}", na_rep="-", line_width=WIDTH)


def _wrapped(text: str) -> str:
    lines: list[str] = []
    for line in text.split("\n"):
        indent = "  " if line.startswith("- ") else ""
        lines += textwrap.wrap(line, WIDTH, subsequent_indent=indent, drop_whitespace=True) or [""]
    return "\n".join(lines)


def _ignore(problem: str) -> None:
    pass  # the reader itself reports it


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 when there are problems."""
    parser = argparse.ArgumentParser(prog="python -m data.inspect", description=__doc__)
    parser.add_argument("--data-folder", required=True, help="recordings, annotations, tables")
    options = parser.parse_args(arguments)
    table, problems = inspect_folder(options.data_folder)
    print(describe(table, problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
