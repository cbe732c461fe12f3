"""What a leaky split adds: the same models on splits by patient and on shuffled recordings.

    python -m experiments.leaky_split --data-folder DIR [--variants ast ast_softfilm] [--seeds 3]

The public code of some published systems shuffles the recordings (`split_strategy: recordings`)
where their papers say that the official split was used, so nearly every patient of their test part
is heard in training. Here each variant is trained on the official split, on a random split by
patient of the same size, which tells the leak from merely other test patients, and on the shuffled
recordings. The folder is a corpus of ready-made spectrograms (docs/data.md); the other keys are in
leaky_split.yaml, and nothing is selected. A finished run is not trained again: a stopped command
resumes.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from datetime import date
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.harness import table
from experiments.planted_effect import write_page
from models.registry import VARIANTS
from utils.common.cli import command, quiet
from utils.config.schema import RunConfig, load_config
from utils.evaluation.render import with_interval
from utils.evaluation.report import Report, RunReport, read_report
from utils.metrics.bootstrap import over_seeds, patient_bootstrap, patient_difference
from utils.metrics.protocol import LEAKY_MARK, LEAKY_NOTE, caption, is_leaky
from utils.runs.run import runs_of
from utils.training.assemble import build_split
from utils.training.runfolder import RunFolder

OUTPUT = Path(__file__).parent / "results" / "leaky_split.md"
SETTINGS = Path(__file__).with_suffix(".yaml")
SPLITS = ("official", "recordings", "random")
SHOWN = {"sp": "Sp", "se": "Se", "score": "Score", "collapsed_score": "Score, collapsed"}
NOTE = """Percent, four classes, last epoch, thresholds 0.5; mean ± sd over n seeds, in brackets \
the 95 % patient bootstrap interval of that mean. Differences are in points; patients of both test \
parts are resampled together, and so are the seeds: with few of them that part is too narrow. A \
metadata-only baseline hears nothing: what it gains is recognising the patient by age, BMI, device \
and site."""


class Tested(NamedTuple):
    """R runs of a model on a test part: its patients [P], their confusion matrices [R, P, C, C]."""

    patients: list
    tables: np.ndarray

    @classmethod
    def of(cls, reports: Sequence[Report]) -> Tested:
        """Runs that differ in the seed, or one baseline."""
        classes = round(len(reports[0].patient_tables[0]) ** 0.5)
        tables = np.array([report.patient_tables for report in reports])
        return cls(list(reports[0].patients), tables.reshape(*tables.shape[:2], classes, classes))

    def among(self, patients: Sequence) -> np.ndarray:
        """Tables [R, P', C, C] of these patients, zeros for those who are not in the test part."""
        out = np.zeros((len(self.tables), len(patients), *self.tables.shape[2:]), np.int64)
        out[:, [patients.index(patient) for patient in self.patients]] = self.tables
        return out

    def row(self) -> dict[str, str]:
        """n and the metrics."""
        cells = {"n": str(len(self.tables))}
        runs = [patient_bootstrap(one, resamples=1) for one in self.tables]
        for key, found in patient_bootstrap(self.tables).items():
            if key in SHOWN:
                sd = over_seeds([run[key].value for run in runs]).sd
                spread = "" if np.isnan(sd) else f" ± {sd:.1f}"
                bounds = f"[{found.low:.1f}, {found.high:.1f}]"
                cells[SHOWN[key]] = f"{found.value:.1f}{spread} {bounds}"
        return cells

    def minus(self, base: Tested) -> dict[str, str]:
        """Differences to the same model on another split."""
        patients = sorted({*self.patients, *base.patients})
        seeds = len(self.tables) if len(self.tables) > 1 else 0
        both = base.among(patients), self.among(patients)
        found = patient_difference(*both, training_seeds=seeds)
        return {SHOWN[key]: with_interval(found[key], 1) for key in SHOWN}


def configure(folder: str, variant: str, split: str, seed: int, words: Sequence[str]) -> RunConfig:
    """Checked configuration of a run."""
    given = [f"dataset.data_folder={folder}", f"dataset.split_strategy={split}"]
    named = [f"models.{variant}={{}}", f"training.seed={seed}"]
    return load_config([SETTINGS], [*named, *given, *words])


def finished(config: RunConfig) -> RunReport:
    """The report of a run, trained first where it is not yet."""
    for run in runs_of(config, member_of=Path(config.training.output_dir)):
        with run:
            data = run.data()
            run.test(run.fit(run.model(data), data))
    return read_report(RunFolder.of(config).report)


def models_of(reports: Sequence[RunReport]) -> dict[str, Tested]:
    """Variant and baselines -> results, from all runs on one split."""
    titles = dict.fromkeys(report.title for report in reports)
    found = {t: Tested.of([r.test for r in reports if r.title == t]) for t in titles}
    baselines = reports[0].test.baselines or {}
    return found | {f"baseline: {name}": Tested.of([one]) for name, one in baselines.items()}


def describe(config: RunConfig) -> str:
    """Size of the parts, and who of the test part is heard in training."""
    cycles, split = build_split(config)
    train, test = cycles.iloc[split.train], cycles.iloc[split.test]
    heard = test["PID"].isin(train["PID"])
    return (
        f"{len(train):,} training cycles of {train['PID'].nunique()} patients; {len(test):,} test "
        f"cycles of {test['PID'].nunique()} patients. Heard in training: {heard.sum():,} test "
        f"cycles ({100 * heard.mean():.1f} %) of {test['PID'][heard].nunique()} patients."
    )


def to_markdown(reports: dict[str, list[RunReport]], sizes: dict[str, str], head: str) -> str:
    """The page: each split by itself, then the differences to the official one."""
    results = {split: models_of(found) for split, found in reports.items()}
    first = next(iter(reports.values()))[0]
    parts = [head, f"**{first.partial_message}**" if first.partial else "", NOTE]
    for split, found in results.items():
        marks = first.selection, first.partial, first.synthetic, is_leaky(split)
        parts += [f"## {caption(f'Split {split}', *marks)}", sizes[split]]
        parts += [f"**{LEAKY_NOTE}**"] * is_leaky(split)
        parts.append(table({name: one.row() for name, one in found.items()}))
    base = results["official"]
    for split in [name for name in results if name != "official"]:
        mark = f" ({LEAKY_MARK})" * is_leaky(split)
        parts.append(f"## Difference: split {split}{mark} minus official")
        found = results[split].items()
        parts.append(table({name: one.minus(base[name]) for name, one in found}))
    return "\n\n".join(filter(None, parts)) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; key=value words change the configuration of every run."""
    parser = argparse.ArgumentParser(prog="python -m experiments.leaky_split")
    parser.add_argument("--data-folder", required=True, metavar="DIR", help="of spectrograms")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["ast"])
    parser.add_argument("--splits", nargs="+", choices=SPLITS[1:], default=SPLITS[1:])
    parser.add_argument("--seeds", type=int, default=3, help="runs per variant and split")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("words", nargs="*", metavar="key=value")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    given = sys.argv[1:] if argv is None else argv
    shown = " ".join("DIR" if word == options.data_folder else word for word in given)
    configs, reports = {}, {split: [] for split in ("official", *options.splits)}
    for seed, variant, split in product(range(options.seeds), options.variants, reports):
        config = configure(options.data_folder, variant, split, seed, options.words)
        reports[split].append(finished(config))
        configs[split] = config
    with quiet(logging.ERROR, "data"):  # the splits' warnings were given
        sizes = {split: describe(config) for split, config in configs.items()}
    revisions = dict.fromkeys(run.revision for found in reports.values() for run in found)
    head = f"# Leaky split, {date.today()}\n\n`python -m experiments.leaky_split {shown}`, "
    text = to_markdown(reports, sizes, head + f"code revision {', '.join(revisions)}.")
    write_page(options.output, text)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    sys.exit(command(main)())
