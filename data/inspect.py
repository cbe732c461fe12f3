"""What a corpus holds, what is missing, and what is wrong with it.

    python -m data.inspect --data-folder DIR                           ICBHI
    python -m data.inspect --corpus FILE.yaml [dataset.key=value ...]  any (configs/corpora/)

Prints counts by part, class, device and site, durations, sampling rates, missing metadata, the
traps of the split and every problem found; exit status 1 when there are problems, 2 when nothing
can be read. `python -m utils.figures.data_overview` draws the same.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
from tqdm import tqdm

from data.config import DatasetConfig, read_dataset
from data.corpora.icbhi import find_recordings, read_cycles
from data.corpora.registry import CORPORA, read_corpus
from data.corpora.spectrograms import SpectrogramStore
from data.cycle_table import classes_of
from data.splits import patients_in_both_halves, split_by
from data.store import StorePlan
from data.store_build import cut_cycles
from data.task import CLASSES
from utils.common.cli import command
from utils.common.errors import UserError

WIDTH = 100  # columns of the report
PARTS = ("train", "val", "test")
_SHOWN = 50  # problems that are printed


def inspect_corpus(dataset: DatasetConfig) -> tuple[pd.DataFrame, list[str]]:
    """Read as much of a corpus as can be read; of ICBHI the annotations are enough.

    Returns:
        the cycle table of the recordings without fault, and one sentence per problem.

    Raises:
        UserError: no usable recording at all, or a faulty row of a manifest.
    """
    problems: list[str] = []
    folder = Path(dataset.data_folder)
    annotated = dataset.name == "icbhi" and folder.is_dir()
    if annotated and not find_recordings(folder, lambda problem: None)[0]:
        return read_cycles(folder, require_audio=False, report=problems.append), problems
    table = read_corpus(replace(dataset, cycle_metadata_path=None), problems.append)
    if dataset.ready_made:
        SpectrogramStore.of(table).level(np.arange(len(table)))  # refuses what is not finite
        return table, problems
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


def describe(
    table: pd.DataFrame, problems: Sequence[str], dataset: DatasetConfig | None = None
) -> str:
    """The whole report, lines of at most `WIDTH` columns; dataset: None for ICBHI."""
    dataset = dataset or DatasetConfig()
    state = CORPORA[dataset.name].completeness(table)
    complete = "Complete: all counts are those of the whole corpus."
    if dataset.name == "manifest":
        complete = f"A manifest, {dataset.data_folder}."
    columns = ["Device", "AuscLoc", "Age", "Sex", "BMI", "CW", "CH", "Disease", "BMIDerived"]
    missing = pd.DataFrame({"cycles": table[columns].isna().sum()})
    missing["patients"] = [table.loc[table[name].isna(), "PID"].nunique() for name in columns]
    listed = [f"- {problem}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        listed.append(f"- and {len(problems) - _SHOWN} more")
    halves = {f"official {p}": table[table["Split"] == p] for p in _parts_of(table) if p}
    sections = {
        "": state.message or complete,
        "Cycles by part and class": _by_class({**halves, "all": table}),
        "Cycles by device": _by_value(table, "Device"),
        "Cycles by auscultation site": _by_value(table, "AuscLoc"),
        "Cycle length": _lengths(table["Duration"].dropna().to_numpy()),
        "Missing metadata": _text(missing),
        "Recordings": _spectrograms(table) if dataset.ready_made else _audio(table),
        "Traps of the split": "\n".join(f"- {trap}" for trap in traps(table)),
        f"Parts under the {dataset.split_strategy} split": _parts(table, dataset),
        "Problems": "\n".join(listed) or "none found",
    }
    blocks = (f"{title}\n{'-' * len(title)}\n{text}".lstrip() for title, text in sections.items())
    return "\n\n".join(_wrapped(block) for block in blocks)


def traps(table: pd.DataFrame) -> list[str]:
    """Sentences on what makes this split easy to misread."""
    found = ["No patient is in both halves."]
    halves = _parts_of(table)
    test = table[table["Split"] == "test"]
    if halves == [""]:
        found = [
            "The corpus names no halves: dataset.split_strategy random or foldwise draws patients."
        ]
    if both := patients_in_both_halves(table):
        shared = int(test["PID"].isin(both).sum())
        found = [
            f"Patients {', '.join(map(str, both))} are in both halves ({shared} of {len(test):,} "
            f"test cycles); split_strategy official_disjoint leaves {len(test) - shared:,}."
        ]
    abnormal = classes_of(table) > 0
    for device in sorted(table["Device"].dropna().unique()) if len(halves) > 1 else ():
        rows = [((table["Device"] == device) & (table["Split"] == p)) for p in ("train", "test")]
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
    own = (pairs == 1).sum() > len(patients) / 2
    nearly = ": metadata is nearly a patient id" if own else ""
    found.append(
        f"{single} of {len(patients)} patients have one device only and {(pairs == 1).sum()} have "
        f"an (age, BMI) pair of their own{nearly}."
    )
    return found


def _parts_of(table: pd.DataFrame) -> list[str]:
    """The halves that a table names, in order; [""] where it names none."""
    return [part for part in PARTS if (table["Split"] == part).any()] or [""]


def _by_class(groups: dict[str, pd.DataFrame]) -> str:
    rows = {
        name: [
            *(len(part), part["Filename"].nunique(), part["PID"].nunique()),
            *np.bincount(classes_of(part), minlength=len(CLASSES)),
        ]
        for name, part in groups.items()
    }
    names = ["cycles", "recordings", "patients", *CLASSES]
    return _text(pd.DataFrame.from_dict(rows, orient="index", columns=names))


def _by_value(table: pd.DataFrame, column: str) -> str:
    table = table.assign(
        abnormal=100.0 * (classes_of(table) > 0), **{column: table[column].fillna("unknown")}
    )
    frame = pd.DataFrame(index=sorted(table[column].unique(), key=lambda x: (x == "unknown", x)))
    for part in _parts_of(table):
        groups = table[table["Split"] == part].groupby(column)
        for name, counts in (("cycles", groups.size()), ("patients", groups["PID"].nunique())):
            frame[f"{part} {name}".strip()] = counts.reindex(frame.index, fill_value=0)
        frame[f"{part} abn. %".strip()] = groups["abnormal"].mean()
    return _text(frame)


def _lengths(d: np.ndarray) -> str:
    if not len(d):
        return "not given"
    low, median, high = np.percentile(d, (5, 50, 95))
    return (
        f"min {d.min():.3f}, 5 % {low:.3f}, median {median:.3f}, mean {d.mean():.2f}, "
        f"95 % {high:.3f}, max {d.max():.3f} s\n"
        f"{(d > 10).sum()} cycles are longer than 10 s; {d.sum() / 3600:.2f} h in total"
    )


def _spectrograms(table: pd.DataFrame) -> str:
    arrays = SpectrogramStore.of(table).arrays
    return "\n".join(
        f"{len(a):>5}  spectrograms of {a.shape[1]} bands x {a.shape[2]} frames, {a.dtype}"
        for a in arrays
    )


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


def _parts(table: pd.DataFrame, dataset: DatasetConfig) -> str:
    try:
        split = split_by(dataset, table)
    except UserError as error:
        return str(error)
    return _by_class({name: table.iloc[getattr(split, name)] for name in PARTS})


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
    parser = argparse.ArgumentParser(
        prog="python -m data.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--data-folder", metavar="DIR", help="of ICBHI: recordings, annotations, tables"
    )
    what.add_argument("--corpus", metavar="FILE.yaml", help="any corpus, by the section dataset")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dataset.data_folder=DIR")
    options = parser.parse_args(arguments)
    dataset = DatasetConfig(data_folder=options.data_folder)
    if options.corpus:
        dataset = read_dataset(options.corpus, options.overrides)
    table, problems = inspect_corpus(dataset)
    print(describe(table, problems, dataset))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
