"""Predictions of one model on one part -> everything that is reported about it.

`evaluate_predictions` is a pure function of the predictions table; the report is plain data
(JSON) that `utils.evaluation.render` turns into Markdown and `result_tables` collects
over runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from data.task import Task
from utils.common.files import plain
from utils.metrics import predictions as table
from utils.metrics.bootstrap import (
    aligned_tables,
    auroc_bootstrap,
    average_precision_bootstrap,
    paired_bootstrap,
    patient_bootstrap,
    patient_tables,
)
from utils.metrics.calibration import calibration_report
from utils.metrics.protocol import Selection
from utils.metrics.score import confusion, operating_curve, ranked_targets
from utils.metrics.subgroups import subgroup_table

#: Points of the operating curve that a report keeps.
CURVE_POINTS = 200


def evaluate_predictions(
    predictions: pd.DataFrame,
    task: Task,
    thresholds: tuple[float, ...] | None,
    *,
    selection: str,
    val_predictions: pd.DataFrame | None = None,
    pos_weight: Sequence[float] | None = None,
    partial_message: str = "",
    synthetic: bool = False,
    bootstrap: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Report of one part.

    Args:
        predictions: predictions table of the part.
        thresholds: the chosen ones; figures at the default of .5 stand beside them. None: the
            table's `pred_class` is the decision (pooled folds, each with thresholds of its own).
        selection: training.selection of the run.
        val_predictions: where calibration may be fitted; None or empty where there is none.
        pos_weight: [K] of the training loss, None where it had none.
        partial_message: what is missing from the database; empty when nothing is.
        synthetic: the recordings were generated.
        bootstrap: resamples of the patients; seed: of their choice.

    Returns:
        Plain data for JSON (undefined figures are None): `task`, `protocol`, `partial`,
        `partial_message`, `synthetic`, `counts`, `thresholds`, `metrics` (per rule: figure ->
        value, low, high), `confusion`, `operating_curve`, `calibration`, `subgroups`, and, so that
        reports of several runs can be resampled together, `patients` [P] with their confusion
        matrices at the chosen thresholds, `patient_tables` [P, C * C].
    """
    probability, label = table.probabilities(predictions, task), table.labels(predictions, task)
    true = task.true_classes(label)
    rules = {"chosen": thresholds, "default": task.default_thresholds}
    decisions = {
        "chosen": table.class_numbers(predictions, task, "pred_class")
        if thresholds is None
        else task.predicted_classes(probability, thresholds),
        "default": task.predicted_classes(probability, task.default_thresholds),
    }
    ranking = _ranking_intervals(task, predictions, probability, label, bootstrap, seed)
    metrics, confusions, tables = {}, {}, {}
    for name, pred in decisions.items():
        patients, tables[name] = patient_tables(
            true, pred, predictions["patient"], len(task.classes)
        )
        figures = patient_bootstrap(tables[name], resamples=bootstrap, seed=seed) | ranking
        metrics[name] = {key: asdict(interval) for key, interval in figures.items()}
        confusions[name] = confusion(task, true, pred).tolist()
    decided = predictions.assign(pred_class=np.array(task.classes)[decisions["chosen"]])
    fit = {}
    if val_predictions is not None and len(val_predictions):
        fit["val_probability"] = table.probabilities(val_predictions, task)
        fit["val_label"] = table.labels(val_predictions, task)
    return plain(
        {
            "task": {"n_cls": task.n_cls, "exclusive": task.exclusive}
            | {"outputs": task.outputs, "classes": task.classes},
            "protocol": {"selection": selection, "statement": Selection(selection).statement}
            | {"bootstrap": bootstrap, "bootstrap_seed": seed, "unit": "patient"},
            "partial": bool(partial_message),
            "partial_message": partial_message,
            "synthetic": synthetic,
            "counts": count(predictions, task),
            "thresholds": rules,
            "metrics": metrics,
            "confusion": {"classes": task.classes, **confusions},
            "operating_curve": _thinned(operating_curve(task, probability, label)),
            "calibration": calibration_report(
                task, probability, label, pos_weight=pos_weight, **fit
            ),
            "subgroups": subgroup_table(decided, task).to_dict("records"),
            "patients": patients,
            "patient_tables": tables["chosen"].reshape(len(patients), -1),
        }
    )


def compare_predictions(
    named: Mapping[str, pd.DataFrame], task: Task, *, bootstrap: int = 10_000, seed: int = 0
) -> list[dict[str, Any]]:
    """Paired patient bootstrap of every pair of models, second minus first.

    Args:
        named: name -> predictions table, all over the same cycles, decided by `pred_class`.

    Returns:
        Rows `first`, `second`, `figure`, `value`, `low`, `high` (points), `p`.

    Raises:
        ValueError: the tables do not hold the same cycles.
    """
    names = list(named)
    _, tables = aligned_tables(named[names[0]], [named[n] for n in names[1:]], task.classes)
    rows = []
    for i, first in enumerate(names):
        for j in range(i + 1, len(names)):
            found = paired_bootstrap(tables[i], tables[j], resamples=bootstrap, seed=seed)
            for figure, difference in found.items():
                rows.append({"first": first, "second": names[j], "figure": figure}
                            | asdict(difference))  # fmt: skip
    return plain(rows)


def count(predictions: pd.DataFrame, task: Task) -> dict[str, int]:
    """Cycles, recordings, patients and cycles per class."""
    out = {
        "cycles": len(predictions),
        "recordings": int(predictions["recording"].nunique()),
        "patients": int(predictions["patient"].nunique()),
    }
    return out | {name: int((predictions["true_class"] == name).sum()) for name in task.classes}


def _ranking_intervals(task, predictions, probability, label, resamples, seed):
    """AUROC and average precision per output, and of normal against abnormal for four classes,
    with intervals."""
    patient, options = predictions["patient"], {"resamples": resamples, "seed": seed}
    out = {}
    for name, (target, value) in ranked_targets(task, probability, label).items():
        out[f"auroc_{name}"] = auroc_bootstrap(target, value, patient, **options)
        out[f"ap_{name}"] = average_precision_bootstrap(target, value, patient, **options)
    return out


def _thinned(curve: np.ndarray) -> dict[str, list]:
    """At most `CURVE_POINTS` points of [points, 3], evenly over them, both ends kept."""
    keep = np.unique(np.linspace(0, len(curve) - 1, CURVE_POINTS).round().astype(int))
    curve = curve[keep] if len(curve) else curve
    return {name: curve[:, k].tolist() for k, name in enumerate(("se", "sp", "threshold"))}
