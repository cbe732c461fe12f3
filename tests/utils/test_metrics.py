"""Metrics: cases computed by hand, naive reimplementations, properties."""

import itertools
import logging
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.task import Task
from utils.metrics.score import (
    GRID,
    choose_thresholds,
    collapse,
    confusion,
    operating_curve,
    sp_se_score,
    summarise,
)

FOUR, TWO, SOFTMAX = Task(4), Task(2), Task(4, exclusive=True)
TASKS = (FOUR, TWO, SOFTMAX)


def random_part(task: Task, n: int, seed: int, decimals: int | None = None):
    rng = np.random.default_rng(seed)
    label = task.labels(rng.integers(0, 2, n), rng.integers(0, 2, n))
    probability = task.probabilities(rng.normal(size=(n, len(task.outputs))) * 1.5)
    if not task.exclusive and decimals is not None:
        probability = probability.round(decimals)
    return probability, label


def naive_score(true, pred):
    normal = [p for t, p in zip(true, pred, strict=True) if t == 0]
    abnormal = [(t, p) for t, p in zip(true, pred, strict=True) if t != 0]
    sp = 100 * sum(p == 0 for p in normal) / len(normal) if normal else math.nan
    se = 100 * sum(t == p for t, p in abnormal) / len(abnormal) if abnormal else math.nan
    return sp, se, (sp + se) / 2


def test_score_by_hand():
    # 4 normal, 3 right; 5 abnormal, 2 with their exact class, 4 with any abnormal class
    true = np.array([0, 0, 0, 0, 1, 1, 2, 3, 3])
    pred = np.array([0, 0, 0, 2, 1, 3, 0, 3, 1])
    assert sp_se_score(true, pred) == pytest.approx((75.0, 40.0, 57.5))
    assert sp_se_score(collapse(true), collapse(pred)) == pytest.approx((75.0, 80.0, 77.5))


def test_score_is_nan_without_normal_or_abnormal():
    all_normal = sp_se_score(np.zeros(3), np.zeros(3))
    assert all_normal.sp == 100 and math.isnan(all_normal.se) and math.isnan(all_normal.score)
    assert math.isnan(sp_se_score(np.ones(3), np.ones(3)).sp)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40))
@settings(max_examples=200, deadline=None)
def test_score_agrees_with_naive(pairs):
    true, pred = np.array([t for t, _ in pairs]), np.array([p for _, p in pairs])
    assert sp_se_score(true, pred) == pytest.approx(naive_score(true, pred), nan_ok=True)


def naive_thresholds(task, probability, label, min_sensitivity=0.0):
    """Every grid point through the task's own decision rule, with the same tie rule."""
    true = task.true_classes(label)
    points = []
    for point in itertools.product(GRID, repeat=task.n_thresholds):
        _, se, score = naive_score(true, task.predicted_classes(probability, point))
        far = [round(abs(t - 0.5), 6) for t in point]
        points.append((se, round(score, 7), max(far), round(sum(far), 6), point))
    allowed = [p for p in points if p[0] >= 100 * min_sensitivity - 1e-9]
    if not allowed:
        most = max(p[0] for p in points)
        allowed = [p for p in points if p[0] == most]
    return min(allowed, key=lambda p: (-p[1], p[2], p[3], p[4]))[4]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed, min_sensitivity", [(0, 0.0), (1, 0.7), (2, 1.01)])
def test_thresholds_agree_with_naive_search(task, seed, min_sensitivity, monkeypatch):
    # two decimals: probabilities lie exactly on grid points, where >= and > differ
    coarse = np.array([0.02, 0.1, 0.3, 0.31, 0.49, 0.5, 0.51, 0.7, 0.98])
    monkeypatch.setattr("utils.metrics.score.GRID", coarse)
    monkeypatch.setitem(globals(), "GRID", coarse)
    probability, label = random_part(task, 60, seed, decimals=2)
    chosen = choose_thresholds(task, probability, label, min_sensitivity)
    assert chosen == naive_thresholds(task, probability, label, min_sensitivity)


def test_minimum_sensitivity_is_kept_or_reported(caplog):
    # the best Score misses an abnormal cycle; asking for all of them costs specificity
    probability = np.array([[0.1], [0.2], [0.3], [0.4], [0.15], [0.8], [0.9]])
    label = np.array([[0], [0], [0], [0], [1], [1], [1.0]])
    assert choose_thresholds(TWO, probability, label) == (0.5,)
    assert choose_thresholds(TWO, probability, label, min_sensitivity=0.9) == (0.15,)
    with caplog.at_level(logging.WARNING):
        hidden = np.where(label > 0, 0.0, probability)
        choose_thresholds(TWO, hidden, label, min_sensitivity=0.9)
    assert "no threshold reaches a sensitivity of 90.0 %" in caplog.text


@pytest.mark.parametrize("task", TASKS)
def test_one_sided_part_keeps_the_default(task):
    probability, label = random_part(task, 20, seed=4)
    assert choose_thresholds(task, probability, np.zeros_like(label)) == task.default_thresholds


@pytest.mark.parametrize("task", TASKS)
def test_summary_agrees_with_hand_counts(task):
    probability, label = random_part(task, 300, seed=5)
    figures = summarise(task, probability, label, task.default_thresholds)
    true = task.true_classes(label)
    pred = task.predicted_classes(probability, task.default_thresholds)
    table = confusion(task, true, pred)
    assert table.sum() == 300
    assert figures["accuracy"] == pytest.approx(np.trace(table) / 300)
    f1 = []
    for c, name in enumerate(task.classes):
        hit = table[c, c]
        assert figures[f"precision_{name}"] == pytest.approx(hit / table[:, c].sum())
        assert figures[f"recall_{name}"] == pytest.approx(hit / table[c].sum())
        f1.append(2 * hit / (table[c].sum() + table[:, c].sum()))
        assert figures[f"f1_{name}"] == pytest.approx(f1[-1])
    assert figures["macro_f1"] == pytest.approx(np.mean(f1))
    assert figures["sp"] == pytest.approx(100 * table[0, 0] / table[0].sum())
    if task.n_cls == 4:
        caught = table[1:, 1:].sum() / table[1:].sum()
        assert figures["collapsed_se"] == pytest.approx(100 * caught)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("n", [0, 1, 2])
def test_tiny_parts_give_nan_without_warnings(task, n):
    probability, label = np.full((n, len(task.outputs)), 0.3), np.zeros((n, 1 + (task.n_cls == 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = summarise(task, probability, label, task.default_thresholds)
        assert operating_curve(task, probability, label).shape == (0, 3)
    assert math.isnan(figures["score"])
    assert all(math.isnan(figures[f"auroc_{name}"]) for name in task.outputs)


@pytest.mark.parametrize("task", TASKS)
def test_operating_curve_points_follow_the_rule(task):
    probability, label = random_part(task, 100, seed=7)
    curve = operating_curve(task, probability, label)
    true, value = collapse(task.true_classes(label)), task.abnormal_score(probability)
    assert curve[0, :2] == pytest.approx((0, 100)) and curve[-1, :2] == pytest.approx((100, 0))
    for se, sp, threshold in curve:
        assert sp_se_score(true, value >= threshold)[:2] == pytest.approx((sp, se))
