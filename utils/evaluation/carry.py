"""What the metadata carry: how much they say about the label in each part, and whom that serves.

A field that says much about the label in training and little, or the contrary, in the test part is
a prior that a model will learn and that will mislead it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from data.fields import field_values
from data.splits import Split
from data.task import FIELDS, Task
from utils.evaluation.baselines import PRIOR, baseline_logits, baseline_rule
from utils.metrics.bootstrap import patient_bootstrap, patient_tables

PARTS = ("train", "val", "test")
#: What a field belongs to: its values are permuted among these.
UNITS = {"device": "PID", "site": "Filename", "age": "PID", "bmi": "PID", "duration": None}


def mutual_information(x: np.ndarray, y: np.ndarray) -> float:
    """Plug-in estimate in bits: H(x) + H(y) - H(x, y) of the observed frequencies.

    Args:
        x, y: [N] whole numbers from 0.
    """

    def entropy(values: np.ndarray) -> float:
        share = np.bincount(values) / len(values)
        share = share[share > 0]
        return float(-(share * np.log2(share)).sum())

    return entropy(x) + entropy(y) - entropy(x * (y.max() + 1) + y)


def information(
    table: pd.DataFrame, classes: np.ndarray, field: str, *, permutations: int = 200, seed: int = 0
) -> dict[str, float]:
    """Mutual information of a field (in bins, `data.fields`) with the class, in bits.

    The plug-in estimate is too large by what chance alone gives, which with few patients is much:
    cycles of a patient share device, age and BMI, and their labels resemble each other. `expected`
    is its mean when the field's values are permuted among patients (site: recordings; duration:
    cycles; of several values of a patient the most frequent), `excess` the estimate minus it, p the
    share of permutations that reach the estimate, (k + 1) / (n + 1).

    Args:
        table: rows [N] of the cycle table; classes: [N].
    """
    _, values = np.unique(field_values(table, [field]).astype(str), return_inverse=True)
    bits = mutual_information(values, classes)
    unit = np.arange(len(table)) if UNITS[field] is None else pd.factorize(table[UNITS[field]])[0]
    counts = np.zeros((unit.max() + 1, values.max() + 1))
    np.add.at(counts, (unit, values), 1)
    own = counts.argmax(axis=1)  # [units]
    rng = np.random.default_rng(seed)
    drawn = [mutual_information(rng.permutation(own)[unit], classes) for _ in range(permutations)]
    p = (np.sum(np.array(drawn) >= bits - 1e-12) + 1) / (permutations + 1)
    expected = float(np.mean(drawn))
    return {"bits": bits, "expected": expected, "excess": bits - expected, "p": float(p)}


def carried(
    task: Task,
    table: pd.DataFrame,
    split: Split,
    *,
    selection: str,
    pos_weight: Sequence[float] | None,
    thresholds: str,
    min_sensitivity: float,
    bootstrap: int = 2000,
) -> dict[str, list[dict[str, Any]]]:
    """`information` of every field in every part, and the Score of the metadata-only baselines on
    each, with its patient interval; arguments as for `baseline_predictions`.

    Returns:
        `information`: rows field, part, cycles and the figures; `baselines`: rows baseline, part,
        score (value, low, high).
    """
    label = task.labels(table["Crackles"].to_numpy(), table["Wheezes"].to_numpy())
    classes = task.true_classes(label)
    parts = {part: rows for part in PARTS if len(rows := getattr(split, part))}
    found = [
        {"field": field, "part": part, "cycles": len(rows)}
        | information(table.iloc[rows], classes[rows], field)
        for field in FIELDS
        for part, rows in parts.items()
    ]
    scores = []
    for name, logits in baseline_logits(task, table, split, pos_weight).items():
        if name == PRIOR:
            continue
        rule = baseline_rule(task, logits, label, split, selection, thresholds, min_sensitivity)
        pred = task.predicted_classes(task.probabilities(logits), rule)
        for part, rows in parts.items():
            patient = table["PID"].to_numpy()[rows]
            _, tables = patient_tables(classes[rows], pred[rows], patient, len(task.classes))
            score = patient_bootstrap(tables, resamples=bootstrap)["score"]
            scores.append({"baseline": name, "part": part, "score": asdict(score)})
    return {"information": found, "baselines": scores}
