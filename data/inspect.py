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

from data.corpora.icbhi import completeness, find_recordings, read_cycles
from data.cycle_table import classes_of
from data.splits import patients_in_both_halves, split_cycles
from data.store import StorePlan
from data.store_build import cut_cycles
from data.task import CLASSES
from utils.common.cli import command
from utils.common.errors import UserError

WIDTH = 100  # columns of the text
PARTS = ("train", "test")
_SHOWN = 50  # problems that are printed

WIDTH = 100  # columns of the report


def inspect_folder(data_folder: str | Path) -> tuple[pd.DataFrame, list[str]]:
    """Read as much of the folder as can be read.

    Returns:
        the cycle table of the recordings without fault, and one sentence per problem.

    Raises:
        UserError: there is no folder, no table or no usable recording at all.
    """
    problems: list[str] = []
    folder = Path(data_folder)
    has_audio = folder.is_dir() and bool(find_recordings(folder, lambda problem: None)[0])
    table = read_cycles(folder, require_audio=has_audio, report=problems.append)
    if has_audio:
        plan = StorePlan.of(table, 16000, "soxr_hq")
        for number in tqdm(range(len(plan.recordings)), "decode", disable=None, ncols=WIDTH):
            try:
                silent = cut_cycles(plan.job(number))[1]
            except UserError as error:
                problems.append(str(error))
                continue
            if silent:
                problems.append(
                    f"{plan.recordings[number]}: {silent} cycles are silent throughout, which "
                    "training takes as they are; get the recording again or remove them"
                )
    return table, problems


def describe(table: pd.DataFrame, problems: Sequence[str]) -> str:
    """The whole report, lines of at most `WIDTH` columns."""
    state = completeness(table)
    names = ("cycles", "recordings", "patients", *CLASSES)
    counts = [[state.counts[f"{part}_{name}"] for name in names] for part in (*PARTS, "all")]
    by_class = pd.DataFrame(counts, ["official train", "official test", "all"], names)
    d = table["Duration"].to_numpy()
    low, median, high = np.percentile(d, (5, 50, 95))
    columns = ["Age", "Sex", "BMI", "CW", "CH", "Disease", "BMIDerived"]
    missing = pd.DataFrame({"cycles": table[columns].isna().sum()})
    missing["patients"] = [table.loc[table[name].isna(), "PID"].nunique() for name in columns]
    listed = [f"- {problem}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        listed.append(f"- and {len(problems) - _SHOWN} more")
    sections = {
        "": state.message or "Complete: all counts are those of the ICBHI 2017 database.",
        "Cycles by part and class": _text(by_class),
        "Cycles by device": _by_value(table, "Device"),
        "Cycles by auscultation site": _by_value(table, "AuscLoc"),
        "Cycle length": (
            f"min {d.min():.3f}, 5 % {low:.3f}, median {median:.3f}, mean {d.mean():.2f}, "
            f"95 % {high:.3f}, max {d.max():.3f} s\n"
            f"{(d > 10).sum()} cycles are longer than 10 s; {d.sum() / 3600:.2f} h in total"
        ),
        "Missing metadata": _text(missing),
        "Recordings": _audio(table),
        "Traps of the split": "\n".join(f"- {trap}" for trap in traps(table)),
        "Parts under the default protocol": _parts(table),
        "Problems": "\n".join(listed) or "none found",
    }
    blocks = (f"{title}\n{'-' * len(title)}\n{text}".lstrip() for title, text in sections.items())
    return "\n\n".join(_wrapped(block) for block in blocks)


def traps(table: pd.DataFrame) -> list[str]:
    """Sentences on what makes this split easy to misread."""
    found = ["No patient is in both halves."]
    test = table[table["Split"] == "test"]
    if both := patients_in_both_halves(table):
        shared = int(test["PID"].isin(both).sum())
        found = [
            f"Patients {', '.join(map(str, both))} are in both halves ({shared} of {len(test):,} "
            f"test cycles); split_strategy official_disjoint leaves {len(test) - shared:,}."
        ]
    abnormal = classes_of(table) > 0
    for device in sorted(table["Device"].dropna().unique()):
        rows = [((table["Device"] == device) & (table["Split"] == part)) for part in PARTS]
        train, test = (int(part.sum()) for part in rows)
        if (train == 0) != (test == 0):
            empty = "train" if train == 0 else "test"
            found.append(f"{device} has no {empty} cycle ({train + test:,} in the other).")
        elif train:
            shares = [100 * abnormal[part].mean() for part in rows]
            if abs(shares[0] - shares[1]) >= 20:
                found.append(
                    f"{device} is {shares[0]:.1f} % abnormal in train ({train:,} cycles) and "
                    f"{shares[1]:.1f} % in test ({test:,}): what the device says about the class "
                    "changes between the halves."
                )
    single = (table.groupby("PID")["Device"].nunique() == 1).sum()
    patients = table.drop_duplicates("PID")
    pairs = patients.dropna(subset=["Age", "BMIDerived"]).groupby(["Age", "BMIDerived"]).size()
    found.append(
        f"{single} of {len(patients)} patients have one device only and {(pairs == 1).sum()} have "
        "an (age, BMI) pair of their own: metadata is nearly a patient id."
    )
    return found


def _by_value(table: pd.DataFrame, column: str) -> str:
    table = table.assign(abnormal=100.0 * (classes_of(table) > 0))
    frame = pd.DataFrame(index=sorted(table[column].dropna().unique()))
    for part in PARTS:
        groups = table[table["Split"] == part].groupby(column)
        for name, counts in (("cycles", groups.size()), ("patients", groups["PID"].nunique())):
            frame[f"{part} {name}"] = counts.reindex(frame.index, fill_value=0)
        frame[f"{part} abn. %"] = groups["abnormal"].mean()
    return _text(frame)


def _audio(table: pd.DataFrame) -> str:
    kinds = []
    for path in filter(None, table["Recording"].unique()):
        try:
            info = soundfile.info(path)
        except (OSError, RuntimeError):
            continue  # one of the problems below
        kinds.append(f"{info.samplerate} Hz, {info.subtype}, {info.channels} channel(s)")
    counts = pd.Series(kinds, dtype=object).value_counts().sort_index()
    lines = [f"{count:>5}  {kind}" for kind, count in counts.items()]
    return "\n".join(lines) or "no audio here: annotations only"


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
    columns = ["cycles", "patients", *CLASSES]
    return _text(pd.DataFrame.from_dict(rows, orient="index", columns=columns))


def _text(frame: pd.DataFrame) -> str:
    return frame.to_string(float_format=lambda x: f"{x:.1f}", na_rep="-", line_width=WIDTH)


def _wrapped(text: str) -> str:
    lines: list[str] = []
    for line in text.split("\n"):
        indent = "  " if line.startswith("- ") else ""
        lines += textwrap.wrap(line, WIDTH, subsequent_indent=indent, drop_whitespace=True) or [""]
    return "\n".join(lines)


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
