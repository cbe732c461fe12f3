"""The ICBHI Score and its companions, and the choice of decision thresholds.

Sp, Se and Score are percentages (0..100), as the field prints them; every other rate is in 0..1,
as scikit-learn gives it. A metric that the data cannot support (no normal cycle, one class only)
is NaN, never an exception. N cycles, K outputs, C label columns.

Score: B. M. Rocha et al., "An open access database for the evaluation of respiratory sound
classification algorithms", Physiol. Meas. 40 (2019) 035001.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
from sklearn.metrics import (
    average_precision_score,
    roc_auc_score,
    roc_curve,
)

from data.task import Task

log = logging.getLogger(__name__)

#: Candidate thresholds; k / 100 is the float nearest to the printed number.
GRID: np.ndarray = np.arange(2, 99) / 100
#: Scores (percentage points) closer than this are ties.
TIE = 1e-9


class Score(NamedTuple):
    """Specificity, sensitivity and their mean, in percent."""

    sp: float
    se: float
    score: float


def rate(numerator: float, denominator: float) -> float:
    """Percentage, NaN for an empty denominator."""
    return 100.0 * float(numerator) / float(denominator) if denominator else float("nan")


def sp_se_score(true: np.ndarray, pred: np.ndarray) -> Score:
    """Sp = normal predicted normal / normal; Se = abnormal with their exact class / abnormal.

    Args:
        true, pred: [N] classes, 0 is normal.
    """
    true, pred = np.asarray(true), np.asarray(pred)
    normal, correct = true == 0, true == pred
    sp = rate((normal & correct).sum(), normal.sum())
    se = rate((~normal & correct).sum(), (~normal).sum())
    return Score(sp, se, (sp + se) / 2)


def collapse(classes: np.ndarray) -> np.ndarray:
    """Four classes [N] -> normal 0, abnormal 1."""
    return (np.asarray(classes) > 0).astype(np.int64)


def confusion(task: Task, true: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """Cycle counts [classes, classes]; rows are the truth, columns the prediction."""
    n = len(task.classes)
    cell = np.asarray(true, np.int64) * n + np.asarray(pred, np.int64)
    return np.bincount(cell, minlength=n * n).reshape(n, n)


def _passing(probability: np.ndarray) -> np.ndarray:
    """Number of `GRID` thresholds that each probability reaches; g passes when j < this."""
    return np.searchsorted(GRID, np.asarray(probability, np.float64), side="right")


def _scores_on_grid(task: Task, probability: np.ndarray, true: np.ndarray):
    """Sp and Se in percent at every grid point: arrays [97] (one threshold) or [97, 97].

    Each cycle falls into a cell of a histogram over "how many thresholds it reaches"; cumulative
    sums of the histograms then count the cycles of each predicted class at all grid points at once.
    """
    normal, abnormal = (true == 0).sum(), (true > 0).sum()
    bins = len(GRID) + 1
    if task.n_thresholds == 1:
        reached = _passing(task.abnormal_score(probability))
        # Se counts an abnormal cycle only if the class it would get is the right one
        named = task.predicted_classes(probability, (-1.0,)) == true
        below = np.bincount(reached[true == 0], minlength=bins).cumsum()[:-1]
        hit = np.bincount(reached[(true > 0) & named], minlength=bins)
        return 100 * below / normal, 100 * (hit.sum() - hit.cumsum()[:-1]) / abnormal

    first, second = _passing(probability[:, 0]), _passing(probability[:, 1])

    def histogram(cls: int) -> np.ndarray:
        of = true == cls
        flat = np.bincount(first[of] * bins + second[of], minlength=bins * bins)
        return flat.reshape(bins, bins)

    def below(h, axis):  # cycles that do not reach the threshold
        return np.delete(h.cumsum(axis), -1, axis)

    def above(h, axis):
        return h.sum(axis, keepdims=True) - below(h, axis)

    right = {0: (below, below), 1: (above, below), 2: (below, above), 3: (above, above)}
    correct = [second_(first_(histogram(c), 0), 1) for c, (first_, second_) in right.items()]
    return 100 * correct[0] / normal, 100 * sum(correct[1:]) / abnormal


def usable_groups(true: np.ndarray, groups: np.ndarray) -> dict[str, np.ndarray]:
    """Value of a group -> mask [N] of its cycles, of the groups that have a Score: those with
    normal and abnormal cycles."""
    masks = {value: groups == value for value in sorted(set(groups.tolist()))}
    return {v: m for v, m in masks.items() if 0 < (true[m] > 0).sum() < m.sum()}


def group_score(true: np.ndarray, pred: np.ndarray, groups: np.ndarray) -> float:
    """Mean Score of `usable_groups`; true, pred: [N] classes, groups: [N] values."""
    masks = usable_groups(true, groups).values()
    return float(np.mean([sp_se_score(true[m], pred[m]).score for m in masks]))


def choose_thresholds(
    task: Task,
    probability: np.ndarray,
    label: np.ndarray,
    min_sensitivity: float = 0.0,
    groups: np.ndarray | None = None,
) -> tuple[float, ...]:
    """Grid search (0.02 ... 0.98, step 0.01, all thresholds jointly) for the best Score.

    Ties go to the point nearest 0.5 (largest deviation first, then their sum, then the smaller
    thresholds). If no point reaches `min_sensitivity`, the most sensitive one with the best Score
    is taken, with a warning.

    Args:
        probability: [N, K] of the part on which thresholds may be chosen.
        label: [N, C].
        min_sensitivity: least Se, in 0..1.
        groups: [N] values; Sp, Se and Score are then means over `usable_groups`.
    """
    probability = np.asarray(probability, np.float64)
    true = task.true_classes(label)
    if not (true == 0).any() or not (true > 0).any():
        log.warning("thresholds stay at 0.5: this part lacks normal or abnormal cycles")
        return task.default_thresholds
    parts = [slice(None)] if groups is None else usable_groups(true, groups).values()
    rates = [_scores_on_grid(task, probability[part], true[part]) for part in parts]
    sp, se = (np.mean([np.ravel(one[k]) for one in rates], axis=0) for k in range(2))
    allowed = se >= 100 * min_sensitivity - TIE
    if not allowed.any():
        log.warning(
            "no threshold reaches a sensitivity of %.1f %%; the most sensitive has %.1f %%",
            100 * min_sensitivity,
            se.max(),
        )
        allowed = se >= se.max() - TIE
    score = np.where(allowed, (sp + se) / 2, -np.inf)
    axes = np.meshgrid(*[GRID] * task.n_thresholds, indexing="ij")
    points = np.stack([axis.ravel() for axis in axes], axis=1)
    best = np.flatnonzero(score >= score.max() - TIE)
    deviation = np.abs(points[best] - 0.5).round(6)
    order = np.lexsort((best, deviation.sum(1), deviation.max(1)))
    return tuple(float(value) for value in points[best[order[0]]])


def output_targets(task: Task, label: np.ndarray) -> np.ndarray:
    """label [N, C] -> [N, K] 0/1: what each output should say."""
    label = (np.asarray(label) > 0.5).astype(np.int64)
    if not task.exclusive:
        return label
    return (task.true_classes(label)[:, None] == np.arange(len(task.classes))).astype(np.int64)


def _ranking(target: np.ndarray, value: np.ndarray) -> tuple[float, float]:
    """AUROC and average precision; NaN where one of the two classes is missing."""
    if len(np.unique(target)) < 2:
        return float("nan"), float("nan")
    return float(roc_auc_score(target, value)), float(average_precision_score(target, value))


def metrics_of(tables: np.ndarray) -> dict[str, np.ndarray]:
    """Confusion matrices [..., C, C] -> metric name -> values [...], NaN where undefined.

    `sp`, `se`, `score` and, for four classes, `collapsed_*` (the same predictions read as normal
    against abnormal) in percent; `accuracy`, `macro_f1`, `precision_<class>`, `recall_<class>`,
    `f1_<class>` in 0..1.
    """
    tables = np.asarray(tables, np.float64)
    diagonal = np.diagonal(tables, axis1=-2, axis2=-1)
    truth, predicted, total = tables.sum(-1), tables.sum(-2), tables.sum((-2, -1))
    with np.errstate(divide="ignore", invalid="ignore"):
        abnormal = truth[..., 1:].sum(-1)
        sp = 100 * diagonal[..., 0] / truth[..., 0]
        se = 100 * diagonal[..., 1:].sum(-1) / abnormal
        out = {"sp": sp, "se": se, "score": (sp + se) / 2}
        if tables.shape[-1] > 2:
            caught = 100 * tables[..., 1:, 1:].sum((-2, -1)) / abnormal
            out |= {"collapsed_sp": sp, "collapsed_se": caught}
            out["collapsed_score"] = (sp + caught) / 2
        out["accuracy"] = diagonal.sum(-1) / total
        f1 = 2 * diagonal / (truth + predicted)
        present = ~np.isnan(f1)
        out["macro_f1"] = np.where(present, f1, 0).sum(-1) / present.sum(-1)
        per_class = {"precision": diagonal / predicted, "recall": diagonal / truth, "f1": f1}
    for k, cls in enumerate(Task(tables.shape[-1]).classes):
        out |= {f"{name}_{cls}": values[..., k] for name, values in per_class.items()}
    return out


def summarise(
    task: Task, probability: np.ndarray, label: np.ndarray, thresholds: tuple[float, ...]
) -> dict[str, float]:
    """`metrics_of` one part, and `auroc_macro` (mean over `event_targets`), `auroc_<output>`,
    `ap_<output>` and, for four classes, `auroc_any`, `ap_any` (normal against abnormal) in 0..1.

    Args:
        probability: [N, K]; label: [N, C]; thresholds: as `Task.predicted_classes` takes them.
    """
    probability = np.asarray(probability, np.float64)
    pred = task.predicted_classes(probability, thresholds)
    table = confusion(task, task.true_classes(label), pred)
    out = {name: float(value) for name, value in metrics_of(table).items()}
    events = event_targets(task, probability, label)
    out["auroc_macro"] = float(np.mean([_ranking(*event)[0] for event in events]))
    for name, (target, value) in ranked_targets(task, probability, label).items():
        out[f"auroc_{name}"], out[f"ap_{name}"] = _ranking(target, value)
    return out


def ranked_targets(
    task: Task, probability: np.ndarray, label: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What AUROC and average precision judge: name -> target [N] 0/1, value [N].

    Each output by itself and, for four classes, `any`: normal against abnormal.
    """
    targets = output_targets(task, label)
    out = {name: (targets[:, k], probability[:, k]) for k, name in enumerate(task.outputs)}
    if task.n_cls == 4:
        out["any"] = collapse(task.true_classes(label)), task.abnormal_score(probability)
    return out


def event_targets(
    task: Task, probability: np.ndarray, label: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """What the macro AUROC is the mean of: (target [N] 0/1, probability [N]) of crackle and of
    wheeze, whichever other event is there; of abnormal where there are two classes."""
    label = (np.asarray(label) > 0.5).astype(np.int64)
    if task.exclusive:  # normal, crackle, wheeze, both
        probability = probability @ np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
    return [(label[:, k], probability[:, k]) for k in range(label.shape[1])]


def operating_curve(task: Task, probability: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Sensitivity against specificity, normal against anything abnormal, over all thresholds.

    Returns:
        [points, 3]: Se in percent, Sp in percent, threshold on `Task.abnormal_score` (the first
        point, at which nothing is called abnormal, has an infinite threshold). Empty where one of
        the two classes is missing.
    """
    target = collapse(task.true_classes(label))
    if len(np.unique(target)) < 2:
        return np.empty((0, 3))
    value = task.abnormal_score(np.asarray(probability, np.float64))
    false_alarm, se, threshold = roc_curve(target, value)
    return np.stack([100 * se, 100 * (1 - false_alarm), threshold], axis=1)
