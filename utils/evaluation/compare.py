"""Trained models compared on the same test cycles: paired patient bootstrap."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from utils.common.errors import UserError
from utils.common.files import write_json, write_text
from utils.evaluation.model_report import baselines_of, stored
from utils.evaluation.render import NOTHING, markdown_table, number, shown
from utils.evaluation.report import Baseline, Comparison, compare_predictions, ranking
from utils.evaluation.trained_model import TrainedModel
from utils.metrics.bootstrap import (
    Interval,
    macro_auroc_bootstrap,
    patient_bootstrap,
    patient_tables,
)
from utils.metrics.predictions import class_numbers
from utils.metrics.protocol import LEAKY_MARK, PARTIAL_MARK, SYNTHETIC_MARK, Selection, warnings

logger = logging.getLogger(__name__)

#: Metrics of the printed tables; comparison.json has all of them.
SHOWN = {
    "sp": "Sp",
    "se": "Se",
    "score": "Score",
    "auroc_macro": "Macro AUROC",
    "collapsed_score": "Score, collapsed to 2 classes",
}
KEY = ["recording", "cycle_index"]


@dataclass
class Compared:
    """One of the models; figures: metric -> value with its interval."""

    name: str
    run: str
    checkpoint: str
    selection: str
    seed: int
    figures: dict[str, Interval]


@dataclass
class Result:
    """comparison.json: the models, every pair of them, and the first one's baselines."""

    task: dict[str, int]
    models: list[Compared]
    pairs: list[Comparison]
    floors: dict[str, Baseline]
    notes: list[str]
    partial: bool
    partial_message: str
    synthetic: bool
    leaky: bool
    counts: dict[str, int]
    bootstrap: int

    def to_dict(self) -> dict[str, Any]:
        out = asdict(self)
        out["floors"] = {n: {"metrics": one["metrics"]} for n, one in out["floors"].items()}
        return out


def compare(models: Sequence[TrainedModel], *, bootstrap: int = 10_000) -> Result:
    """Every pair of models on the test part.

    A model's predictions are taken from its run's folder where they are the checkpoint's for sure;
    otherwise they are computed.

    Raises:
        UserError: other tasks, other test cycles, the same model twice, metrics selected on the
            test part next to honest ones, a leaky split next to another.
    """
    _same_task(models)
    _same_honesty(models)
    _same_leak(models)
    names = _names(models)
    frames, baselines = {}, {}
    for name, model in zip(names, models, strict=True):
        found = stored(model)
        if found is not None:
            logger.info("%s: predictions of %s", name, model.run_folder.path)
        frames[name] = model.predictions("test") if found is None else found[0]
        baselines = baselines or (baselines_of(model) if found is None else found[1])
    _same_cycles(frames)
    task, first = models[0].task, frames[names[0]]
    rows = []
    for name, model in zip(names, models, strict=True):
        frame = frames[name]
        true, pred = (class_numbers(frame, task, c) for c in ("true_class", "pred_class"))
        _, tables = patient_tables(true, pred, frame["patient"], len(task.classes))
        auroc = macro_auroc_bootstrap([ranking(frame, task)], frame["patient"])
        rows.append(
            Compared(
                name=name,
                run=model.checkpoint.run,
                checkpoint=str(model.path),
                selection=model.selection.value,
                seed=model.config.training.seed,
                figures=patient_bootstrap(tables) | {"auroc_macro": auroc},
            )
        )
    partial = next((m.checkpoint.partial for m in models if m.checkpoint.partial), "")
    if any(model.other_folder for model in models):
        partial = models[0].partial_message() or partial
    return Result(
        task={"n_cls": task.n_cls},
        models=rows,
        pairs=compare_predictions(frames, task, bootstrap=bootstrap),
        floors=baselines,
        notes=_notes(models, len(names)),
        partial=bool(partial),
        partial_message=partial,
        synthetic=any(model.synthetic for model in models),
        leaky=models[0].leaky,
        counts={"cycles": len(first), "patients": int(first["patient"].nunique())},
        bootstrap=bootstrap,
    )


def _same_task(models: Sequence[TrainedModel]) -> None:
    first = models[0]
    for other in models[1:]:
        if other.task.n_cls != first.task.n_cls:
            raise UserError(
                f"{first.path} has {first.task.n_cls} classes and {other.path} {other.task.n_cls}: "
                "they answer different questions and cannot be compared; train both with "
                "the same dataset.n_cls"
            )


def _same_honesty(models: Sequence[TrainedModel]) -> None:
    by_rule = {model.selection: model.path for model in models}
    honest = next((path for rule, path in by_rule.items() if rule.honest), None)
    biased = by_rule.get(Selection.TEST)
    if honest is not None and biased is not None:
        raise UserError(
            f"{biased} was selected on the test part and {honest} was not: their "
            "difference would be that of the rules, so they are never put into one table; train "
            "both with the same training.selection"
        )


def _same_leak(models: Sequence[TrainedModel]) -> None:
    by_leak = {model.leaky: model for model in models}
    if len(by_leak) > 1:
        raise UserError(
            f"{by_leak[True].path} was tested on patients of its training part "
            f"(dataset.split_strategy={by_leak[True].config.dataset.split_strategy}) and "
            f"{by_leak[False].path} was not: they are never put into one table; train both with "
            "the same dataset.split_strategy"
        )


def _names(models: Sequence[TrainedModel]) -> list[str]:
    """Titles where these are distinct, else run names."""
    runs = [model.checkpoint.run for model in models]
    if twice := next((run for run in runs if runs.count(run) > 1), None):
        raise UserError(f"{twice} is given twice; name each model once")
    titles = [model.title for model in models]
    return [t if titles.count(t) == 1 else r for t, r in zip(titles, runs, strict=True)]


def _same_cycles(frames: Mapping[str, pd.DataFrame]) -> None:
    (reference, first), *others = (
        (name, frame.set_index(KEY)["true_class"].sort_index()) for name, frame in frames.items()
    )
    for name, labels in others:
        if first.equals(labels):
            continue
        missing = first.index.symmetric_difference(labels.index)
        example = missing[0] if len(missing) else first.index[(first != labels).argmax()]
        raise UserError(
            f"{reference} was tested on {len(first):,} cycles and {name} on {len(labels):,}, and "
            f"they are not the same with the same labels (first difference: cycle {example[1]} of "
            f"{example[0]}); a paired comparison needs equal test parts: the same split and data, "
            "or --data-folder for all"
        )


def _notes(models: Sequence[TrainedModel], n: int) -> list[str]:
    rules = {model.selection for model in models}
    notes = [rule.statement for rule in Selection if rule in rules]
    if len(rules) > 1:
        marks = ", ".join(rule.label for rule in Selection if rule in rules)
        notes.insert(0, f"DIFFERENT SELECTION RULES ({marks}): the difference is not that of the "
                        "models alone.")  # fmt: skip
        logger.warning("%s", notes[0])
    if n > 2:
        notes.append(
            f"{n * (n - 1) // 2} pairs: with many comparisons some p fall below 0.05 by chance; "
            "nothing corrects for that."
        )
    return notes


def comparison_markdown(result: Result) -> str:
    """The models' metrics and their differences."""
    rules = {model.selection for model in result.models}
    marks = [rule.label for rule in Selection if rule in rules]
    marks += [PARTIAL_MARK] * result.partial + [SYNTHETIC_MARK] * result.synthetic
    marks += [LEAKY_MARK] * result.leaky
    cycles, patients = result.counts["cycles"], result.counts["patients"]
    where = f"test part: {cycles:,} cycles of {patients} patients ({'; '.join(marks)})"
    lines = [f"# Comparison, {result.task['n_cls']}-class", ""]
    for warning in warnings(result.partial_message, result.synthetic, result.leaky):
        lines += [f"**{warning}**", ""]
    keys = [key for key in SHOWN if key in result.models[0].figures]
    lines += [f"**Metrics in percent with 95 % intervals over patients, {where}**", ""]
    rows = [
        [m.name, *(shown(k, m.figures[k], 1) for k in keys), m.selection, f"`{m.run}`"]
        for m in result.models
    ]
    for name, baseline in result.floors.items():
        found = baseline.metrics["chosen"]
        values = [shown(key, found[key], 1) if key in found else NOTHING for key in keys]
        rows.append([f"baseline: {name}", *values, NOTHING, NOTHING])
    lines += markdown_table(["model", *(SHOWN[key] for key in keys), "selection", "run"], rows)
    lines += [
        f"**Paired differences in points (AUROC: 0 to 1) over resampled patients, {where}**",
        "",
    ]
    rows = [
        [f"{pair.second} − {pair.first}", SHOWN[pair.figure], shown(pair.figure, pair),
         number(pair.p, 4)]
        for pair in result.pairs
        if pair.figure in SHOWN
    ]  # fmt: skip
    lines += markdown_table(["second minus first", "metric", "difference [95 %]", "p"], rows)
    return "\n".join([*lines, *(f"> {note}  " for note in result.notes)]) + "\n"


def write_comparison(result: Result, folder: Path) -> Path:
    """comparison.json and comparison.md; returns the latter."""
    write_json(folder / "comparison.json", result.to_dict())
    path = folder / "comparison.md"
    write_text(path, comparison_markdown(result))
    return path


def default_folder(models: Sequence[TrainedModel]) -> Path:
    """A folder that belongs to these models in this order, next to the first one's run folder or,
    where that is missing, to its checkpoint."""
    text = json.dumps([model.checkpoint.run for model in models])
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    own = models[0].run_folder
    return (own.path.parent if own else models[0].path.parent) / f"comparison-{digest}"
