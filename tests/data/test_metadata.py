"""The metadata file: written where absent, checked where present, completed where it is short."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data.corpora.icbhi import read_cycles
from data.corpora.registry import read_corpus
from data.cycle_table import COLUMNS, check_metadata, derive, read_metadata, write_metadata
from data.metadata import build_metadata, main
from utils.common.errors import UserError
from utils.config.schema import DatasetConfig


def read(folder, path, **keys) -> pd.DataFrame:
    return read_corpus(
        DatasetConfig(data_folder=str(folder), cycle_metadata_path=str(path), **keys)
    )


@pytest.fixture
def file(icbhi_folder, tmp_path) -> Path:
    """A metadata file as a run writes it."""
    read(icbhi_folder, tmp_path / "m.csv")
    return tmp_path / "m.csv"


@pytest.mark.real
def test_real_file(icbhi_root, tmp_path):
    path = tmp_path / "icbhi_metadata.csv"
    folder = str(icbhi_root / "annotations")
    assert main(["--data-folder", folder, "--output", str(path)]) == 0
    raw = pd.read_csv(path)
    assert tuple(raw.columns) == COLUMNS
    assert len(raw) == 6898
    assert raw.isna().sum()[["Age", "Sex", "BMI", "CW", "CH"]].tolist() == [61, 61, 894, 6149, 6172]
    table = read_cycles(folder, require_audio=False)
    assert check_metadata(table, path).equals(table)


def test_written_if_absent_then_checked(icbhi_folder, tmp_path):
    path = tmp_path / "new" / "m.csv"
    first = read(icbhi_folder, path)
    content = path.read_bytes()
    assert read(icbhi_folder, path).equals(first)
    assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no half file is left


def test_skipped_recordings_leave_the_file_alone(icbhi_folder, tmp_path, caplog):
    path, faulty = tmp_path / "m.csv", icbhi_folder / "103_2b2_Pr_mc_AKGC417L.wav"
    content = faulty.read_bytes()
    faulty.unlink()
    few = read(icbhi_folder, path, on_bad_recording="skip")
    assert len(few) == 20 and not path.exists()
    assert "is not written" in caplog.text
    faulty.write_bytes(content)
    whole = read(icbhi_folder, path)
    faulty.unlink()
    again = read(icbhi_folder, path, on_bad_recording="skip")
    expected = whole[whole["PID"] != 103].reset_index(drop=True)
    assert again.equals(expected)  # with the folds of the whole
    with pytest.raises(UserError, match="has no recording"):
        read(icbhi_folder, path)


def test_needs_no_audio(make_icbhi, tmp_path):
    table = build_metadata(make_icbhi(tmp_path / "data", audio=False))
    assert tuple(table.columns) == COLUMNS
    assert len(table) == 24


def test_any_order_of_rows_and_rounding(icbhi_folder, file):
    table = read(icbhi_folder, file)
    shuffled = pd.read_csv(file).sample(frac=1, random_state=0)
    shuffled["CycleEnd"] += 1e-9
    shuffled.to_csv(file, index=False)
    assert read(icbhi_folder, file).equals(table)


@pytest.mark.parametrize("without", [["Duration"], ["BMIDerived"], ["Duration", "BMIDerived"]])
@pytest.mark.parametrize("form", ["plain", "reversed columns", "further column", "byte-order mark"])
def test_older_files_are_completed(without, form, icbhi_folder, file):
    table = read(icbhi_folder, file)
    older = pd.read_csv(file).drop(columns=without)
    if form == "reversed columns":
        older = older[older.columns[::-1]]
    if form == "further column":
        older["Remark"] = "x"
    older.to_csv(file, index=False, encoding="utf-8-sig" if form == "byte-order mark" else None)
    assert read(icbhi_folder, file).equals(table)


def test_the_authors_17_columns_and_their_folds(icbhi_folder, file):
    table = read(icbhi_folder, file)
    authors = pd.read_csv(file).drop(columns=["Duration", "BMIDerived"])
    authors["Fold"] = (authors["PID"] - 101) % 5
    authors.to_csv(file, index=False)
    expected = table.assign(Fold=(table["PID"] - 101) % 5)
    assert not expected.equals(table)
    assert read(icbhi_folder, file).equals(expected)
    assert read_metadata(file)["BMIDerived"].equals(table["BMIDerived"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.assign(CycleEnd=f["CycleEnd"].where(f.index != 3, 2.95)),
         r"in 1 values: row 5 \(101_1b1_Al_sc_Meditron\): CycleEnd is 2.95, should be 2.9"),
        (lambda f: f.assign(Crackles=1 - f["Crackles"]),
         r"in 24 values: row 2 .*; row 3 .*; row 4 .*; row 5 .*; row 6"),
        (lambda f: f.assign(Age=f["Age"].where(f.index > 3)), r"Age is nan, should be 5"),
        (lambda f: f.drop(index=[7, 8]),
         r"2 cycles are annotated but not in the file \(102_.* cycle 3, 103_.* cycle 0\)"),
        (lambda f: pd.concat([f, f.iloc[[0]].assign(CycleIndex=9)]),
         r"1 cycles are in the file but not annotated \(101_1b1_Al_sc_Meditron cycle 9\)"),
        (lambda f: pd.concat([f, f.iloc[[2]]]), r"row 26: the cycle is there twice"),
        (lambda f: f.drop(columns=["Split", "BMI"]), r"column Split, BMI is missing"),
        (lambda f: f.assign(Age=f["Age"].astype(object).where(f.index != 4, "old")),
         r"row 6: Age is 'old', a number expected"),
        (lambda f: f.assign(Fold=f["Fold"].where(f.index != 0, 7)), r"Fold of 101.* is 7, 0..4"),
        (lambda f: f.assign(Fold=range(24)).assign(Fold=lambda g: g["Fold"] % 5),
         r"patient 101 is in more than one Fold"),
    ],
)  # fmt: skip
def test_a_file_that_differs_is_refused(icbhi_folder, file, change, message):
    change(pd.read_csv(file)).to_csv(file, index=False)
    with pytest.raises(UserError, match=message) as error:
        read(icbhi_folder, file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\x01", b'PID,Filename\n"1'])
def test_what_is_no_csv_is_refused(tmp_path, content):
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"m\.csv"):
        read_metadata(tmp_path / "m.csv")


def test_a_path_that_cannot_be_written(icbhi_folder, tmp_path, caplog):
    """Writing fails; a run only warns, because data folders are often read-only."""
    (tmp_path / "file").write_text("in the way")
    table = read(icbhi_folder, tmp_path / "file" / "m.csv")
    assert "m.csv cannot be written" in caplog.text and len(table)
    with pytest.raises(UserError, match=r"m\.csv"):
        write_metadata(table, tmp_path / "file" / "m.csv")


def test_the_command_fails_in_words(tmp_path, caplog):
    arguments = ["--data-folder", str(tmp_path / "none"), "--output", str(tmp_path / "m.csv")]
    assert main(arguments) == 2
    assert "does not exist" in caplog.text
    assert not (tmp_path / "m.csv").exists()


def test_duration_and_bmi_are_derived():
    table = pd.DataFrame({
        "BMI": [22.0, np.nan, np.nan, np.nan, np.nan, np.nan],
        "CW": [20.0, 20.0, 20.0, np.nan, 9.0, 61.0],
        "CH": [110.0, 110.0, np.nan, 110.0, 100.0, 100.0],
        "CycleStart": 0.1, "CycleEnd": 0.1 + 0.2,
    })  # fmt: skip
    expected = [22.0, 20 / 1.21, np.nan, np.nan, np.nan, np.nan]
    derived = derive(table)
    assert np.allclose(derived["BMIDerived"], expected, atol=1e-6, equal_nan=True)
    assert set(derived["Duration"]) == {0.2}
