"""Do the probabilities mean what they say?

Training weighs positives by pos_weight w, which makes the best sigmoid sigma(z) = w p / (w p + 1 -
p), hence z = logit(p) + log w: the logits are shifted by log w on purpose. Calibration is judged
after undoing that, by subtraction or by a slope and an intercept fitted on validation (J. Platt,
"Probabilistic outputs for support vector machines", 1999).

Each output is judged by itself; N cycles, K outputs, probabilities in 0..1.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from data.task import Task
from utils.metrics.score import output_targets

BINS = 10


def log_odds(probability: np.ndarray) -> np.ndarray:
    """logit(p), finite: probabilities are kept 1e-12 away from 0 and 1."""
    p = np.clip(np.asarray(probability, np.float64), 1e-12, 1 - 1e-12)
    return np.log(p) - np.log1p(-p)


def undo_pos_weight(logits: np.ndarray, pos_weight) -> np.ndarray:
    """Logits [N, K] without the shift that pos_weight [K] trained into them."""
    return np.asarray(logits, np.float64) - np.log(np.asarray(pos_weight, np.float64))


def fit_platt(logit: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of the best sigmoid(slope * logit + intercept).

    Targets are Platt's smoothed ones, (N+ + 1) / (N+ + 2) and 1 / (N- + 2), which keep the fit
    finite when the classes are separable.

    Args:
        logit: [N] of the validation part; target: [N] 0/1.
    """
    logit, target = np.asarray(logit, np.float64), np.asarray(target).astype(bool)
    positive, negative = target.sum(), (~target).sum()
    soft = np.where(target, (positive + 1) / (positive + 2), 1 / (negative + 2))
    centre, scale = logit.mean(), logit.std() or 1.0
    x = (logit - centre) / scale

    def loss_and_gradient(ab):
        z = ab[0] * x + ab[1]
        error = expit(z) - soft
        return np.mean(np.logaddexp(0, z) - soft * z), np.array([np.mean(error * x), error.mean()])

    a, b = minimize(loss_and_gradient, np.array([scale, centre]), jac=True, method="BFGS").x
    return float(a / scale), float(b - a * centre / scale)


def brier(probability: np.ndarray, target: np.ndarray) -> float:
    """Mean squared difference between probability and outcome."""
    return float(np.mean((np.asarray(probability) - np.asarray(target)) ** 2))


def reliability(probability: np.ndarray, target: np.ndarray, bins: int = BINS) -> list[dict]:
    """Reliability table with bins of equal mass (about N / bins cycles each).

    Bin edges are quantiles, so equal probabilities share a bin and the table does not depend on
    the order of the cycles.

    Returns:
        For each bin with cycles: `predicted` (mean probability), `observed` (share of positives),
        `cycles`.
    """
    probability, target = np.asarray(probability, np.float64), np.asarray(target, np.float64)
    edges = np.unique(np.quantile(probability, np.linspace(0, 1, bins + 1)[1:-1]))
    index = np.searchsorted(edges, probability, side="right")
    rows = []
    for bin_ in np.unique(index):
        inside = index == bin_
        rows.append(
            {
                "predicted": float(probability[inside].mean()),
                "observed": float(target[inside].mean()),
                "cycles": int(inside.sum()),
            }
        )
    return rows


def expected_calibration_error(
    probability: np.ndarray, target: np.ndarray, bins: int = BINS
) -> float:
    """ECE: mean of |predicted - observed| over equal-mass bins, weighted by cycles."""
    rows = reliability(probability, target, bins)
    total = sum(row["cycles"] for row in rows)
    return sum(row["cycles"] * abs(row["predicted"] - row["observed"]) for row in rows) / total


def _judge(probability: np.ndarray, target: np.ndarray) -> dict:
    return {
        "ece": expected_calibration_error(probability, target),
        "brier": brier(probability, target),
        "reliability": reliability(probability, target),
    }


def calibration_report(
    task: Task,
    probability: np.ndarray,
    label: np.ndarray,
    *,
    pos_weight=None,
    val_probability: np.ndarray | None = None,
    val_label: np.ndarray | None = None,
) -> dict[str, dict]:
    """Calibration of every output, as trained and corrected.

    Args:
        probability: [N, K]; label: [N, C].
        pos_weight: [K] of the loss; None where the loss had none.
        val_probability, val_label: the part on which Platt's two numbers may be fitted; None
            where no honest part exists.

    Returns:
        output -> {"prevalence", "as_trained": {"ece", "brier", "reliability"}, and, where they can
        be made, "without_pos_weight" and "platt" (with "slope", "intercept")}.
    """
    if not len(probability):
        return {}
    targets, logits = output_targets(task, label), log_odds(probability)
    report = {}
    for k, name in enumerate(task.outputs):
        target = targets[:, k]
        entry = {
            "prevalence": float(target.mean()),
            "as_trained": _judge(probability[:, k], target),
        }
        if pos_weight is not None:
            corrected = undo_pos_weight(logits[:, k], pos_weight[k])
            entry["without_pos_weight"] = _judge(expit(corrected), target)
        if val_probability is not None and len(val_probability):
            val_target = output_targets(task, val_label)[:, k]
            slope, intercept = fit_platt(log_odds(val_probability[:, k]), val_target)
            entry["platt"] = _judge(expit(slope * logits[:, k] + intercept), target)
            entry["platt"] |= {"slope": slope, "intercept": intercept}
        report[name] = entry
    return report
