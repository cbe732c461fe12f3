"""Calibration: known distortions are undone, hand-made bins, agreement with scikit-learn."""

import numpy as np
import pytest
from scipy.special import expit as sigmoid
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression

from data.task import Task
from utils.metrics.calibration import (
    calibration_report,
    expected_calibration_error,
    fit_platt,
    log_odds,
    reliability,
    undo_pos_weight,
)


def sample(n=20_000, seed=0):
    """True logits and outcomes drawn from them."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(-1, 1.5, n)
    return logit, (rng.random(n) < sigmoid(logit)).astype(int)


def test_pos_weight_shift_is_what_weighted_bce_learns():
    """Minimise weighted BCE over one constant logit: the optimum is logit(p) + log w."""
    target, w = np.repeat([0.0, 1.0], [800, 200]), 3.0
    grid = np.linspace(-4, 4, 8001)
    p = sigmoid(grid)
    loss = -(w * target.mean() * np.log(p) + (1 - target.mean()) * np.log(1 - p))
    best = grid[loss.argmin()]
    assert best == pytest.approx(np.log(0.25) + np.log(w), abs=1e-3)
    assert sigmoid(undo_pos_weight([[best]], [w]))[0, 0] == pytest.approx(0.2, abs=1e-3)


def test_undoing_pos_weight_restores_calibration():
    logit, target = sample()
    shifted = logit + np.log(4.0)
    assert expected_calibration_error(sigmoid(shifted), target) > 0.15
    restored = sigmoid(undo_pos_weight(shifted[:, None], [4.0])[:, 0])
    assert expected_calibration_error(restored, target) < 0.015


def test_platt_agrees_with_logistic_regression():
    logit, target = sample(3000, seed=2)
    model = LogisticRegression(C=1e8).fit(logit[:, None], target)
    assert fit_platt(logit, target) == pytest.approx(
        (model.coef_[0, 0], model.intercept_[0]), abs=0.02
    )


@pytest.mark.parametrize("target", [[0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
@pytest.mark.parametrize("logit", [[-3.0, -1, 1, 3], [2.0, 2, 2, 2], [-400.0, -200, 200, 400]])
def test_platt_stays_finite(target, logit):
    slope, intercept = fit_platt(np.array(logit), np.array(target))
    assert np.isfinite([slope, intercept]).all() and abs(slope) < 100


def test_reliability_by_hand():
    probability = np.array([0.1, 0.2, 0.3, 0.6, 0.8, 1.0])
    target = np.array([0, 0, 1, 1, 0, 1])
    rows = reliability(probability, target, bins=2)
    assert [row["cycles"] for row in rows] == [3, 3]
    assert rows[0]["predicted"] == pytest.approx(0.2)
    assert rows[0]["observed"] == pytest.approx(1 / 3)
    assert rows[1]["predicted"] == pytest.approx(0.8)
    assert rows[1]["observed"] == pytest.approx(2 / 3)
    ece = expected_calibration_error(probability, target, bins=2)
    assert ece == pytest.approx((0.2 - 1 / 3) * -0.5 + (0.8 - 2 / 3) * 0.5)


def test_reliability_agrees_with_scikit_learn():
    logit, target = sample(1000, seed=3)
    observed, predicted = calibration_curve(target, sigmoid(logit), n_bins=10, strategy="quantile")
    rows = reliability(sigmoid(logit), target, bins=10)
    assert [row["observed"] for row in rows] == pytest.approx(observed)
    assert [row["predicted"] for row in rows] == pytest.approx(predicted)


def test_log_odds_invert_the_sigmoid_and_stay_finite():
    x = np.array([-20.0, -1, 0, 3, 20])
    assert log_odds(sigmoid(x)) == pytest.approx(x, rel=1e-6)
    assert np.isfinite(log_odds(np.array([0.0, 1.0]))).all()


@pytest.mark.parametrize("task", [Task(4), Task(2), Task(4, exclusive=True)])
def test_report_judges_every_output(task):
    rng = np.random.default_rng(0)
    k = len(task.outputs)
    label = task.labels(rng.integers(0, 2, 400), rng.integers(0, 2, 400))
    probability = task.probabilities(rng.normal(size=(400, k)) + 1)
    plain = calibration_report(task, probability, label)
    assert set(plain) == set(task.outputs)
    assert all(set(entry) == {"prevalence", "as_trained"} for entry in plain.values())
    full = calibration_report(
        task,
        probability[:200],
        label[:200],
        pos_weight=np.full(k, 2.0),
        val_probability=probability[200:],
        val_label=label[200:],
    )
    for entry in full.values():
        assert set(entry) == {"prevalence", "as_trained", "without_pos_weight", "platt"}
        assert entry["platt"]["brier"] < entry["as_trained"]["brier"]
    assert calibration_report(task, probability[:0], label[:0]) == {}
