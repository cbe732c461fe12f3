"""The ICBHI Score and its companions, and the choice of decision thresholds.

Sp, Se and Score are percentages (0..100), as the field prints them; every other rate is in 0..1,
as scikit-learn gives it. A figure that the data can not support (no normal cycle, one class only)
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
    confusion_matrix,
    precision_recall_fscore_support,
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
    return confusion_matrix(true, pred, labels=range(len(task.classes))).astype(np.int64)


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


def choose_thresholds(
    task: Task, probability: np.ndarray, label: np.ndarray, min_sensitivity: float = 0.0
) -> tuple[float, ...]:
    """Grid search (.02 ... .98, step .01, all thresholds jointly) for the best Score.

    Ties go to the point nearest .5 (largest deviation first, then their sum, then the smaller
    thresholds). If no point reaches `min_sensitivity`, the most sensitive one with the best Score
    is taken, with a warning.

    Args:
        probability: [N, K] of the part on which thresholds may be chosen.
        label: [N, C].
        min_sensitivity: least Se, in 0..1.
    """
    probability = np.asarray(probability, np.float64)
    true = task.true_classes(label)
    if not (true == 0).any() or not (true > 0).any():
        log.warning("thresholds stay at .5: this part lacks normal or abnormal cycles")
        return task.default_thresholds
    sp, se = (np.asarray(rates).ravel() for rates in _scores_on_grid(task, probability, true))
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


def summarise(
    task: Task, probability: np.ndarray, label: np.ndarray, thresholds: tuple[float, ...]
) -> dict[str, float]:
    """All figures of one part under flat names, ready for a tracker.

    `sp`, `se`, `score` (and, for four classes, `collapsed_*`: the same predictions read as normal
    against abnormal) in percent; `accuracy`, `macro_f1`, `precision_<class>`, `recall_<class>`,
    `f1_<class>`, `auroc_<output>`, `ap_<output>` and `auroc_any`, `ap_any` (normal against
    abnormal, four-class tasks) in 0..1.

    Args:
        probability: [N, K]; label: [N, C]; thresholds: as `Task.predicted_classes` takes them.
    """
    probability = np.asarray(probability, np.float64)
    pred = task.predicted_classes(probability, thresholds)
    return summarise_classes(task, probability, label, pred)


def summarise_classes(
    task: Task, probability: np.ndarray, label: np.ndarray, pred: np.ndarray
) -> dict[str, float]:
    """`summarise` where the classes pred [N] are already decided, say with several thresholds."""
    true = task.true_classes(label)
    figures = dict(sp_se_score(true, pred)._asdict())
    if task.n_cls == 4:
        collapsed = sp_se_score(collapse(true), collapse(pred))
        figures |= {f"collapsed_{name}": value for name, value in collapsed._asdict().items()}
    figures["accuracy"] = float((true == pred).mean()) if len(true) else float("nan")

    precision, recall, f1 = _per_class(task, true, pred)
    present = f1[~np.isnan(f1)]
    figures["macro_f1"] = float(present.mean()) if len(present) else float("nan")
    for name, p, r, f in zip(task.classes, precision, recall, f1, strict=True):
        figures |= {f"precision_{name}": float(p), f"recall_{name}": float(r)}
        figures[f"f1_{name}"] = float(f)

    targets = output_targets(task, label)
    for k, name in enumerate(task.outputs):
        auroc, ap = _ranking(targets[:, k], probability[:, k])
        figures |= {f"auroc_{name}": auroc, f"ap_{name}": ap}
    if task.n_cls == 4:
        auroc, ap = _ranking(collapse(true), task.abnormal_score(probability))
        figures |= {"auroc_any": auroc, "ap_any": ap}
    return figures


def _per_class(task: Task, true: np.ndarray, pred: np.ndarray):
    """Precision, recall, F1, each [classes]; NaN where the quotient is 0 / 0."""
    if not len(true):
        return (np.full(len(task.classes), np.nan),) * 3
    return precision_recall_fscore_support(
        true, pred, labels=range(len(task.classes)), zero_division=np.nan
    )[:3]


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
