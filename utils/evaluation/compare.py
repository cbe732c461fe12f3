"""Trained models against each other on the same test cycles: paired patient bootstrap."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from utils.common.errors import UserError
from utils.common.files import write_json, write_text
from utils.evaluation.render import NOTHING, markdown_table, number, with_interval
from utils.evaluation.report import compare_predictions
from utils.evaluation.trained_model import Evaluator
from utils.metrics.bootstrap import patient_bootstrap, patient_tables
from utils.metrics.predictions import class_numbers
from utils.metrics.protocol import (
    PARTIAL_MARK,
    SYNTHETIC_MARK,
    SYNTHETIC_NOTE,
    Selection,
)

logger = logging.getLogger(__name__)

#: Figures of the printed tables; comparison.json has all of them.
SHOWN = {
    "sp": "Sp",
    "se": "Se",
    "score": "Score",
    "collapsed_score": "Score, collapsed to 2 classes",
}
KEY = ["recording", "cycle_index"]


def compare(models: Sequence[Evaluator], *, bootstrap: int = 10_000) -> dict[str, Any]:
    """Every pair of models on the test part.

    A model's predictions are taken from its run's folder where they are the checkpoint's for sure;
    otherwise they are computed.

    Returns:
        `models` (name, run, checkpoint, selection, figures with intervals), `pairs` as
        `compare_predictions` gives them, `floors` of the first model, `notes`, `partial`,
        `synthetic`, `counts`.

    Raises:
        UserError: other tasks, other test cycles, the same model twice, figures selected on the
            test part beside honest ones.
    """
    _same_task(models)
    _same_honesty(models)
    names = _names(models)
    frames, floors = {}, {}
    for name, model in zip(names, models, strict=True):
        stored = model.stored()
        if stored is not None:
            logger.info("%s: predictions of %s", name, model.run_folder.path)
        frames[name] = model.predictions("test") if stored is None else stored[0]
        floors = floors or (model.floors() if stored is None else stored[1])
    _same_cycles(frames)
    task = models[0].task
    pairs = compare_predictions(frames, task, bootstrap=bootstrap)
    first = frames[names[0]]
    rows = []
    for name, model in zip(names, models, strict=True):
        _, tables = patient_tables(
            class_numbers(frames[name], task),
            class_numbers(frames[name], task, "pred_class"),
            frames[name]["patient"],
            len(task.classes),
        )
        found = patient_bootstrap(tables)
        row = {"name": name, "run": model.checkpoint.run, "checkpoint": str(model.path)}
        row |= {"selection": model.checkpoint.selection, "seed": model.config.training.seed}
        rows.append(row | {"figures": {key: vars(value) for key, value in found.items()}})
    partial = next((m.checkpoint.partial for m in models if m.checkpoint.partial), "")
    if any(model.other_folder for model in models):
        partial = models[0].partial_message() or partial
    return {
        "task": {"n_cls": task.n_cls},
        "models": rows,
        "pairs": pairs,
        "floors": {name: {"metrics": floor["metrics"]} for name, floor in floors.items()},
        "notes": _notes(models, len(names)),
        "partial": bool(partial),
        "partial_message": partial,
        "synthetic": any(model.synthetic for model in models),
        "counts": {"cycles": len(first), "patients": int(first["patient"].nunique())},
        "bootstrap": bootstrap,
    }


def _same_task(models: Sequence[Evaluator]) -> None:
    first = models[0]
    for other in models[1:]:
        if other.task.n_cls != first.task.n_cls:
            raise UserError(
                f"{first.path} has {first.task.n_cls} classes and {other.path} {other.task.n_cls}: "
                "they answer different questions and can not be compared; train both with the "
                "same dataset.n_cls"
            )


def _same_honesty(models: Sequence[Evaluator]) -> None:
    by_rule = {model.checkpoint.selection: model.path for model in models}
    honest = next((path for rule, path in by_rule.items() if rule != "test"), None)
    if honest is not None and "test" in by_rule:
        raise UserError(
            f"{by_rule['test']} was selected on the test part and {honest} was not: their "
            "difference would be that of the rules, so they never stand in one table; train both "
            "with the same training.selection"
        )


def _names(models: Sequence[Evaluator]) -> list[str]:
    """Titles where they tell the models apart, else run names."""
    runs = [model.checkpoint.run for model in models]
    if twice := next((run for run in runs if runs.count(run) > 1), None):
        raise UserError(f"{twice} is given twice; name each model once")
    titles = [model.variant.title for model in models]
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


def _notes(models: Sequence[Evaluator], n: int) -> list[str]:
    rules = {model.checkpoint.selection for model in models}
    notes = [rule.statement for rule in Selection if rule in rules]
    if len(rules) > 1:
        marks = ", ".join(rule.label for rule in Selection if rule in rules)
        notes.insert(0, f"DIFFERENT SELECTION RULES ({marks}): the difference is not that of the "
                        "models alone.")  # fmt: skip
        logger.warning("%s", notes[0])
    if n > 2:
        notes.append(
            f"{n * (n - 1) // 2} pairs: with many comparisons some p fall below .05 by chance; "
            "nothing corrects for that."
        )
    return notes


def comparison_markdown(result: Mapping[str, Any]) -> str:
    """The models' figures and their differences."""
    selections = {model["selection"] for model in result["models"]}
    marks = [rule.label for rule in Selection if rule in selections]
    marks += [PARTIAL_MARK] if result["partial"] else []
    marks = "; ".join(marks + ([SYNTHETIC_MARK] if result["synthetic"] else []))
    counts = result["counts"]
    where = f"test part: {counts['cycles']:,} cycles of {counts['patients']} patients ({marks})"
    lines = [f"# Comparison, {result['task']['n_cls']}-class", ""]
    if result["synthetic"]:
        lines += [f"**{SYNTHETIC_NOTE}**", ""]
    if result["partial"]:
        lines += [f"**{result['partial_message']}**", ""]
    shown = [key for key in SHOWN if key in result["models"][0]["figures"]]
    lines += [f"**Figures in percent with 95 % intervals over patients, {where}**", ""]
    lines += markdown_table(
        ["model", *(SHOWN[key] for key in shown), "selection", "run"],
        [
            [m["name"], *(with_interval(m["figures"][k], 1) for k in shown), m["selection"],
             f"`{m['run']}`"]
            for m in result["models"]
        ]
        + [
            [f"floor: {name}", *(with_interval(floor["metrics"]["chosen"][k], 1) for k in shown),
             NOTHING, NOTHING]
            for name, floor in result["floors"].items()
        ],
    )  # fmt: skip
    lines += [f"**Paired differences in points over resampled patients, {where}**", ""]
    lines += markdown_table(
        ["second minus first", "figure", "difference [95 %]", "p"],
        [
            [f"{row['second']} − {row['first']}", SHOWN[row["figure"]], with_interval(row),
             number(row["p"], 4)]
            for row in result["pairs"]
            if row["figure"] in SHOWN
        ],
    )  # fmt: skip
    return "\n".join([*lines, *(f"> {note}  " for note in result["notes"])]) + "\n"


def write_comparison(result: Mapping[str, Any], folder: Path) -> Path:
    """comparison.json and comparison.md; returns the latter."""
    write_json(folder / "comparison.json", result)
    path = folder / "comparison.md"
    write_text(path, comparison_markdown(result))
    return path


def default_folder(models: Sequence[Evaluator]) -> Path:
    """A folder that belongs to these models in this order, beside the first one's run folder or,
    where that is not there, beside its checkpoint."""
    text = json.dumps([model.checkpoint.run for model in models])
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    own = models[0].run_folder
    return (own.path.parent if own else models[0].path.parent) / f"comparison-{digest}"
