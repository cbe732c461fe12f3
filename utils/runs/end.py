"""The end of a run: its report, and what is printed of it."""

from __future__ import annotations

import math
import shlex
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pandas as pd

from data.loader import Cycles
from models.registry import VARIANTS
from utils.common.files import write_text
from utils.config.schema import RunConfig
from utils.evaluation.baselines import baseline_reports
from utils.evaluation.render import model_card, number, to_markdown, with_interval
from utils.evaluation.report import RunReport, evaluate_predictions, read_report
from utils.metrics.bootstrap import Interval
from utils.metrics.protocol import Selection, metric_group, warnings
from utils.tracking import Tracker
from utils.training.checkpoint import Checkpoint
from utils.training.runfolder import RunFolder

WIDTH = 100
#: Over the interval of the Score and the macro AUROC of a row of `figure_row`.
AUROC_HEAD = f"{'':16}macro AUROC"


def banner(message: str) -> str:
    """A prominent message."""
    bar = "!" * WIDTH
    return f"\n{bar}\n{message.center(WIDTH).rstrip()}\n{bar}"


def write_run_report(
    folder: RunFolder,
    checkpoint: Checkpoint,
    data: Cycles,
    frames: dict[str, pd.DataFrame],
    tracker: Tracker,
    controls: dict[str, float],
) -> RunReport:
    """Evaluate the predictions of the test (and validation) part; write and track the result.

    report.json comes last: where it is, everything else is. controls: `Conditioner.controls`.
    """
    config = checkpoint.run_config()
    parts = {
        part: evaluate_predictions(
            frame,
            data.task,
            checkpoint.thresholds,
            selection=checkpoint.selection,
            val_predictions=frames.get("val") if part == "test" else None,
            pos_weight=checkpoint.pos_weight or None,
            partial_message=checkpoint.partial,
            synthetic=checkpoint.synthetic,
        )
        for part, frame in frames.items()
    }
    test = parts["test"]
    test.baselines = baseline_reports(
        data.task,
        data.table,
        data.split,
        selection=checkpoint.selection,
        pos_weight=checkpoint.pos_weight or None,
        thresholds=config.training.thresholds,
        min_sensitivity=config.training.min_sensitivity,
    )
    report = RunReport(
        variant=config.variant,
        title=config.title,
        n_cls=config.dataset.n_cls,
        split_strategy=config.dataset.split_strategy,
        selection=checkpoint.selection,
        seed=config.training.seed,
        epoch=checkpoint.epoch,
        thresholds=checkpoint.thresholds,
        partial=bool(checkpoint.partial),
        partial_message=checkpoint.partial,
        synthetic=checkpoint.synthetic,
        counts=checkpoint.counts,
        revision=checkpoint.revision,
        controls=controls,
        **parts,
    )
    named = replace(test, origin=report.origin(checkpoint.run), controls=controls)
    write_text(folder.path / "report.md", to_markdown(named, f"{report.title}: test part"))
    card = model_card(
        named,
        corpora=[source.name for source in config.dataset.sources],
        training_counts=checkpoint.counts,
        initial_weights=config.backbone.weights,
    )
    write_text(folder.path / "model_card.md", card)
    draw_figures(folder, report, data)
    for name, rule in (("test", "chosen"), ("test_default", "default")):
        group = metric_group(name, checkpoint.selection, report.leaky)
        tracker.metrics(defined(test.metrics[rule], group))
    tracker.metrics(controls)
    folder.write_report(report.to_dict())
    return report


def defined(metrics: dict[str, Interval], prefix: str) -> dict[str, float]:
    """prefix/metric -> value of those that the data can support, for a tracker."""
    values = {f"{prefix}/{name}": metric.value for name, metric in metrics.items()}
    return {name: value for name, value in values.items() if not math.isnan(value)}


def draw_figures(folder: RunFolder, report: RunReport, data: Cycles) -> None:
    """The run's figures, as PNG in its `figures` folder."""
    from utils.figures.runs import Evaluation, run_figures  # matplotlib: only where one is drawn

    one = Evaluation.of_run(folder.path, report, "test")
    run_figures(one, data.table.iloc[data.split.test])


def print_end(folder: RunFolder, config: RunConfig, *, published: bool = True) -> None:
    """Summary table, the run's folder and the command that opens the MLflow UI.

    published: its best checkpoint was copied to the checkpoint folder.
    """
    report = read_report(folder.report)
    for warning in warnings(report.partial_message, report.synthetic, report.leaky):
        print(banner(warning))
    print(
        f"\n{report.title}, {report.n_cls}-class, seed {report.seed}, "
        f"epoch {report.epoch + 1}: {Selection(report.selection).label}"
    )
    print(f"{'percent, [95 % over patients]':32}{'Sp':>9}{'Se':>9}{'Score':>9}{AUROC_HEAD}")
    if report.val is not None:
        print(figure_row("validation", report.val.metrics["chosen"]))
    metrics = report.test.metrics
    print(figure_row("test", metrics["chosen"]))
    if "collapsed_score" in metrics["chosen"]:
        print(figure_row("test, collapsed to 2 classes", metrics["chosen"], "collapsed_"))
    print(figure_row("test, thresholds at 0.5", metrics["default"]))
    replaced = folder.read_record().get("replaced")
    if published and replaced:
        text = f"{published_best(config)} was replaced; it was {replaced}"
        print("\n" + textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False))
    print(f"\nrun folder   {folder.path}")
    print(f"checkpoint   {published_best(config) if published else folder.best}")
    if config.mlflow.enabled:
        uri = config.mlflow.tracking_uri
        opens = uri if uri.startswith("http") else ui_command(uri)
        print(f"MLflow       {opens}")


def published_best(config: RunConfig) -> Path:
    """Where the best checkpoint of a variant's latest finished plain run is copied to."""
    short = "fused" if config.fusion.members else VARIANTS[config.variant].short
    return Path(config.training.checkpoint_dir) / f"{short}_best.pt"


def ui_command(uri: str) -> str:
    """The command that shows a tracking database, in the environment at hand."""
    if uri == "sqlite:///mlflow.db" and Path(sys.prefix) == Path(".venv").resolve():
        return "make ui"
    return (
        f"MLFLOW_DISABLE_TELEMETRY=true python -m mlflow ui --backend-store-uri {shlex.quote(uri)}"
    )


def figure_row(label: str, metrics: dict[str, Interval], prefix: str = "") -> str:
    """Sp, Se, Score and macro AUROC with intervals, in columns of 32 and 9 characters."""
    values = [metrics[f"{prefix}{name}"] for name in ("sp", "se", "score")]
    shown = "".join(f"{number(one.value):>9}" for one in values)
    line = f"{label:32}{shown}  [{number(values[-1].low, 1)}, {number(values[-1].high, 1)}]"
    return line if prefix or "auroc_macro" not in metrics else f"{line:75}{auroc(metrics)}"


def auroc(metrics: dict[str, Interval]) -> str:
    """Macro AUROC with its interval, or that there is none."""
    figure = metrics["auroc_macro"]
    return "undefined" if math.isnan(figure.value) else with_interval(figure)
