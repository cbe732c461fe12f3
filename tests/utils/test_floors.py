"""Floors: constants score 50, metadata alone score what the database allows."""

import numpy as np
import pytest

from data.corpora.icbhi import DEVICES, SITES, read_cycles
from data.splits import Split, split_cycles
from data.statistics import MetadataStatistics
from data.task import Task
from tests.utils.evaluation_tables import cycle_table
from utils.evaluation.baselines import (
    MODELS,
    PRIOR,
    balancing_weight,
    baseline_predictions,
    baseline_reports,
    design_matrix,
    main,
    prior_logits,
)
from utils.metrics.predictions import labels

TASKS = (Task(2), Task(4), Task(4, exclusive=True))


def parts(table) -> Split:
    """Of 24 patients 16 train, 4 validate, 4 test; each part has every device."""
    place = (table["PID"].to_numpy() - 101) // 4
    return Split(*(np.flatnonzero(np.isin(place, k)) for k in ((0, 1, 2, 3), (4,), (5,))))


@pytest.mark.parametrize("task", TASKS)
def test_prior_is_the_class_frequency(task):
    table = cycle_table()
    label = task.labels(table["Crackles"].to_numpy(), table["Wheezes"].to_numpy())
    p = task.probabilities(prior_logits(task, label, 5))
    assert p.shape == (5, len(task.outputs))
    if task.exclusive:
        share = np.bincount(task.true_classes(label), minlength=4) / len(label)
    else:
        share = label.mean(axis=0)
    assert p == pytest.approx(np.tile(share, (5, 1)), abs=1e-6)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("selection", ["validation", "fixed", "test"])
def test_floors_predict_the_test_rows_by_the_runs_rule(task, selection):
    table = cycle_table(patients=24)
    split = parts(table)
    made = baseline_predictions(task, table, split, selection=selection)
    assert list(made) == [PRIOR, *MODELS]
    for frame, thresholds in made.values():
        assert (frame["cycle"] == split.test).all()
        if selection == "fixed":
            assert thresholds == task.default_thresholds
        else:
            assert len(thresholds) == task.n_thresholds
    assert made[PRIOR][0]["pred_class"].nunique() == 1


def test_floors_never_see_the_test_labels():
    table = cycle_table(patients=24)
    split = parts(table)
    other = table.copy()
    other.loc[split.test, ["Crackles", "Wheezes"]] = (
        1 - table.loc[split.test, ["Crackles", "Wheezes"]]
    )
    for name, (frame, thresholds) in baseline_predictions(
        Task(4), table, split, selection="validation"
    ).items():
        again, same = baseline_predictions(Task(4), other, split, selection="validation")[name]
        assert thresholds == same
        assert (frame["logit_crackle"] == again["logit_crackle"]).all()
        assert (labels(frame, Task(4)) != labels(again, Task(4))).all()


def test_scaling_comes_from_the_training_rows_alone():
    table = cycle_table(patients=24)
    split = parts(table)
    other = table.copy()
    first = table["PID"] == table["PID"].iloc[split.test[0]]
    other.loc[first, "Age"] = 500.0
    rest = ~first.to_numpy()[split.test]
    assert rest.any()
    for name in MODELS:
        before, after = (
            baseline_predictions(Task(2), t, split, selection="fixed")[name][0]["logit_abnormal"]
            for t in (table, other)
        )
        assert (before[rest] == after[rest]).all(), name


def test_metadata_model_learns_what_metadata_say():
    """Crackles follow the device here, so the metadata alone find them."""
    table = cycle_table(patients=24)
    table["Crackles"] = (table["Device"] == "Litt3200").astype(int)
    table["Wheezes"] = 0
    reports = baseline_reports(Task(2), table, parts(table), selection="fixed", bootstrap=50)
    assert reports["metadata only, linear"].metrics["chosen"]["score"].value == 100
    assert reports[PRIOR].metrics["chosen"]["score"].value == 50


def test_a_class_without_examples_is_survived():
    table = cycle_table(patients=24)
    table["Wheezes"] = 0
    for task in TASKS:
        for frame, _ in baseline_predictions(task, table, parts(table), selection="fixed").values():
            assert np.isfinite(frame.filter(like="logit_").to_numpy()).all()
            assert set(frame["pred_class"]) <= {"normal", "crackle", "abnormal"}


def test_weights_by_hand():
    label = np.array([[1.0, 0], [0, 0], [0, 1], [0, 1]])
    assert balancing_weight(Task(4), label, 1.5) == pytest.approx([4.5, 1.5])


def test_design_matrix_has_one_hot_groups():
    table = cycle_table()
    table.loc[0, "Device"] = None
    x = design_matrix(MetadataStatistics.fit(table, DEVICES, SITES), table)
    assert x.shape == (len(table), 16)
    assert (x[:, :5].sum(1) == 1).all() and (x[:, 5:13].sum(1) == 1).all()
    assert x[0, 4] == 1


@pytest.mark.real
def test_floors_on_the_whole_database(icbhi_root):
    """The annotations of all recordings: two classes about 57, four classes 32..50."""
    table = read_cycles(icbhi_root / "annotations", require_audio=False)
    split = split_cycles(table, strategy="official", selection="fixed")
    scores = {}
    for task in (Task(2), Task(4)):
        train = table.iloc[split.train]
        label = task.labels(train["Crackles"].to_numpy(), train["Wheezes"].to_numpy())
        reports = baseline_reports(
            task, table, split,
            selection="fixed", pos_weight=balancing_weight(task, label), bootstrap=10,
        )  # fmt: skip
        for name, report in reports.items():
            scores[task.n_cls, name] = report.metrics["chosen"]["score"].value
            assert report.counts["cycles"] == 2756
    assert scores[2, PRIOR] == scores[4, PRIOR] == 50
    assert scores[2, "metadata only, linear"] == pytest.approx(57.9, abs=1)
    assert scores[2, "metadata only, trees"] == pytest.approx(53.6, abs=2)
    assert scores[4, "metadata only, linear"] == pytest.approx(32.1, abs=2)
    assert scores[4, "metadata only, trees"] == pytest.approx(46.2, abs=3)


def test_command_names_what_is_wrong(tmp_path, caplog):
    assert main(["--data-folder", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in caplog.text
