"""The metadata test: what is shuffled, what stays, and that it finds a model that cheats."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.corpora.icbhi import DEVICES, SITES
from data.statistics import MetadataStatistics
from data.task import FIELDS, Task
from tests.utils.evaluation_tables import cycle_table
from utils.evaluation.metadata_test import (
    conditions,
    derangement,
    metadata_test,
    shuffle_metadata,
)


@given(st.integers(2, 30), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_derangement_moves_everything(n, seed):
    order = derangement(n, np.random.default_rng(seed))
    assert sorted(order) == list(range(n)) and (order != np.arange(n)).all()


def test_single_patient_can_not_move():
    assert list(derangement(1, np.random.default_rng(0))) == [0]


@pytest.mark.parametrize("seed", range(5))
def test_shuffle_gives_each_patient_one_other_donor(seed):
    table = cycle_table()
    shuffled = shuffle_metadata(table, seed)
    donor_of = {age: pid for pid, age in table.groupby("PID")["Age"].first().items()}
    donors = []
    for pid, rows in shuffled.groupby("PID"):
        assert rows["Age"].nunique() == 1
        donor = donor_of[rows["Age"].iloc[0]]
        assert donor != pid
        own = table[table["PID"] == donor].iloc[0]
        # device and BMI come from the same donor as the age, a missing BMI included
        assert (rows["Device"] == own["Device"]).all()
        assert rows["BMIDerived"].isna().all() == np.isnan(own["BMIDerived"])
        assert rows["BMI"].isna().all() or (rows["BMI"] == own["BMI"]).all()
        donors.append(donor)
    assert len(set(donors)) == len(donors)


def test_shuffle_permutes_sites_among_recordings():
    table = cycle_table()
    before = table.copy()
    shuffled = shuffle_metadata(table, seed=1)
    pd.testing.assert_frame_equal(table, before)
    kept = ["PID", "Filename", "CycleIndex", "Crackles", "Wheezes", "Duration"]
    pd.testing.assert_frame_equal(shuffled[kept], table[kept])
    sites = shuffled.groupby("Filename")["AuscLoc"]
    assert (sites.nunique() == 1).all()
    original = table.groupby("Filename")["AuscLoc"].first()
    assert sorted(sites.first()) == sorted(original)
    assert (sites.first() != original).mean() > 0.5


def test_shuffle_repeats_with_its_seed_only():
    table = cycle_table()
    one, same, other = (shuffle_metadata(table, seed) for seed in (3, 3, 4))
    pd.testing.assert_frame_equal(one, same)
    assert not one["Age"].equals(other["Age"])


def test_conditions_hide_what_they_say():
    table = cycle_table()
    transform = MetadataStatistics.fit(table, DEVICES, SITES).transform
    made = list(conditions(table, transform, shuffles=2, seed=0))
    assert [name for name, _ in made] == [
        "real", "shuffled", "shuffled", "all unknown", *(f"{f} unknown" for f in FIELDS)
    ]  # fmt: skip
    named = dict(made)
    assert not named["all unknown"].known.any()
    for k, field in enumerate(FIELDS):
        known = named[f"{field} unknown"].known
        assert not known[:, k].any() and known[:, [j for j in range(5) if j != k]].all()
    # duration is part of the sound and stays
    assert (named["shuffled"].rest[:, 2] == named["real"].rest[:, 2]).all()
    assert (made[1][1].rest[:, 0] != made[2][1].rest[:, 0]).any()


@pytest.mark.parametrize("task", [Task(2), Task(4)])
def test_a_model_of_the_metadata_is_exposed(task):
    table = cycle_table(patients=24)
    statistics = MetadataStatistics.fit(table, DEVICES, SITES)
    label = task.labels(table["Crackles"].to_numpy(), table["Wheezes"].to_numpy())
    ages = statistics.transform(table).rest[:, 0].numpy()

    def listens(several):
        return [np.where(label > 0, 0.9, 0.1) for _ in several]

    def knows_patients(several):
        """Looks the cycle up by the patient's age."""
        for metadata in several:
            nearest = np.abs(metadata.rest[:, :1].numpy() - ages[None]).argmin(axis=1)
            yield np.where(label[nearest] > 0, 0.9, 0.1)

    thresholds = task.default_thresholds
    options = {"shuffles": 4, "bootstrap": 300}
    honest = metadata_test(listens, table, statistics.transform, task, thresholds, **options)
    assert all(row["score"] == 100 and row["difference"].value == 0 for row in honest)
    rows = metadata_test(knows_patients, table, statistics.transform, task, thresholds, **options)
    cheat = {row["metadata"]: row for row in rows}
    assert cheat["shuffled"]["runs"] == 4 and cheat["real"]["runs"] == 1
    assert cheat["shuffled"]["difference"].high < -10
    assert cheat["shuffled"]["difference"].p < 0.05
    assert cheat["site unknown"]["score"] == cheat["real"]["score"]
    assert cheat["age unknown"]["difference"].high < -10


def test_shuffled_rows_are_averaged_over_the_shuffles():
    table, task = cycle_table(), Task(2)
    values = [0.9, 0.9, 0.1, *[0.9] * 6]  # real, two shuffles, then the hidden ones

    def predict(several):
        return [np.full((len(m), 1), v) for m, v in zip(several, values, strict=True)]

    transform = MetadataStatistics.fit(table, DEVICES, SITES).transform
    rows = metadata_test(predict, table, transform, task, (0.5,), shuffles=2, bootstrap=50)
    shuffled = rows[1]
    assert (shuffled["sp"], shuffled["se"]) == (50, 50)
