"""The metadata file, and the statistics that are fitted on training cycles."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batch import DEVICES, SITES, UNKNOWN_DEVICE, UNKNOWN_SITE
from data.corpora.icbhi import read_cycles
from data.cycle_table import COLUMNS, derive_bmi
from data.metadata import build_metadata, check_metadata, main, read_metadata, write_metadata
from data.statistics import MetadataStatistics
from utils.common.errors import UserError


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    """Each test begins without warnings given before."""
    monkeypatch.setattr("data.metadata._told", set())


NOTEBOOK = Path(__file__).parents[2] / "NBs" / "00-ICBHI_metadata_creation.ipynb"
README_COLUMNS = [
    *("PID", "Filename", "CycleIndex", "CycleStart", "CycleEnd", "Crackles", "Wheezes", "Split"),
    *("Device", "Fold", "Age", "Sex", "BMI", "CW", "CH", "Disease", "AuscLoc"),
    *("Duration", "BMIDerived"),
]


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.real
def test_real_file(icbhi_root, tmp_path):
    path = tmp_path / "icbhi_metadata.csv"
    folder = str(icbhi_root / "annotations")
    assert main(["--data-folder", folder, "--output", str(path)]) == 0
    raw = pd.read_csv(path)
    assert list(raw.columns) == README_COLUMNS
    assert len(raw) == 6898
    assert raw.isna().sum()[["Age", "Sex", "BMI", "CW", "CH"]].tolist() == [61, 61, 894, 6149, 6172]
    again = tmp_path / "again.csv"
    write_metadata(build_metadata(folder), again)
    assert again.read_bytes() == path.read_bytes()
    table = read_cycles(folder, require_audio=False, cycle_metadata_path=path)
    assert table.drop(columns="Recording").equals(build_metadata(folder))


def test_written_if_absent_then_checked(icbhi_folder, tmp_path):
    path = tmp_path / "new" / "icbhi_metadata.csv"
    first = read_cycles(icbhi_folder, cycle_metadata_path=path)
    assert path.is_file()
    content = path.read_bytes()
    second = read_cycles(icbhi_folder, cycle_metadata_path=path)
    assert second.equals(first)
    assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no half file is left


def test_recordings_that_are_left_out_leave_the_file_alone(icbhi_folder, tmp_path, caplog):
    """A run that skips them needs no other file than the one that follows when they are mended."""
    path, faulty = tmp_path / "m.csv", icbhi_folder / "103_2b2_Pr_mc_AKGC417L.wav"
    content = faulty.read_bytes()
    faulty.unlink()
    few = read_cycles(icbhi_folder, cycle_metadata_path=path, report=lambda problem: None)
    assert len(few) == 20 and not path.exists()
    assert "is not written, because recordings were left out" in caplog.text
    faulty.write_bytes(content)
    whole = read_cycles(icbhi_folder, cycle_metadata_path=path)
    faulty.unlink()
    again = read_cycles(icbhi_folder, cycle_metadata_path=path, report=lambda problem: None)
    assert len(again) == 20
    expected = whole[whole["PID"] != 103].reset_index(drop=True)
    assert again.equals(expected)  # with the folds of the whole
    with pytest.raises(UserError, match="has no recording"):
        read_cycles(icbhi_folder, cycle_metadata_path=path)


def test_needs_no_audio(make_icbhi, tmp_path):
    table = build_metadata(make_icbhi(tmp_path / "data", audio=False))
    assert tuple(table.columns) == COLUMNS == tuple(README_COLUMNS)
    assert len(table) == 24


def test_rows_may_come_in_any_order_and_with_rounding(icbhi_folder, tmp_path):
    path = tmp_path / "m.csv"
    table = read_cycles(icbhi_folder, cycle_metadata_path=path)
    shuffled = pd.read_csv(path).sample(frac=1, random_state=0)
    shuffled["CycleEnd"] += 1e-9
    shuffled.to_csv(path, index=False)
    assert read_cycles(icbhi_folder, cycle_metadata_path=path).equals(table)


def test_folds_of_the_file_are_kept(icbhi_folder, tmp_path):
    path = tmp_path / "m.csv"
    table = read_cycles(icbhi_folder, cycle_metadata_path=path)
    file = pd.read_csv(path)
    file["Fold"] = (file["PID"] - 101) % 5
    file.to_csv(path, index=False)
    expected = ((table["PID"] - 101) % 5).tolist()
    assert table["Fold"].tolist() != expected
    assert read_cycles(icbhi_folder, cycle_metadata_path=path)["Fold"].tolist() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.assign(CycleEnd=f["CycleEnd"].where(f.index != 3, 2.95)),
         r"in 1 values: row 5 \(101_1b1_Al_sc_Meditron\): CycleEnd is 2.95, should be 2.9"),
        (lambda f: f.assign(Crackles=1 - f["Crackles"]),
         r"in 24 values: row 2 .*; row 3 .*; row 4 .*; row 5 .*; row 6"),
        (lambda f: f.assign(Sex="F"), r"Sex is F, should be M"),
        (lambda f: f.assign(Age=f["Age"].where(f.index > 3)), r"Age is nan, should be 5"),
        (lambda f: f.assign(Split="train"), r"Split is train, should be test"),
        (lambda f: f.drop(index=[7, 8]),
         r"2 cycles are annotated but not in the file \(102_.* cycle 3, 103_.* cycle 0\)"),
        (lambda f: pd.concat([f, f.iloc[[0]].assign(CycleIndex=9)]),
         r"1 cycles are in the file but not annotated \(101_1b1_Al_sc_Meditron cycle 9\)"),
        (lambda f: pd.concat([f, f.iloc[[2]]]), r"row 26: the cycle is there twice"),
        (lambda f: f.drop(columns=["Duration", "BMI"]), r"column BMI, Duration is missing"),
        (lambda f: f.assign(Age=f["Age"].astype(object).where(f.index != 4, "old")),
         r"row 6: Age is 'old', a number expected"),
        (lambda f: f.assign(Fold=f["Fold"].where(f.index != 0, 7)), r"Fold of 101.* is 7, 0..4"),
        (lambda f: f.assign(Fold=range(24)).assign(Fold=lambda g: g["Fold"] % 5),
         r"patient 101 is in more than one Fold"),
    ],
)  # fmt: skip
def test_a_file_that_differs_is_refused(icbhi_folder, tmp_path, change, message):
    path = tmp_path / "m.csv"
    read_cycles(icbhi_folder, cycle_metadata_path=path)
    change(pd.read_csv(path)).to_csv(path, index=False)
    with pytest.raises(UserError, match=message) as error:
        read_cycles(icbhi_folder, cycle_metadata_path=path)
    assert str(path) in str(error.value)
    assert "remove the file" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\x01", b'PID,Filename\n"1'])
def test_what_is_no_csv_is_refused(tmp_path, content):
    path = tmp_path / "m.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"m\.csv"):
        read_metadata(path)


def test_a_path_that_can_not_be_written(icbhi_folder, tmp_path, caplog):
    """Writing the file itself fails; a run only warns, for data folders are often read-only."""
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "m.csv"
    table = read_cycles(icbhi_folder, cycle_metadata_path=path)
    assert "m.csv can not be written" in caplog.text and len(table)
    with pytest.raises(UserError, match=r"m\.csv can not be written"):
        write_metadata(table, path)


def test_an_interrupted_write_leaves_the_old_file(icbhi_folder, tmp_path, monkeypatch):
    path = tmp_path / "m.csv"
    table = read_cycles(icbhi_folder, cycle_metadata_path=path)
    content = path.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        write_metadata(table.iloc[:3], path)
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ""] == ["m.csv"]


def test_command_reports_what_is_wrong(tmp_path, caplog):
    arguments = ["--data-folder", str(tmp_path / "none"), "--output", str(tmp_path / "m.csv")]
    assert main(arguments) == 2
    assert "does not exist" in caplog.text
    assert not (tmp_path / "m.csv").exists()


def test_bmi_is_derived_within_bounds():
    table = pd.DataFrame({
        "BMI": [22.0, np.nan, np.nan, np.nan, np.nan, np.nan],
        "CW": [20.0, 20.0, 20.0, np.nan, 9.0, 61.0],
        "CH": [110.0, 110.0, np.nan, 110.0, 100.0, 100.0],
    })  # fmt: skip
    expected = [22.0, 20 / 1.21, np.nan, np.nan, np.nan, np.nan]
    assert np.allclose(derive_bmi(table), expected, atol=1e-6, equal_nan=True)


@pytest.mark.slow
def test_notebook_writes_the_same_file(icbhi_folder, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="the notebook's test needs nbclient")
    nbformat = pytest.importorskip("nbformat", reason="the notebook's test needs nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # committed without outputs
    monkeypatch.setenv("ICBHI_ROOT", str(icbhi_folder))
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    expected = tmp_path / "expected.csv"
    write_metadata(build_metadata(icbhi_folder), expected)
    assert (icbhi_folder / "icbhi_metadata.csv").read_bytes() == expected.read_bytes()


# --- statistics ----------------------------------------------------------------------------------


def cycles(**columns) -> pd.DataFrame:
    n = len(next(iter(columns.values())))
    defaults = {
        "Device": ["AKGC417L"] * n, "AuscLoc": ["Al"] * n, "Age": [50.0] * n,
        "BMIDerived": [25.0] * n, "Duration": np.linspace(1, 3, n),
    }  # fmt: skip
    return pd.DataFrame({**defaults, **columns})


def test_missing_values_are_imputed_with_the_training_median():
    train = cycles(Age=[10.0, 20.0, 60.0, np.nan], BMIDerived=[20.0, np.nan, 30.0, 40.0])
    statistics = MetadataStatistics.fit(train)
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
    metadata = MetadataStatistics.fit(train).transform(train)
    rest = metadata.rest.double().numpy()
    assert metadata.rest.dtype == torch.float32
    assert metadata.device.dtype == metadata.site.dtype == torch.int64
    assert np.allclose(rest.mean(axis=0), 0, atol=1e-5)
    assert np.allclose(rest.std(axis=0), 1, atol=1e-5)


def test_scalars_without_scatter_or_without_any_value_do_no_harm():
    train = cycles(Age=[50.0] * 3, BMIDerived=[np.nan] * 3, Duration=[0.1 + 0.2, 0.3, 0.3])
    rest = MetadataStatistics.fit(train).transform(cycles(Age=[51.0], BMIDerived=[25.0])).rest
    assert torch.isfinite(rest).all()
    assert rest[0, 0] == pytest.approx(1.0)
    fitted = MetadataStatistics.fit(train).transform(train).rest
    assert fitted.abs().max() < 1e-6


def test_only_training_cycles_matter():
    table = cycles(Age=[10.0, 20.0, 80.0, 90.0])
    statistics = MetadataStatistics.fit(table.iloc[:2])
    changed = table.assign(Age=[10.0, 20.0, 1.0, 2.0])
    assert MetadataStatistics.fit(changed.iloc[:2]) == statistics
    assert statistics != MetadataStatistics.fit(table)


def test_indices_follow_the_vocabulary():
    train = cycles(Device=[*DEVICES, *DEVICES[:3]], AuscLoc=list(SITES))
    statistics = MetadataStatistics.fit(train)
    metadata = statistics.transform(train)
    assert metadata.device.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert metadata.site.tolist() == list(range(7))
    assert statistics.device_counts == (2, 2, 2, 1, 0)
    assert statistics.site_counts == (1,) * 7 + (0,)
    assert len(metadata) == 7


def test_what_training_has_not_seen_is_unknown_with_one_warning(caplog):
    statistics = MetadataStatistics.fit(cycles(Device=["Meditron"] * 3, AuscLoc=["Tc"] * 3))
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
    assert len(caplog.records) == 1
    for part in ("device Litt3200 (2 cycles)", "device Stetho (1", "device missing (1", "site Al"):
        assert part in caplog.text


def test_one_run_warns_once_however_often_its_table_is_transformed(caplog):
    statistics = MetadataStatistics.fit(cycles(Device=["Meditron"] * 3))
    table = cycles(Device=["Litt3200", "Litt3200", "Meditron"])
    first = statistics.transform(table)
    again = MetadataStatistics.from_dict(statistics.to_dict())  # as evaluation has them
    assert again.transform(table).device.tolist() == first.device.tolist()
    again.transform(table.iloc[1:])  # fewer cycles are no news
    assert len(caplog.records) == 1
    again.transform(cycles(Device=["Litt3200", "AKGC417L"]))
    assert [r.getMessage().split(": ")[1] for r in caplog.records[1:]] == [
        "device AKGC417L (1 cycles)"
    ]
    MetadataStatistics.fit(cycles(Device=["AKGC417L"] * 3)).transform(table)  # another training
    assert len(caplog.records) == 3 and "Litt3200" in caplog.records[2].getMessage()


def test_a_device_that_is_missing_in_training_counts_as_unknown():
    statistics = MetadataStatistics.fit(cycles(Device=["Meditron", None, "Stetho"]))
    assert statistics.device_counts == (0, 0, 0, 1, 2)
    device = statistics.transform(cycles(Device=[None, "Meditron"])).device
    assert device.tolist() == [UNKNOWN_DEVICE, 3]


def test_statistics_survive_json_and_a_weights_only_checkpoint(tmp_path):
    train = cycles(Age=[10.0, 20.5, np.nan], Device=["Meditron", "Litt3200", "Meditron"])
    statistics = MetadataStatistics.fit(train)
    content = statistics.to_dict()
    assert MetadataStatistics.from_dict(json.loads(json.dumps(content))) == statistics
    torch.save(content, tmp_path / "c.pt")
    loaded = torch.load(tmp_path / "c.pt", weights_only=True)
    assert MetadataStatistics.from_dict(loaded) == statistics


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("devices", ["AKGC417L"]),
        ("sites", None),
        ("mean", [1.0]),
        ("mean", [1.0, 2.0, math.nan]),
        ("medians", [1.0, "2", 3.0]),
        ("std", [1.0, 0.0, 1.0]),
        ("std", [1.0, math.inf, 1.0]),
        ("device_counts", [1, 2, -1, 4, 5]),
        ("site_counts", "12345678"),
    ],
)
def test_foreign_statistics_are_refused(key, value):
    content = MetadataStatistics.fit(cycles(Age=[1.0, 2.0])).to_dict()
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
    statistics = MetadataStatistics.fit(table.iloc[:n_train])
    metadata = statistics.transform(table)
    assert torch.isfinite(metadata.rest).all()
    assert metadata.rest.abs().max() < 1e9
    assert ((metadata.device == UNKNOWN_DEVICE) == ~metadata.known[:, 0]).all()
    assert ((metadata.site == UNKNOWN_SITE) == ~metadata.known[:, 1]).all()
    assert sum(statistics.device_counts) == sum(statistics.site_counts) == min(n_train, len(rows))


def test_the_check_compares_every_column(icbhi_folder, tmp_path):
    path = tmp_path / "m.csv"
    table = read_cycles(icbhi_folder, cycle_metadata_path=path)
    for name in set(COLUMNS) - {"Fold", "Filename", "CycleIndex"}:
        text = table[name].map(type).eq(str).any()
        other = "other" if text else 999
        values = table[name].astype(object).where(table.index > 0, other)
        write_metadata(table.assign(**{name: values}), path)
        with pytest.raises(UserError, match=f": {name} is {other}"):
            check_metadata(table, path)
