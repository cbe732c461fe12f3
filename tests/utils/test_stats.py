"""Bootstrap, paired comparison, seeds: against naive loops, exact cases and coverage."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from data.task import Task
from experiments.protocol_simulation import (
    SENSITIVITY,
    SPECIFICITY,
    check_structure,
    coverage,
    cycle_bootstrap,
    draw_tables,
    read_structure,
    selection,
)
from utils.metrics.bootstrap import (
    auroc_bootstrap,
    average_precision_bootstrap,
    over_seeds,
    paired_bootstrap,
    patient_bootstrap,
    patient_difference,
    patient_tables,
    patient_weights,
)
from utils.metrics.score import metrics_of, summarise


def random_study(n=300, patients=12, classes=4, seed=0, accuracy=0.6):
    rng = np.random.default_rng(seed)
    true = rng.integers(0, classes, n)
    pred = np.where(rng.random(n) < accuracy, true, rng.integers(0, classes, n))
    return true, pred, rng.integers(0, patients, n)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from("abcde")), min_size=1)
)
@settings(max_examples=100, deadline=None)
def test_patient_tables_agree_with_counting(rows):
    true, pred, patient = (np.array(column) for column in zip(*rows, strict=True))
    patients, tables = patient_tables(true, pred, patient, 4)
    assert list(patients) == sorted(set(patient))
    for p, table in zip(patients, tables, strict=True):
        for t in range(4):
            for q in range(4):
                assert table[t, q] == sum(row == (t, q, p) for row in rows)


@pytest.mark.parametrize("task", [Task(4), Task(2)])
def test_figures_agree_with_the_metrics(task):
    rng = np.random.default_rng(1)
    label = task.labels(rng.integers(0, 2, 200), rng.integers(0, 2, 200))
    probability = rng.random((200, len(task.outputs)))
    true = task.true_classes(label)
    pred = task.predicted_classes(probability, task.default_thresholds)
    _, tables = patient_tables(true, pred, np.zeros(200), len(task.classes))
    expected = summarise(task, probability, label, task.default_thresholds)
    for name, value in metrics_of(tables[0]).items():
        assert value == pytest.approx(expected[name]), name


def test_bootstrap_agrees_with_resampling_the_rows():
    """The counts give, resample by resample, what concatenating the drawn patients' rows gives."""
    true, pred, patient = random_study()
    patients, tables = patient_tables(true, pred, patient, 4)
    weights = patient_weights(len(patients), 200, seed=3)
    scores = []
    for drawn in weights:
        rows = np.concatenate(
            [np.flatnonzero(patient == p) for p, k in zip(patients, drawn, strict=True)
             for _ in range(k)]
        )  # fmt: skip
        t, p = true[rows], pred[rows]
        scores.append(50 * ((p == 0)[t == 0].mean() + (p == t)[t > 0].mean()))
    interval = patient_bootstrap(tables, resamples=200, seed=3)["score"]
    assert (interval.low, interval.high) == pytest.approx(np.percentile(scores, [2.5, 97.5]))
    assert interval.value == pytest.approx(
        50 * ((pred == 0)[true == 0].mean() + (pred == true)[true > 0].mean())
    )


def test_clustered_outcomes_widen_patient_intervals():
    # 20 patients, half all right and half all wrong: the cycle bootstrap sees 2,000 coin flips
    true = np.tile(np.repeat([0, 1], 50), 20)
    patient = np.repeat(np.arange(20), 100)
    pred = np.where(patient % 2 == 0, true, 1 - true)
    _, tables = patient_tables(true, pred, patient, 2)
    by_patient = patient_bootstrap(tables)["score"]
    by_cycle = cycle_bootstrap(tables.sum(0), resamples=2000, seed=0)["score"]
    assert by_patient.value == by_cycle.value == 50
    assert by_patient.high - by_patient.low > 5 * (by_cycle.high - by_cycle.low)
    # sd of the mean of 20 patients' 0/100 outcomes is 50 / sqrt(20) = 11.2 points
    assert by_patient.high - by_patient.low == pytest.approx(2 * 1.96 * 11.2, rel=0.15)


def test_a_better_model_is_found():
    true, pred, patient = random_study(n=2000, patients=40, accuracy=0.4)
    _, a = patient_tables(true, pred, patient, 4)
    rng = np.random.default_rng(9)
    better = np.where(rng.random(2000) < 0.5, true, pred)
    _, b = patient_tables(true, better, patient, 4)
    there, back = (paired_bootstrap(x, y)["score"] for x, y in ((a, b), (b, a)))
    assert there.low > 0 and there.p == pytest.approx(2 / 10_001)
    assert back.value == pytest.approx(-there.value)
    assert back.low == pytest.approx(-there.high) and back.p == there.p


def test_p_is_uniform_without_a_difference():
    small = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        true, patient = rng.integers(0, 2, 600), np.repeat(np.arange(30), 20)
        a, b = (
            patient_tables(true, np.where(rng.random(600) < 0.7, true, 1 - true), patient, 2)[1]
            for _ in range(2)
        )
        small += paired_bootstrap(a, b, resamples=400, seed=seed)["score"].p < 0.1
    assert 8 <= small <= 38  # 10 % of 200 give or take; percentile intervals run a little narrow


def test_paired_refuses_other_cycles():
    true, pred, patient = random_study()
    _, a = patient_tables(true, pred, patient, 4)
    _, b = patient_tables((true + 1) % 4, pred, patient, 4)
    with pytest.raises(ValueError, match="same cycles"):
        paired_bootstrap(a, b)


def test_other_test_parts_move_with_the_patients_they_share():
    true, pred, patient = random_study(n=2000, patients=20)
    tables = patient_tables(true, pred, patient, 4)[1]
    nobody = np.zeros_like(tables)
    same = patient_difference(tables, tables)["score"]
    assert (same.value, same.low, same.high) == (0, 0, 0)
    apart = patient_difference(np.concatenate([tables, nobody]), np.concatenate([nobody, tables]))[
        "score"
    ]
    alone = patient_bootstrap(tables)["score"]
    assert apart.value == 0 and apart.low < 0 < apart.high
    width = (apart.high - apart.low) / (alone.high - alone.low)
    assert width == pytest.approx(2**0.5, rel=0.15)  # two independent parts of equal spread


def test_resampled_seeds_widen_the_interval():
    def run(caught: int) -> np.ndarray:  # eight equal patients: patients alone have no spread
        return np.repeat([[[10, 0], [10 - caught, caught]]], 8, axis=0)

    a = np.stack([run(5)] * 2)
    b = np.stack([run(5), run(5), run(7), run(7)])  # two runs of each seed: 0 and 10 points better
    fixed = paired_bootstrap(a, b)["score"]
    assert (fixed.value, fixed.low, fixed.high) == (5, 5, 5)
    free = paired_bootstrap(a, b, training_seeds=2)["score"]  # 0, 5, 10 in 1, 2, 1 of 4 draws
    assert (free.value, free.low, free.high) == (5, 0, 10)
    assert free.p == pytest.approx(0.5, abs=0.03)


def test_several_runs_are_averaged():
    true, pred, patient = random_study()
    _, a = patient_tables(true, pred, patient, 4)
    _, b = patient_tables(true, true, patient, 4)
    both = patient_bootstrap(np.stack([a, b]), resamples=100)["score"]
    alone = patient_bootstrap(a, resamples=100)["score"]
    assert both.value == pytest.approx((alone.value + 100) / 2)
    assert both.low == pytest.approx((alone.low + 100) / 2)


def test_auroc_bootstrap_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    target, patient = rng.integers(0, 2, 200), rng.integers(0, 10, 200)
    value = (rng.normal(size=200) + target).round(1)  # with ties
    interval = auroc_bootstrap(target, value, patient, resamples=100, seed=5)
    assert interval.value == pytest.approx(roc_auc_score(target, value))
    samples = [
        roc_auc_score(target, value, sample_weight=drawn[patient])
        for drawn in patient_weights(10, 100, seed=5)
    ]
    assert (interval.low, interval.high) == pytest.approx(np.percentile(samples, [2.5, 97.5]))


def test_ap_bootstrap_agrees_with_scikit_learn():
    rng = np.random.default_rng(2)
    target, patient = rng.integers(0, 2, 200), rng.integers(0, 10, 200)
    value = (rng.normal(size=200) + target).round(1)  # with ties
    interval = average_precision_bootstrap(target, value, patient, resamples=450, seed=5)
    assert interval.value == pytest.approx(average_precision_score(target, value))
    samples = [
        average_precision_score(target, value, sample_weight=drawn[patient])
        for drawn in patient_weights(10, 450, seed=5)
    ]
    assert (interval.low, interval.high) == pytest.approx(np.percentile(samples, [2.5, 97.5]))


def test_undefined_figures_are_nan_everywhere():
    _, tables = patient_tables([0, 0], [0, 1], [1, 2], 2)
    interval = patient_bootstrap(tables, resamples=50)["score"]
    assert all(math.isnan(v) for v in (interval.value, interval.low, interval.high))
    for ranking in (auroc_bootstrap, average_precision_bootstrap):
        assert math.isnan(ranking([0, 0], [0.1, 0.2], [1, 2], resamples=50).value)


def test_seeds_by_hand():
    summary = over_seeds([60, 62, 64])
    assert (summary.mean, summary.sd, summary.n) == (62, 2, 3)
    assert over_seeds([5]).n == 1 and math.isnan(over_seeds([5]).sd)


# --- the protocol simulation, in short -----------------------------------------------------------


def test_simulated_structure_is_the_test_half():
    test, train = read_structure("test"), read_structure("train")
    assert test.shape == (49, 2) and list(test.sum(axis=0)) == [1579, 1177]
    assert train.shape == (79, 2) and list(train.sum(axis=0)) == [2063, 2079]


@pytest.mark.real
def test_simulated_structure_equals_the_annotations(icbhi_root):
    assert check_structure(icbhi_root / "annotations")


@pytest.mark.parametrize("correlation", [0.1, 0.3])
def test_simulated_model_has_its_rates_and_correlation(correlation):
    """Variance of a mean over n cycles of one patient: p q (1 + (n - 1) r) / n."""
    structure = np.tile([[20, 20]], (20_000, 1))
    tables = draw_tables(structure, correlation, np.random.default_rng(0))
    assert (tables.sum(-1) == 20).all()
    for k, p in enumerate((SPECIFICITY, SENSITIVITY)):
        rate = tables[:, k, k] / 20
        assert rate.mean() == pytest.approx(p, abs=0.01)
        expected = p * (1 - p) * (1 + 19 * correlation) / 20
        assert rate.var() == pytest.approx(expected, rel=0.05)


def test_patients_cover_and_cycles_do_not():
    found = coverage(0.3, repetitions=100, resamples=300)
    assert 0.85 <= found["patient"]["score"]["coverage"] <= 1
    assert found["cycle"]["score"]["coverage"] < 0.6
    assert found["patient"]["score"]["width"] > 2 * found["cycle"]["score"]["width"]


def test_choosing_on_test_inflates():
    found = selection(0.1, 0.0, repetitions=25, epochs=30)
    assert found["test"]["mean"] > 52.5
    for rule in ("fixed", "validation"):
        assert found[rule]["mean"] == pytest.approx(50, abs=4 * found[rule]["standard_error"])
