"""What `evaluate.py` does: reports on trained models, and comparisons of them."""

from __future__ import annotations

import argparse
import logging
import textwrap
from pathlib import Path

import pandas as pd

from utils.common.files import write_json, write_text
from utils.evaluation.compare import SHOWN, Result, compare, default_folder, write_comparison
from utils.evaluation.model_report import report_on
from utils.evaluation.render import RATES, number, shown, to_markdown, with_interval
from utils.evaluation.report import Report
from utils.evaluation.trained_model import TrainedModel
from utils.figures import runs as pictures
from utils.metrics.predictions import write_predictions
from utils.metrics.protocol import Selection, metric_group, warnings
from utils.runs.end import AUROC_HEAD, auroc, banner, defined, figure_row
from utils.tracking import continue_tracking

logger = logging.getLogger(__name__)


def evaluate(options: argparse.Namespace) -> None:
    """--checkpoint."""
    model = open_model(options.checkpoint, options)
    split = options.split or model.default_part()
    folder = options.output or output_folder(model, split)
    report, frame = report_on(model, split, with_metadata_test=not options.no_metadata_test)
    warn(*warnings(report.partial_message, report.synthetic, report.leaky), *report.notes)
    write_evaluation(folder, report, frame)
    track(model, folder, report)
    print_report(report)
    print(f"\nwritten to {folder}")


def compare_models(options: argparse.Namespace) -> None:
    """--compare."""
    models = [open_model(path, options) for path in options.compare]
    result = compare(models)
    warn(*warnings(result.partial_message, result.synthetic, result.leaky))
    path = write_comparison(result, options.output or default_folder(models))
    print_comparison(result)
    print(f"\nwritten to {path.parent}")


def part_name(part: str) -> str:
    return "all parts" if part == "all" else f"{part} part"


def open_model(path: str, options: argparse.Namespace) -> TrainedModel:
    """The model, named on the console first."""
    model = TrainedModel.open(
        path,
        data_folder=options.data_folder,
        corpus_file=options.corpus,
        device=options.device,
        batch_size=options.batch_size,
    )
    print(model.headline(), flush=True)
    return model


def warn(*messages: str) -> None:
    """What must be said before the metrics are read."""
    for message in messages:
        logger.warning("%s", banner(message))


def output_folder(model: TrainedModel, split: str) -> Path:
    """evaluation/<split> in the run's folder, else by the checkpoint; other data separately."""
    own = model.run_folder
    root = own.path if own else model.path.with_name(f"{model.path.stem}_evaluation")
    name = split
    if model.corpus_file:
        name += f"-{model.corpus_file.stem}"
    elif model.other_data():
        name += f"-{Path(model.config.dataset.data_folder).resolve().name}"
    return root / "evaluation" / name if own else root / name


def write_evaluation(folder: Path, report: Report, frame: pd.DataFrame) -> None:
    """predictions.csv, report.md, figures/ and, last, report.json."""
    origin = report.origin
    write_predictions(frame, folder / "predictions.csv")
    title = f"{origin.title}: {part_name(origin.part)} of {origin.data_folder}"
    write_text(folder / "report.md", to_markdown(report, title))
    pictures.evaluation_figures(pictures.Evaluation(folder, report), folder / "figures")
    write_json(folder / "report.json", report.to_dict())


def track(model: TrainedModel, folder: Path, report: Report) -> None:
    """Add metrics and files to the MLflow run of the training, where there is one."""
    own = model.run_folder
    if own is None or not own.finished or not folder.resolve().is_relative_to(own.path.resolve()):
        return
    tracker = continue_tracking(own.path)
    group = f"evaluation_{folder.name}"
    if report.origin.part in ("test", "all"):
        group = metric_group(group, model.selection, model.leaky)
    tracker.metrics(defined(report.metrics["chosen"], group))
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".md", ".csv", ".png"):
            inside = path.parent.relative_to(folder)
            tracker.artifact(path, (Path("evaluation") / folder.name / inside).as_posix())
    message = tracker.finish(None)
    if message:
        logger.warning("%s", message)


def print_report(report: Report) -> None:
    """The metrics that matter most, at most 100 columns."""
    one, metrics = report.origin, report.metrics
    print(
        f"\n{one.title}, {one.n_cls}-class, seed {one.seed}, epoch {one.epoch + 1}, "
        f"{part_name(one.part)}: {Selection(one.selection).label}"
    )
    print(f"{'percent, [95 % over patients]':32}{'Sp':>9}{'Se':>9}{'Score':>9}{AUROC_HEAD}")
    print(figure_row("chosen thresholds", metrics["chosen"]))
    if "collapsed_score" in metrics["chosen"]:
        print(figure_row("collapsed to 2 classes", metrics["chosen"], "collapsed_"))
    print(figure_row("thresholds at 0.5", metrics["default"]))
    for name, baseline in (report.baselines or {}).items():
        print(figure_row(f"baseline: {name}", baseline.metrics["chosen"]))
    if report.metadata_test:
        head = f"{'metadata permutation test':32}{'Sp':>9}{'Se':>9}{'Score':>9}"
        print(f"\n{head}  Score minus real [95 %], p")
    for row in report.metadata_test or []:
        values = "".join(f"{number(row[name]):>9}" for name in RATES)
        change = row["difference"]
        tail = f"  {with_interval(change, 1)}, {number(change.p, 3)}"
        print(f"{row['metadata']:32}{values}" + (tail if row["metadata"] != "real" else ""))


def print_comparison(result: Result) -> None:
    """Each model, then each pair, at most 100 columns."""
    what = f"{result.counts['cycles']:,} test cycles, {result.counts['patients']} patients"
    print(f"\n{result.task['n_cls']}-class, {what}")
    print(f"{'percent, [95 % over patients]':44}{'Sp':>9}{'Se':>9}{'Score':>9}")
    for model in result.models:
        print(figure_row(f"{model.name:43} ", {k: model.figures[k] for k in RATES}))
        print(f"  macro AUROC {auroc(model.figures)}")
        print(f"  {Selection(model.selection).label}; {model.run}")
    for name, baseline in result.floors.items():
        print(
            figure_row(
                f"{f'baseline: {name}':43} ", {k: baseline.metrics["chosen"][k] for k in RATES}
            )
        )
    print("\npaired differences in points [95 %], p")
    last = None
    for pair in result.pairs:
        if pair.figure not in SHOWN:
            continue
        if last != (last := (pair.second, pair.first)):
            print(" minus ".join(last))
        print(f"  {SHOWN[pair.figure]:30}{shown(pair.figure, pair):>26}  {number(pair.p, 4)}")
    for note in result.notes:
        print(textwrap.fill(f"note: {note}", 100, subsequent_indent="    "))
