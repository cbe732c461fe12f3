"""Splits: official facts, whole patients, nothing learnt from test labels."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import LEAKY, STRATEGIES
from data.corpora.icbhi import DEVICES, read_cycles
from data.cycle_table import classes_of
from data.splits import (
    assign_folds,
    patients_in_both_halves,
    shuffled_recordings,
    split_cycles,
)
from utils.common.errors import UserError

PARTS = ("train", "val", "test")


@pytest.fixture(scope="module")
def real(icbhi_root):
    return read_cycles(icbhi_root / "annotations", require_audio=False)


def corpus(patients: int = 40, seed: int = 0, both: int = 0) -> pd.DataFrame:
    """Cycle table with what the splits look at; the first `both` patients are in both halves."""
    rng = np.random.default_rng(seed)
    frames = []
    for number in range(patients):
        n = int(rng.integers(4, 60))
        part = np.full(n, "train" if rng.random() < 0.6 else "test", object)
        if number < both:
            part[: n // 2], part[n // 2 :] = "train", "test"
        frames.append(
            pd.DataFrame(
                {
                    "PID": 101 + number,
                    "Filename": [f"{101 + number}_{cycle // 8}" for cycle in range(n)],
                    "Split": part,
                    "Device": DEVICES[int(rng.integers(4))],
                    "Crackles": rng.integers(0, 2, n),
                    "Wheezes": (rng.random(n) < 0.2).astype(int),
                }
            )
        )
    table = pd.concat(frames, ignore_index=True)
    return table.assign(Fold=assign_folds(table))


def members(table: pd.DataFrame, split) -> dict[str, set[int]]:
    return {part: set(table["PID"].iloc[getattr(split, part)]) for part in PARTS}


def same(first, second) -> bool:
    return all(np.array_equal(getattr(first, part), getattr(second, part)) for part in PARTS)


# --- the real annotations ------------------------------------------------------------------------


@pytest.mark.real
def test_real_official(real, caplog):
    split = split_cycles(real, strategy="official", selection="fixed")
    assert (len(split.train), len(split.val), len(split.test)) == (4142, 0, 2756)
    assert patients_in_both_halves(real) == [156, 218]
    assert "156, 218" in caplog.text
    assert "120 of 2756" in caplog.text


@pytest.mark.real
def test_real_official_disjoint(real, caplog):
    split = split_cycles(real, strategy="official_disjoint", selection="test")
    assert len(split.train) == 4142
    assert np.bincount(classes_of(real.iloc[split.test])).tolist() == [1560, 617, 373, 86]
    who = members(real, split)
    assert not who["train"] & who["test"]
    assert not caplog.records


@pytest.mark.real
@pytest.mark.parametrize("seed", range(5))
def test_real_validation_patients(real, seed):
    split = split_cycles(real, val_seed=seed)
    who = members(real, split)
    assert not who["train"] & who["val"]
    assert not who["val"] & who["test"]  # 156 and 218 stayed in train
    assert {156, 218} <= who["train"]
    whole = real.iloc[np.concatenate([split.train, split.val])]
    assert len(whole) == 4142
    share = np.bincount(classes_of(real.iloc[split.val])) / np.bincount(classes_of(whole))
    assert np.all(np.abs(share - 0.2) < 0.02)  # of every class
    assert set(real["Device"].iloc[split.train]) == set(DEVICES)
    assert 12 <= len(who["val"]) <= 20  # a fifth of 79 patients


@pytest.mark.real
def test_real_folds_are_the_published_ones(real):
    """Frozen: results of earlier runs must stay comparable with those of later versions."""
    sizes = real.groupby("Fold").agg(cycles=("PID", "size"), patients=("PID", "nunique"))
    assert sizes["cycles"].tolist() == [1371, 1400, 1397, 1370, 1360]
    assert sizes["patients"].tolist() == [26, 25, 25, 27, 23]
    classes = pd.crosstab(real["Fold"], classes_of(real)).to_numpy()
    assert np.all(np.abs(classes / classes.sum(axis=0) - 0.2) < 0.02)
    tested = [split_cycles(real, strategy="foldwise", test_fold=fold).test for fold in range(5)]
    assert np.array_equal(np.sort(np.concatenate(tested)), np.arange(6898))


@pytest.mark.real
def test_real_random_split(real):
    split = split_cycles(real, strategy="random", split_seed=3)
    assert abs(len(split.test) / 6898 - 0.4) < 0.01
    who = members(real, split)
    assert not (who["train"] | who["val"]) & who["test"]
    assert not same(split, split_cycles(real, strategy="random", split_seed=4))


@pytest.mark.real
def test_real_recordings_are_those_of_the_public_code(real, caplog):
    split = split_cycles(real, strategy="recordings", selection="test")
    train, test = real.iloc[split.train], real.iloc[split.test]
    assert train["Filename"].nunique() == 552 and test["Filename"].nunique() == 368
    assert np.bincount(classes_of(train)).tolist() == [2250, 1051, 604, 308]
    assert np.bincount(classes_of(test)).tolist() == [1392, 813, 282, 198]
    both = set(train["PID"]) & set(test["PID"])
    assert (train["PID"].nunique(), test["PID"].nunique(), len(both)) == (109, 93, 76)
    assert "76 patients in both halves (2520 of 2685 test cycles)" in caplog.text
    takes = [part["Filename"].str.split("_").str[:2].str.join("_") for part in (train, test)]
    assert takes[1].isin(takes[0]).sum() == 2351  # another channel of the take is in training
    official = real.drop_duplicates("Filename").set_index("Filename")["Split"]
    agree = (official == "train") == official.index.isin(train["Filename"])
    assert agree.sum() == 447
    alias = "226_1b1_Pl_sc_LittC2SE"  # the official file has another name: unmatched, 446 agree
    assert agree[official.index == alias].all()


@pytest.mark.real
def test_real_recordings_spare_validation_patients(real):
    who = members(real, split_cycles(real, strategy="recordings"))
    assert who["val"] and not who["val"] & (who["train"] | who["test"])


# --- rules, on made-up corpora --------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("selection", ["validation", "fixed"])
def test_test_labels_change_nothing(strategy, selection):
    table = corpus(both=2)
    options = {"strategy": strategy, "selection": selection, "test_fold": 1}
    options |= {"test_device": "Meditron"}
    split = split_cycles(table, **options)
    shuffled = table.copy()
    rng = np.random.default_rng(1)
    events = table.loc[split.test, ["Crackles", "Wheezes"]].to_numpy()
    shuffled.loc[split.test, ["Crackles", "Wheezes"]] = rng.permutation(events)
    assert not shuffled.equals(table)
    assert same(split, split_cycles(shuffled, **options))
    silent = table.copy()
    silent.loc[split.test, ["Crackles", "Wheezes"]] = 0
    assert same(split, split_cycles(silent, **options))


@pytest.mark.parametrize("selection", ["fixed", "test"])
def test_without_validation_all_train(selection):
    table = corpus()
    with_validation = split_cycles(table)
    split = split_cycles(table, selection=selection)
    assert len(split.val) == 0
    assert split.val.dtype == np.int64
    assert np.array_equal(
        split.train, np.sort(np.concatenate([with_validation.train, with_validation.val]))
    )


def test_the_last_of_a_device_or_class_stays_in_train():
    table = corpus(30).assign(Split="train")
    table.loc[table["PID"] > 120, "Split"] = "test"
    table.loc[table["PID"] == 103, "Device"] = "Litt3200"
    table.loc[(table["PID"] != 103) & (table["Device"] == "Litt3200"), "Device"] = "Meditron"
    table.loc[table["PID"] != 105, "Wheezes"] = 0
    for seed in range(10):
        split = split_cycles(table, val_seed=seed, val_fraction=0.7)
        assert {103, 105} <= members(table, split)["train"]


def test_patients_in_both_halves_stay_in_train():
    table = corpus(30, both=6)
    chosen = set()
    for seed in range(10):
        chosen |= members(table, split_cycles(table, val_seed=seed))["val"]
    assert chosen
    assert not chosen & set(range(101, 107))


def test_official_warns_and_disjoint_drops(caplog):
    table = corpus(30, both=2)
    with caplog.at_level(logging.WARNING):
        official = split_cycles(table)
    assert "patients 101, 102 in both halves" in caplog.text
    disjoint = split_cycles(table, strategy="official_disjoint")
    dropped = set(official.test) - set(disjoint.test)
    assert set(table["PID"].loc[sorted(dropped)]) == {101, 102}
    assert not set(disjoint.test) - set(official.test)


@pytest.mark.parametrize("device", DEVICES)
def test_leave_device_out_is_over_all_patients(device, caplog):
    """Every cycle of the device is tested; its patients' other cycles are in no part."""
    table = corpus(40, both=3)
    table.loc[(table["PID"] % 5 == 0) & (table["Filename"].str[-1] == "0"), "Device"] = device
    with caplog.at_level(logging.INFO):
        split = split_cycles(table, strategy="leave_device_out", test_device=device)
    assert set(split.test) == set(np.flatnonzero(table["Device"] == device))
    who = members(table, split)
    assert not who["test"] & (who["train"] | who["val"]) and who["val"] - who["train"] == who["val"]
    used = np.concatenate([split.train, split.val, split.test])
    dropped = table.drop(index=used)
    assert len(dropped) and set(dropped["PID"]) <= who["test"]
    assert f"{len(dropped)} cycles that {dropped['PID'].nunique()} of these have" in caplog.text
    assert set(table["Split"].iloc[split.train]) == {"train", "test"}
    with pytest.raises(UserError, match=r"test_device=Rode recorded no cycle; the devices are AKG"):
        split_cycles(table, strategy="leave_device_out", test_device="Rode")


def test_training_half_leaves_the_test_half_shut():
    table = corpus(40)
    split = split_cycles(table, strategy="training_half", split_seed=1, test_fraction=0.3)
    used = np.sort(np.concatenate([split.train, split.val, split.test]))
    assert np.array_equal(used, np.flatnonzero(table["Split"] == "train"))
    who = members(table, split)
    assert not who["test"] & (who["train"] | who["val"])
    assert 0.2 < len(split.test) / len(used) < 0.4


@pytest.mark.real
@pytest.mark.parametrize(
    ("device", "tested", "dropped"),
    [
        *[("AKGC417L", 4346, 11), ("Litt3200", 502, 115)],
        *[("LittC2SE", 594, 226), ("Meditron", 1456, 60)],
    ],
)
def test_real_leave_device_out(real, device, tested, dropped):
    split = split_cycles(real, strategy="leave_device_out", test_device=device)
    assert len(split.test) == tested
    assert len(real) - sum(len(getattr(split, part)) for part in PARTS) == dropped


def test_a_seed_gives_one_split_in_any_row_order():
    table = corpus()
    order = np.random.default_rng(0).permutation(len(table))
    mixed = table.iloc[order].reset_index(drop=True)
    for strategy in STRATEGIES:
        given = {"strategy": strategy, "test_device": "Meditron"}
        first, second = (split_cycles(t, **given) for t in (table, mixed))
        assert same(first, split_cycles(table, **given))
        assert members(table, first) == members(mixed, second)
    assert np.array_equal(assign_folds(mixed), table["Fold"].to_numpy()[order])


def test_recordings_are_shuffled_whoever_the_patient_is(caplog):
    """The order that Python's generator gives to a, b, ..., j with seed 1 is written out."""
    assert shuffled_recordings(pd.Series([*"jihgfedcba", *"abc"])) == [*"gijhfd"]
    table = corpus(both=2)
    split = split_cycles(table, strategy="recordings", selection="fixed")
    train, test = (set(table["Filename"].iloc[rows]) for rows in (split.train, split.test))
    assert not train & test and len(train) == int(0.6 * len(train | test))
    who = members(table, split)
    both = who["train"] & who["test"]
    assert len(both) > 20 and f"recordings has {len(both)} patients in both halves" in caplog.text


@pytest.mark.parametrize("patients", range(1, 9))
def test_folds_of_few_patients(patients):
    table = corpus(patients)
    assert (table.groupby("PID")["Fold"].nunique() == 1).all()
    assert table["Fold"].between(0, 4).all()
    assert table["Fold"].nunique() == min(patients, 5)


def test_parts_that_cannot_be_filled_are_refused():
    table = corpus(20)
    with pytest.raises(UserError, match="no cycle is in the test part"):
        split_cycles(table.assign(Split="train"))
    with pytest.raises(UserError, match="no cycle is in the training part"):
        split_cycles(table.assign(Split="test"))
    for column, name in (("Crackles", "crackle"), ("Wheezes", "wheeze")):
        with pytest.raises(UserError, match=f"has the class {name}"):
            split_cycles(table.assign(**{column: 0}))
        assert len(split_cycles(table.assign(**{column: 0}), n_cls=2).train)
    with pytest.raises(UserError, match="has the class abnormal"):
        split_cycles(table.assign(Crackles=0, Wheezes=0), n_cls=2)
    with pytest.raises(UserError, match="has the class normal"):
        split_cycles(table.assign(Crackles=1))
    one = table.assign(Split=np.where(table["PID"] == 101, "train", "test"))
    with pytest.raises(UserError, match=r"no validation patient .* training.selection=fixed"):
        split_cycles(one)
    assert len(split_cycles(one, selection="fixed").val) == 0


def test_a_class_that_validation_lacks_is_a_warning(caplog):
    table = corpus(12)
    table.loc[table["PID"] != 101, "Wheezes"] = 0
    table.loc[table["PID"] == 101, "Split"] = "train"
    split_cycles(table)
    assert "the validation part has no cycle of class wheeze, both" in caplog.text


@settings(deadline=None, max_examples=40)
@given(
    patients=st.integers(1, 25),
    both=st.integers(0, 3),
    seed=st.integers(0, 10_000),
    strategy=st.sampled_from(STRATEGIES),
    selection=st.sampled_from(["validation", "fixed", "test"]),
    test_fold=st.integers(0, 4),
    test_fraction=st.floats(0.05, 0.9),
    val_fraction=st.floats(0.05, 0.6),
)
def test_no_patient_on_two_sides_and_no_class_lost(patients, both, seed, **options):
    table = corpus(patients, seed, both)
    try:
        split = split_cycles(
            table, split_seed=seed, val_seed=seed, test_device="Meditron", **options
        )
    except UserError as error:
        assert any(word in str(error) for word in ("part", "patient", "class", "recorded no"))
        return
    rows = np.concatenate([split.train, split.val, split.test])
    assert len(np.unique(rows)) == len(rows)
    assert all(getattr(split, part).dtype == np.int64 for part in PARTS)
    assert all(np.all(np.diff(getattr(split, part)) > 0) for part in PARTS)
    who = members(table, split)
    assert who["train"]
    assert who["test"]
    assert not who["train"] & who["val"]
    if options["strategy"] not in LEAKY:
        official = options["strategy"] == "official"
        shared = set(patients_in_both_halves(table)) if official else set()
        assert (who["train"] | who["val"]) & who["test"] == shared
    assert not who["val"] & who["test"]
    events = table.iloc[split.train][["Crackles", "Wheezes"]].to_numpy()
    assert events.any(axis=0).all()
    assert (events.sum(axis=1) == 0).any()
    trained = table.iloc[np.concatenate([split.train, split.val])]
    assert set(trained["Device"]) == set(table["Device"].iloc[split.train])
    if options["strategy"] not in ("official_disjoint", "leave_device_out", "training_half"):
        assert len(rows) == len(table)
