"""Macro AUROC over crackle and wheeze: its value, interval and paired difference by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from data.task import Task
from tests.utils.evaluation_tables import cycle_table, predictions
from utils.evaluation.render import to_markdown
from utils.evaluation.report import compare_predictions, evaluate_predictions
from utils.metrics.bootstrap import macro_auroc_bootstrap, macro_auroc_difference, patient_weights
from utils.metrics.score import event_targets, summarise


def study(seed, runs=2, n=150):
    rng = np.random.default_rng(seed)
    labels = np.random.default_rng(0).integers(0, 2, (n, 2))
    patient = np.random.default_rng(1).integers(0, 9, n)
    values = [(rng.normal(size=(n, 2)) + seed * labels).round(1) for _ in range(runs)]
    return [[(labels[:, k], v[:, k]) for k in range(2)] for v in values], patient


def by_scikit(runs, weight):
    return [np.mean([roc_auc_score(t, v, sample_weight=weight) for t, v in r]) for r in runs]


def test_macro_auroc_is_scikit_learns_in_every_resample():
    (a, patient), (b, _) = study(0), study(1)
    drawn = [w[patient] for w in patient_weights(9, 15, seed=3)]
    found = macro_auroc_bootstrap(b, patient, resamples=15, seed=3)
    assert found.value == pytest.approx(np.mean(by_scikit(b, None)))
    samples = [np.mean(by_scikit(b, w)) for w in drawn]
    assert (found.low, found.high) == pytest.approx(np.percentile(samples, [2.5, 97.5]))
    difference = macro_auroc_difference(a, b, patient, resamples=15, seed=3)
    assert difference.value == pytest.approx(
        np.mean(by_scikit(b, None)) - np.mean(by_scikit(a, None))
    )
    samples = [np.mean(by_scikit(b, w)) - np.mean(by_scikit(a, w)) for w in drawn]
    assert (difference.low, difference.high) == pytest.approx(np.percentile(samples, [2.5, 97.5]))
    assert difference.p == pytest.approx(2 / 16)


@pytest.mark.parametrize("task", [Task(4), Task(4, exclusive=True), Task(2)])
def test_events_of_every_task(task):
    rng = np.random.default_rng(0)
    crackle, wheeze = rng.integers(0, 2, (2, 80))
    label = task.labels(crackle, wheeze)
    probability = task.probabilities(rng.normal(size=(80, len(task.outputs))))
    found = event_targets(task, probability, label)
    p = probability
    if task.n_cls == 2:
        expected = [(crackle | wheeze, p[:, 0])]
    elif task.exclusive:
        expected = [(crackle, p[:, 1] + p[:, 3]), (wheeze, p[:, 2] + p[:, 3])]
    else:
        expected = [(crackle, p[:, 0]), (wheeze, p[:, 1])]
    for (target, value), (t, v) in zip(found, expected, strict=True):
        assert np.array_equal(target, t) and np.allclose(value, v)
    macro = np.mean([roc_auc_score(t, v) for t, v in expected])
    figures = summarise(task, probability, label, task.default_thresholds)
    assert figures["auroc_macro"] == pytest.approx(macro)


def test_it_stands_in_report_and_comparison_or_says_why_not():
    task, table = Task(4), cycle_table()
    frames = {str(s): predictions(task, table, s, skill=s) for s in (1, 2)}
    reports = {
        name: evaluate_predictions(frame, task, (0.5, 0.5), selection="fixed", bootstrap=50)
        for name, frame in frames.items()
    }
    own = [r.metrics["chosen"]["auroc_macro"].value for r in reports.values()]
    (pair,) = [
        one
        for one in compare_predictions(
            {"1": frames["1"], "2": frames["2"].sample(frac=1, random_state=0)}, task, bootstrap=50
        )
        if one.figure == "auroc_macro"
    ]
    assert pair.value == pytest.approx(own[1] - own[0])
    assert f"| Macro AUROC | {own[0]:.3f} [" in to_markdown(reports["1"])
    quiet = predictions(task, table.assign(Wheezes=0), 0)
    report = evaluate_predictions(quiet, task, (0.5, 0.5), selection="fixed", bootstrap=50)
    assert math.isnan(report.metrics["chosen"]["auroc_macro"].value)
    assert "| Macro AUROC | undefined (one class only) |" in to_markdown(report)
