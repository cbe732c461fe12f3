"""The end of a run: its report, and what is printed of it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from data.loader import Cycles
from models.registry import VARIANTS
from utils.common.files import write_text
from utils.config.schema import RunConfig
from utils.evaluation.baselines import floor_reports
from utils.evaluation.render import model_card, number, to_markdown
from utils.evaluation.report import evaluate_predictions
from utils.metrics.protocol import SYNTHETIC_NOTE, Selection, metric_group
from utils.tracking import Tracker
from utils.training.checkpoint import Checkpoint
from utils.training.runfolder import RunFolder

WIDTH = 100


def banner(message: str) -> str:
    """A message that can not be overlooked."""
    bar = "!" * WIDTH
    return f"\n{bar}\n{message.center(WIDTH).rstrip()}\n{bar}"


def write_run_report(
    folder: RunFolder,
    checkpoint: Checkpoint,
    data: Cycles,
    frames: dict[str, pd.DataFrame],
    tracker: Tracker,
    controls: dict[str, float],
) -> dict[str, Any]:
    """Evaluate the predictions of the test (and validation) part; write and track the result.

    report.json comes last: where it is, everything else is. controls: `Conditioner.controls`.
    """
    config = checkpoint.run_config()
    variant = VARIANTS[config.variant]
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
    parts["test"]["floors"] = floor_reports(
        data.task,
        data.table,
        data.split,
        selection=checkpoint.selection,
        pos_weight=checkpoint.pos_weight or None,
        min_sensitivity=config.training.min_sensitivity,
    )
    report = {
        "variant": config.variant,
        "title": variant.title,
        "n_cls": config.dataset.n_cls,
        "split_strategy": config.dataset.split_strategy,
        "selection": checkpoint.selection,
        "seed": config.training.seed,
        "epoch": checkpoint.epoch,
        "thresholds": checkpoint.thresholds,
        "partial": bool(checkpoint.partial),
        "partial_message": checkpoint.partial,
        "synthetic": checkpoint.synthetic,
        "counts": checkpoint.counts,
        "revision": checkpoint.revision,
        "controls": controls,
        **parts,
    }
    test = {"run": checkpoint.run} | {k: v for k, v in report.items() if k not in parts}
    test |= parts["test"]
    write_text(folder.path / "report.md", to_markdown(test, f"{variant.title}: test part"))
    card = model_card(
        test, training_counts=checkpoint.counts, initial_weights=config.backbone.weights
    )
    write_text(folder.path / "model_card.md", card)
    draw_figures(folder, report, data)
    figures = parts["test"]["metrics"]
    for name, rule in (("test", "chosen"), ("test_default", "default")):
        tracker.metrics(defined(figures[rule], metric_group(name, checkpoint.selection)))
    tracker.metrics(controls)
    folder.write_report(report)
    return report


def defined(figures: dict[str, Any], prefix: str) -> dict[str, float]:
    """prefix/figure -> value of those that the data can support, for a tracker."""
    values = {f"{prefix}/{name}": figure["value"] for name, figure in figures.items()}
    return {name: value for name, value in values.items() if value is not None}


def draw_figures(folder: RunFolder, report: dict[str, Any], data: Cycles) -> None:
    """The run's figures, as PNG in its `figures` folder."""
    from utils.figures.runs import run_figures  # matplotlib: only where something is drawn
    from utils.figures.sources import Evaluation

    run = {key: value for key, value in report.items() if key not in ("test", "val")}
    one = Evaluation(folder.path, "test", run, report["test"], report["synthetic"])
    run_figures(one, data.table.iloc[data.split.test])


def print_end(folder: RunFolder, config: RunConfig, *, published: bool = True) -> None:
    """Summary table, the run's folder and the command that opens the MLflow UI.

    published: its best checkpoint was copied to the checkpoint folder.
    """
    report = folder.read_report()
    if report["partial"]:
        print(banner(report["partial_message"]))
    if report["synthetic"]:
        print(banner(SYNTHETIC_NOTE))
    print(
        f"\n{report['title']}, {report['n_cls']}-class, seed {report['seed']}, "
        f"epoch {report['epoch'] + 1}: {Selection(report['selection']).label}"
    )
    print(f"{'percent, [95 % over patients]':32}{'Sp':>9}{'Se':>9}{'Score':>9}")
    for part, rule, label in (
        ("val", "chosen", "validation"),
        ("test", "chosen", "test"),
        ("test", "default", "test, thresholds at .5"),
    ):
        if part in report:
            metrics = report[part]["metrics"][rule]
            print(figure_row(label, metrics))
            if part == "test" and rule == "chosen" and "collapsed_score" in metrics:
                print(figure_row("test, collapsed to 2 classes", metrics, "collapsed_"))
    print(f"\nrun folder   {folder.path}")
    print(f"checkpoint   {published_best(config) if published else folder.best}")
    if config.mlflow.enabled:
        uri = config.mlflow.tracking_uri
        opens = uri if uri.startswith("http") else ui_command(uri)
        print(f"MLflow       {opens}")


def published_best(config: RunConfig) -> Path:
    """Where the best checkpoint of a variant's latest finished plain run is copied to."""
    return Path(config.training.checkpoint_dir) / f"{VARIANTS[config.variant].short}_best.pt"


def ui_command(uri: str) -> str:
    """The command that shows a tracking database, in the environment at hand."""
    if uri == "sqlite:///mlflow.db" and Path(sys.prefix) == Path(".venv").resolve():
        return "make ui"
    return (
        f"MLFLOW_DISABLE_TELEMETRY=true python -m mlflow ui --backend-store-uri {shlex.quote(uri)}"
    )


def figure_row(label: str, metrics: dict[str, Any], prefix: str = "") -> str:
    """Sp, Se and Score with its interval, in columns of 32 and 9 characters."""
    values = [metrics[f"{prefix}{name}"] for name in ("sp", "se", "score")]
    shown = "".join(f"{number(value['value']):>9}" for value in values)
    low, high = (number(values[-1][end], 1) for end in ("low", "high"))
    return f"{label:32}{shown}  [{low}, {high}]"
