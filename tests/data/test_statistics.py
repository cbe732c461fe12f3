"""The statistics that are fitted on training cycles and turn a table into `Metadata`."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.corpora.icbhi import DEVICES, SITES
from data.statistics import MetadataStatistics
from utils.common.errors import UserError

UNKNOWN_DEVICE, UNKNOWN_SITE = len(DEVICES), len(SITES)


@pytest.fixture(autouse=True)
def nothing_warned(monkeypatch):
    """Each test begins without earlier warnings."""
    monkeypatch.setattr("data.statistics._warned", set())


def cycles(**columns) -> pd.DataFrame:
    n = len(next(iter(columns.values())))
    defaults = {
        "Device": ["AKGC417L"] * n, "AuscLoc": ["Al"] * n, "Age": [50.0] * n,
        "BMIDerived": [25.0] * n, "Duration": np.linspace(1, 3, n),
    }  # fmt: skip
    return pd.DataFrame({**defaults, **columns})


def fit(table: pd.DataFrame) -> MetadataStatistics:
    return MetadataStatistics.fit(table, DEVICES, SITES)


def test_missing_values_become_the_training_median():
    train = cycles(Age=[10.0, 20.0, 60.0, np.nan], BMIDerived=[20.0, np.nan, 30.0, 40.0])
    statistics = fit(train)
    assert statistics.medians == pytest.approx((20.0, 30.0, 2.0))
    ages = np.array([10, 20, 60, 20])
    assert statistics.mean[0] == pytest.approx(ages.mean())
    assert statistics.std[0] == pytest.approx(ages.std())
    metadata = statistics.transform(cycles(Age=[np.nan, 60.0], BMIDerived=[np.nan, np.inf]))
    expected = (np.array([20, 60]) - ages.mean()) / ages.std()
    assert metadata.rest[:, 0].numpy() == pytest.approx(expected, rel=1e-6)
    assert metadata.rest[0, 1] == metadata.rest[1, 1]  # not finite counts as missing
    assert metadata.known.all()


def test_training_cycles_become_standard_scores():
    rng = np.random.default_rng(0)
    train = cycles(Age=rng.uniform(1, 90, 200), BMIDerived=rng.normal(25, 4, 200))
    metadata = fit(train).transform(train)
    rest = metadata.rest.double().numpy()
    assert metadata.rest.dtype == torch.float32
    assert metadata.device.dtype == metadata.site.dtype == torch.int64
    assert np.allclose(rest.mean(axis=0), 0, atol=1e-5)
    assert np.allclose(rest.std(axis=0), 1, atol=1e-5)


def test_constant_and_unknown_scalars_do_no_harm():
    train = cycles(Age=[50.0] * 3, BMIDerived=[np.nan] * 3, Duration=[0.1 + 0.2, 0.3, 0.3])
    rest = fit(train).transform(cycles(Age=[51.0], BMIDerived=[25.0])).rest
    assert (rest[0, :2] == 0).all(), "an untrained weight must not see z = 25"
    assert fit(train).transform(train).rest.abs().max() < 1e-6


def test_indices_follow_the_vocabulary():
    train = cycles(Device=[*DEVICES, *DEVICES[:3]], AuscLoc=list(SITES))
    statistics = fit(train)
    metadata = statistics.transform(train)
    assert metadata.device.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert metadata.site.tolist() == list(range(7))
    assert statistics.device_counts == (2, 2, 2, 1, 0)
    assert statistics.site_counts == (1,) * 7 + (0,)


def test_another_corpus_brings_its_own_vocabulary():
    train = cycles(Device=["Yunting", "Yunting", "other"], AuscLoc=["p1", "p2", "p3"])
    statistics = MetadataStatistics.fit(train, ("Yunting",), ("p1", "p2", "p3", "p4"))
    assert statistics.device_counts == (2, 1) and statistics.site_counts == (1, 1, 1, 0, 0)
    again = MetadataStatistics.from_dict(statistics.to_dict())
    assert again == statistics
    assert again.transform(train).device.tolist() == [0, 0, 1]


def test_the_unseen_is_unknown_with_one_warning(caplog):
    statistics = fit(cycles(Device=["Meditron"] * 3, AuscLoc=["Tc"] * 3))
    table = cycles(
        Device=["Meditron", "Litt3200", "Litt3200", "Stetho", None],
        AuscLoc=["Tc", "Tc", "Al", "Tc", np.nan],
    )
    with caplog.at_level(logging.WARNING):
        metadata = statistics.transform(table)
    assert metadata.device.tolist() == [3] + [UNKNOWN_DEVICE] * 4
    assert metadata.site.tolist() == [6, 6, UNKNOWN_SITE, 6, UNKNOWN_SITE]
    assert metadata.known[:, 0].tolist() == [True] + [False] * 4
    assert metadata.known[:, 1].tolist() == [True, True, False, True, False]
    assert metadata.known[:, 2:].all()
    for part in ("device Litt3200 (2 cycles)", "device Stetho (1", "device missing (1", "site Al"):
        assert part in caplog.text
    again = MetadataStatistics.from_dict(statistics.to_dict())  # as evaluation has them
    again.transform(table)
    assert len(caplog.records) == 1
    again.transform(cycles(Device=["Litt3200", "AKGC417L"]))
    assert "device AKGC417L (1 cycles)" in caplog.records[1].getMessage()
    assert "Litt3200" not in caplog.records[1].getMessage()


def test_statistics_survive_json_and_a_checkpoint(tmp_path):
    train = cycles(Age=[10.0, 20.5, np.nan], Device=["Meditron", "Litt3200", "Meditron"])
    statistics = fit(train)
    content = statistics.to_dict()
    assert MetadataStatistics.from_dict(json.loads(json.dumps(content))) == statistics
    torch.save(content, tmp_path / "c.pt")
    loaded = torch.load(tmp_path / "c.pt", weights_only=True)
    assert MetadataStatistics.from_dict(loaded) == statistics


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scalars", ["age"]),
        ("device_counts", [1, 2, 3]),  # not one per device
        ("sites", None),
        ("sites", 7),
        ("devices", "ABCD"),
        ("devices", [1, 2, 3, 4]),
        ("devices", ["a", "a", "b", "c"]),
        ("mean", [1.0]),
        ("mean", [1.0, 2.0, math.nan]),
        ("medians", [1.0, "2", 3.0]),
        ("std", [1.0, 0.0, 1.0]),
        ("std", [1.0, math.inf, 1.0]),
        ("device_counts", [1, 2, -1, 4, 5]),
        ("site_counts", "12345678"),
    ],
)
def test_damaged_statistics_are_refused(key, value):
    content = fit(cycles(Age=[1.0, 2.0])).to_dict()
    with pytest.raises(UserError, match=key):
        MetadataStatistics.from_dict({**content, key: value})


scalars = st.one_of(st.none(), st.floats(0.1, 120))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*DEVICES, None, "other"]), st.sampled_from([*SITES, None]),
            scalars, scalars, st.floats(0.1, 20),
        ),
        min_size=1,
        max_size=20,
    ),
    st.integers(1, 20),
)  # fmt: skip
def test_any_table_becomes_finite_metadata(rows, n_train):
    table = pd.DataFrame(rows, columns=["Device", "AuscLoc", "Age", "BMIDerived", "Duration"])
    statistics = fit(table.iloc[:n_train])
    metadata = statistics.transform(table)
    assert torch.isfinite(metadata.rest).all()
    assert metadata.rest.abs().max() < 1e9
    assert ((metadata.device == UNKNOWN_DEVICE) == ~metadata.known[:, 0]).all()
    assert ((metadata.site == UNKNOWN_SITE) == ~metadata.known[:, 1]).all()
    assert sum(statistics.device_counts) == sum(statistics.site_counts) == min(n_train, len(rows))
