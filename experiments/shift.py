"""Conditioning under a prior that shifts: which way keeps the metadata useful on the test half?

    python -m experiments.shift --data-folder mel [--workers 2] [--stages screen final devices]
    python -m experiments.shift --synthetic [--seeds 3]

The first needs ready-made spectrograms of ICBHI 2017 (data.corpora.spectrograms) and has three
stages, each a grid whose finished cells are not run again:

screen   plain AST, FiLM and SoftFiLM under every way (shift_screening.yaml) x 3 seeds, on the
         official training half alone; judged on held-out patients of it. The test half is shut.
final    the five variants in the plain form and under the best two ways x 5 seeds, official split;
         the test half is opened once by each run.
devices  the plain AST, and the screening's best conditioned variant without and with its way, with
         each device left out in turn x 3 seeds.

Rule of choice, fixed beforehand: ways are ranked by the mean over FiLM, SoftFiLM and seeds of the
within-device Score on the judged patients (mean of the Scores of the devices that have normal and
abnormal cycles there): a prior that belongs to the device alone earns nothing by it. Epoch and
thresholds are chosen on validation patients, other than the judged ones. The page has every run.

The second is experiments.shift_synthetic, where the truth is known.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from data.corpora.registry import CORPORA
from data.fields import UNKNOWN
from data.task import FIELDS, Task
from experiments.planted_effect import write_page
from models.registry import METHODS, VARIANTS
from utils.common.cli import command
from utils.common.files import write_text
from utils.config.schema import RunConfig
from utils.evaluation.render import markdown_table, number, with_interval
from utils.evaluation.report import RunReport, ranking, read_report
from utils.metrics.bootstrap import (
    Difference,
    Interval,
    macro_auroc_bootstrap,
    macro_auroc_difference,
    over_seeds,
    paired_bootstrap,
    patient_bootstrap,
    patient_tables,
)
from utils.metrics.predictions import class_numbers, read_predictions
from utils.metrics.score import group_score
from utils.runs.cells import Cell, Grid, GridFile, read_grid
from utils.runs.pool import run_tracked

HERE = Path(__file__).parent
OUTPUT = HERE / "results" / "shift.md"
SCREENING = HERE / "shift_screening.yaml"
PLAIN = "plain"
STAGES = ("screen", "final", "devices")
DEVICES = CORPORA["icbhi"].devices
RATES = ("sp", "se", "score")
RESAMPLES = 10_000


@dataclass(frozen=True)
class Done:
    """A finished run: what it was, its report, its predictions of the judged part, by cycle."""

    variant: str
    way: str
    seed: int
    device: str | None
    folder: Path
    report: RunReport
    frame: pd.DataFrame

    @classmethod
    def of(cls, cell: Cell) -> Done:
        config, folder = cell.config, cell.folder
        frame = read_predictions(folder.predictions / "test.csv", config.task)
        frame = frame.sort_values(["recording", "cycle_index"]).reset_index(drop=True)
        own = config.variant, way_of(config), config.training.seed, config.dataset.test_device
        return cls(*own, folder.path, read_report(folder.report), frame)

    @property
    def tables(self) -> np.ndarray:
        """[P, C, C] confusion matrices of the patients."""
        true, pred = self.classes
        return patient_tables(true, pred, self.frame["patient"], len(self.task.classes))[1]

    @property
    def task(self) -> Task:
        return Task(self.report.n_cls, exclusive=self.report.test.task["exclusive"])

    @property
    def classes(self) -> tuple[np.ndarray, np.ndarray]:
        """True and predicted classes [N]."""
        names = ("true_class", "pred_class")
        return tuple(class_numbers(self.frame, self.task, name) for name in names)

    def within_devices(self) -> float:
        """Mean Score of the devices with normal and abnormal cycles."""
        devices = self.frame["device"].fillna(UNKNOWN).to_numpy(object)
        return group_score(*self.classes, devices)

    def metric(self, name: str, part: str = "test") -> float:
        """At the chosen thresholds, of the judged or the validation part."""
        return getattr(self.report, part).metrics["chosen"][name].value


def way_of(config: RunConfig) -> str:
    """Name of the way of a run, from its configuration."""
    training, model = config.training, config.model
    names = [METHODS[name].title for name in config.methods]
    names += [f"balance by {', '.join(training.balance)}"] * bool(training.balance)
    names += ["selection by device"] * bool(training.selection_groups)
    names += ["metadata dropout"] * (getattr(model, "metadata_dropout_joint", 0) > 0)
    left_out = [f for f in FIELDS if f not in getattr(model, "metadata_fields", FIELDS)]
    names += [f"without {', '.join(left_out)}"] * bool(left_out)
    return " + ".join(names) or PLAIN


# -------------------------------------------------------------------- the three grids


def distinct(grid: Grid) -> Grid:
    """Without cells that are the same run: what is said about metadata is nothing to a variant
    without them."""
    cells = {cell.folder.path: cell for cell in reversed(grid.cells)}
    return replace(grid, cells=tuple(reversed(cells.values())))


def screening(options: argparse.Namespace) -> Grid:
    """Every variant of the file under every way, on the training half."""
    grid = read_grid(SCREENING, seeds=options.screen_seeds, overrides=options.words)
    return distinct(grid)


def ranked(found: Sequence[Done]) -> list[tuple[str, float]]:
    """Ways with their mean within-device Score over the conditioned variants and seeds, best
    first; the plain form is not a way."""
    ways = dict.fromkeys(d.way for d in found if d.way != PLAIN and d.variant != "ast")
    score = {
        w: np.mean([d.within_devices() for d in found if d.way == w and d.variant != "ast"])
        for w in ways
    }
    return sorted(score.items(), key=lambda item: -item[1])


def entries(options: argparse.Namespace) -> dict[str, list[Any]]:
    """Way -> what shift_screening.yaml merges for it."""
    cells = read_grid(SCREENING, seeds=[1], overrides=options.words).cells
    rows = zip(GridFile.read(SCREENING).rows(), cells, strict=True)
    return {way_of(c.config): row[2:] for row, c in rows if c.config.variant != "ast"}


def written(path: Path, values: dict, seeds: Sequence[int], words: Sequence[str]) -> Grid:
    """The grid of a file with these values."""
    write_text(path, yaml.safe_dump(values, sort_keys=False))
    return distinct(read_grid(path, seeds=seeds, overrides=words))


def official() -> dict[str, Any]:
    """Overrides of the screening without its split."""
    given = GridFile.read(SCREENING).overrides
    split = ("dataset.split_strategy", "dataset.test_fraction")
    return {key: value for key, value in given.items() if key not in split}


def final(options: argparse.Namespace, found: Sequence[Done]) -> Grid:
    """Five variants in the plain form and under the best two ways, official split."""
    given = entries(options)
    ways = [given[way] for way, _ in ranked(found)[:2]]
    scripts = {v.script: v.config_file for v in VARIANTS.values()}
    values = {"scripts": scripts, "configs": [None, *ways], "overrides": official()}
    return written(options.work / "shift_final.yaml", values, options.seeds, options.words)


def devices(options: argparse.Namespace, found: Sequence[Done]) -> Grid:
    """Plain AST; the best conditioned variant under the best way, without and with it."""
    way = ranked(found)[0][0]
    score = {
        v: np.mean([d.within_devices() for d in found if (d.variant, d.way) == (v, way)])
        for v in dict.fromkeys(d.variant for d in found if d.variant != "ast")
    }
    best = VARIANTS[max(score, key=score.get)]
    scripts = [[VARIANTS["ast"].script, VARIANTS["ast"].config_file]]
    own = [best.script, best.config_file]
    scripts += [own, [*own, *entries(options)[way]]]
    values = {"systems": scripts, "grid": {"dataset.test_device": list(DEVICES)}}
    values["overrides"] = official() | {"dataset.split_strategy": "leave_device_out"}
    return written(options.work / "shift_devices.yaml", values, options.screen_seeds, options.words)


def finished(grid: Grid) -> list[Done]:
    return [Done.of(cell) for cell in grid.cells if cell.folder.finished]


# -------------------------------------------------------------------- the page


def grouped(found: Sequence[Done]) -> dict[tuple[str, str], list[Done]]:
    """(variant, way) -> runs, in order of the seed; variants in the registry's order."""
    out: dict[tuple[str, str], list[Done]] = {}

    def place(one: Done) -> tuple:
        return VARIANTS[one.variant].order, one.way != PLAIN, one.way, one.seed

    for one in sorted(found, key=place):
        out.setdefault((one.variant, one.way), []).append(one)
    return out


def interval(runs: Sequence[Done], metric: str) -> Interval:
    """Of the runs' mean over patients: a rate in percent, or `auroc_macro` in 0..1."""
    if metric == "auroc_macro":
        rankings = [ranking(one.frame, one.task) for one in runs]
        patient = runs[0].frame["patient"].to_numpy()
        return macro_auroc_bootstrap(rankings, patient, resamples=RESAMPLES)
    return patient_bootstrap(np.stack([one.tables for one in runs]), resamples=RESAMPLES)[metric]


def minus(runs: Sequence[Done], base: Sequence[Done], metric: str) -> Difference | None:
    """Of runs minus base over the seeds that both have, patients and seeds resampled together."""
    common = sorted({d.seed for d in runs} & {d.seed for d in base})
    if not common:
        return None
    pair = [[next(d for d in group if d.seed == s) for s in common] for group in (base, runs)]
    options = {"resamples": RESAMPLES, "training_seeds": len(common)}
    if metric == "auroc_macro":
        first, second = ([ranking(d.frame, d.task) for d in group] for group in pair)
        patient = pair[0][0].frame["patient"].to_numpy()
        return macro_auroc_difference(first, second, patient, **options)
    first, second = (np.stack([d.tables for d in group]) for group in pair)
    return paired_bootstrap(first, second, **options)[metric]


def performance(found: Sequence[Done], *, within: bool = False) -> list[str]:
    """Variants and ways: metrics with intervals, differences to the plain AST and to the own plain
    form; within: the within-device Score that the screening ranks by, as well."""
    groups, rows = grouped(found), []
    base = groups.get(("ast", PLAIN), [])
    for (variant, way), runs in groups.items():
        plain = groups.get((variant, PLAIN), [])
        row = [VARIANTS[variant].title, way, str(len(runs))]
        if within:
            spread = over_seeds([d.within_devices() for d in runs])
            row.append(f"{spread.mean:.1f} ± {number(spread.sd, 1)}")
        row += [with_interval(interval(runs, name), 1) for name in RATES]
        row.append(with_interval(interval(runs, "auroc_macro"), 3))
        for other in (base, plain):
            for metric, decimals in (("score", 1), ("auroc_macro", 3)):
                difference = None if other == runs else minus(runs, other, metric)
                shown = "–"
                if difference:
                    shown = f"{with_interval(difference, decimals)}, p {number(difference.p, 3)}"
                row.append(shown)
        rows.append(row)
    head = ["model", "way", "n", *["within devices"] * within, "Sp", "Se", "Score", "macro AUROC"]
    for other in ("plain AST", "own plain form"):
        head += [f"Score minus {other}", f"AUROC minus {other}"]
    return markdown_table(head, rows)


def every_run(found: Sequence[Done]) -> list[str]:
    """One line per run."""
    rows = []
    for one in (d for runs in grouped(found).values() for d in runs):
        row = [VARIANTS[one.variant].title, one.way, one.device or "–", one.seed]
        row.append(number(one.metric("score", "val"), 1) if one.report.val else "–")
        row += [number(one.metric(name), 1) for name in RATES]
        rows.append([*row, number(one.metric("auroc_macro"), 3), f"`{one.folder.name}`"])
    head = ["model", "way", "device", "seed", "validation Score", "Sp", "Se", "Score"]
    return markdown_table([*head, "macro AUROC", "run"], rows)


NOTE = """Percent; macro AUROC over crackle and wheeze, 0 to 1. In brackets 95 % intervals over \
resampled patients, of differences over resampled patients and seeds, both paired; nothing \
corrects for the number of comparisons. Epoch and thresholds are chosen on validation patients."""


def to_markdown(stages: dict[str, list[Done]], head: str) -> str:
    """The page of what is finished."""
    parts = [head, NOTE]
    if found := stages.get("screen"):
        counts = found[0].report.test.counts
        text = (
            f"Official training half alone; judged on {counts['cycles']:,} cycles of "
            f"{counts['patients']} held-out patients. Ranked by the within-device Score, mean over "
            "the conditioned variants and seeds (± sd over seeds in the table):"
        )
        order = "\n".join(f"{n}. {w}: {s:.1f}" for n, (w, s) in enumerate(ranked(found), start=1))
        parts += ["## Screening", text, order, "\n".join(performance(found, within=True))]
    if found := stages.get("final"):
        parts += ["## Official split, test half", "\n".join(performance(found))]
    if found := stages.get("devices"):
        parts.append("## Leave one device out")
        for device in dict.fromkeys(d.device for d in found):
            own = [d for d in found if d.device == device]
            counts = own[0].report.test.counts
            text = f"### {device}: {counts['cycles']:,} cycles of {counts['patients']} patients"
            parts += [text, "\n".join(performance(own))]
    for stage, found in stages.items():
        if found:
            parts += [f"## Every run of {stage}", "\n".join(every_run(found))]
    partial = next((d.report.partial_message for f in stages.values() for d in f), "")
    parts.insert(1, f"**{partial}**" if partial else "")
    return "\n\n".join(filter(None, parts)) + "\n"


def draw(found: Sequence[Done], path: Path) -> list[Path]:
    """Score and macro AUROC minus the plain AST's, of every model, with intervals."""
    from utils.figures.style import BLUE, GREY, PAGE, new_figure, save, use_style

    use_style()
    groups = grouped(found)
    base = groups.get(("ast", PLAIN), [])
    names = [key for key in groups if key != ("ast", PLAIN)]
    figure = new_figure(PAGE, 0.8 + 0.2 * len(names))
    for axis, metric in zip(
        figure.subplots(1, 2, sharey=True), ("score", "auroc_macro"), strict=True
    ):
        for place, key in enumerate(names):
            one = minus(groups[key], base, metric)
            if one:
                axis.plot([one.low, one.high], [place, place], color=BLUE)
                axis.plot(one.value, place, "o", color=BLUE)
        axis.axvline(0, color=GREY, linewidth=0.8)
        axis.set_xlabel("Score, points" if metric == "score" else "macro AUROC")
        axis.set_yticks(range(len(names)), [f"{VARIANTS[v].title}, {w}" for v, w in names])
    figure.axes[0].invert_yaxis()
    figure.suptitle("Test half: minus the plain AST, 95 % over patients and seeds")
    return save(figure, path.parent, path.stem, ["png"])


# -------------------------------------------------------------------- the command


def study(options: argparse.Namespace) -> dict[str, list[Done]]:
    """Run the stages in turn, and write the page after each."""
    stages: dict[str, list[Done]] = {}
    for stage in STAGES[: 1 + max(STAGES.index(name) for name in options.stages)]:
        make = {"screen": lambda: screening(options)}
        make |= {"final": lambda: final(options, stages["screen"])}
        make |= {"devices": lambda: devices(options, stages["screen"])}
        grid = make[stage]()
        if stage in options.stages:
            failed = run_tracked(grid, workers=options.workers)
            if failed:
                names = "; ".join(cell.label for cell in failed)
                raise SystemExit(f"{len(failed)} cells of {stage} failed: {names}")
        stages[stage] = finished(grid)
        done, whole = len(stages[stage]), len(grid.cells)
        head = f"# Conditioning under a prior that shifts, {date.today()}\n\n`{options.shown}`"
        write_page(
            options.output, to_markdown(stages, f"{head} ({stage}: {done} of {whole} runs).")
        )
    if stages.get("final"):
        draw(stages["final"], options.output)
    return stages


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; key=value words change the configuration of every run."""
    parser = argparse.ArgumentParser(prog="python -m experiments.shift", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data-folder", metavar="DIR", help="of ready-made spectrograms")
    parser.add_argument("--synthetic", action="store_true", help="the corpora whose truth is known")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--seeds", type=int, help="of final 5, of the synthetic corpora 3")
    parser.add_argument("--screen-seeds", type=int, default=3, help="of screen and devices")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time")
    parser.add_argument("--work", type=Path, default=Path("cache/shift"), metavar="DIR")
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--patients", type=int, default=100, help="of a synthetic corpus")
    parser.add_argument("--report-only", action="store_true", help="train nothing (synthetic)")
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [w for w in given if "=" in w and not w.startswith("-")]
    options = parser.parse_args([w for w in given if w not in words])
    shown = ["DIR" if word == options.data_folder else word for word in given]
    options.shown = " ".join(["python -m experiments.shift", *shown])
    if options.synthetic == bool(options.data_folder):
        parser.error("give --data-folder DIR, or --synthetic")
    if options.synthetic:
        from experiments import shift_synthetic

        shift_synthetic.run(options, words)
        return
    options.output = options.output or OUTPUT
    options.words = [f"dataset.data_folder={options.data_folder}", *words]
    options.seeds, options.screen_seeds = [options.seeds or 5], [options.screen_seeds]
    study(options)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    sys.exit(main())
