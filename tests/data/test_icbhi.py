"""The reader of ICBHI folders: real counts, every form that is accepted, every fault refused."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from data.corpora.icbhi import (
    FULL_COUNTS,
    SUBFOLDERS,
    TABLES,
    _mention,
    completeness,
    read_cycles,
)
from data.corpora.icbhi_tables import (
    parse_annotation,
    parse_demographics,
    parse_diagnosis,
    parse_split,
)
from data.cycle_table import COLUMNS, classes_of
from data.task import CLASSES
from utils.common.errors import UserError

STEM = "101_1b1_Al_sc_Meditron"
quick = settings(deadline=None, max_examples=50)  # machines may be busy


@pytest.fixture(scope="module")
def real(icbhi_root):
    return read_cycles(icbhi_root / "annotations", require_audio=False)


# --- real annotations: all that is known about the database -------------------------------------


@pytest.mark.real
def test_real_counts_by_part_and_class(real):
    state = completeness(real)
    assert state.counts == FULL_COUNTS
    assert (state.partial, state.message) == (False, "")


@pytest.mark.real
@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("Device", {"AKGC417L": (2510, 1836), "Litt3200": (41, 461), "LittC2SE": (594, 0),
                    "Meditron": (997, 459)}),
        ("AuscLoc", {"Al": (732, 505), "Ar": (793, 484), "Ll": (374, 230), "Lr": (481, 338),
                     "Pl": (585, 454), "Pr": (591, 412), "Tc": (586, 333)}),
    ],
)  # fmt: skip
def test_real_counts_by_device_and_site(real, column, expected):
    found = {
        value: tuple(int(((real[column] == value) & (real["Split"] == part)).sum())
                     for part in ("train", "test"))
        for value in real[column].unique()
    }  # fmt: skip
    assert found == expected


@pytest.mark.real
def test_real_durations(real):
    d = real["Duration"].to_numpy()
    assert np.allclose(d, real["CycleEnd"] - real["CycleStart"], atol=1e-6)
    percentiles = np.percentile(d, (0, 5, 50, 95, 100))
    assert np.allclose(percentiles, (0.200, 1.047, 2.537, 4.591, 16.163), atol=5e-4)
    assert round(d.mean(), 2) == 2.70
    assert (d > 10).sum() == 2
    assert round(d.sum() / 3600, 2) == 5.17


@pytest.mark.real
def test_real_missing_values_and_bmi(real):
    missing = real.isna().sum()
    assert {name: missing[name] for name in ("Age", "Sex", "BMI", "CW", "CH")} == {
        "Age": 61, "Sex": 61, "BMI": 894, "CW": 6149, "CH": 6172,
    }  # fmt: skip
    assert set(real.loc[real["Age"].isna(), "PID"]) == {223}
    patients = real.drop_duplicates("PID")
    adult = patients["BMI"].notna()
    derived = patients["BMI"].isna() & patients["BMIDerived"].notna()
    assert (adult.sum(), derived.sum(), patients["BMIDerived"].isna().sum()) == (75, 42, 9)
    assert patients.loc[derived, "BMIDerived"].between(10, 60).all()


@pytest.mark.real
def test_real_table_layout(real):
    assert tuple(real.columns) == (*COLUMNS, "Recording")
    assert real.index.equals(real.sort_values(["Filename", "CycleIndex"]).index)
    assert list(real.index) == list(range(6898))
    assert (real.groupby("Filename")["CycleIndex"].min() == 0).all()
    assert (real.groupby("PID")["Device"].nunique() == 1).sum() == 122
    alias = real[real["Filename"] == "226_1b1_Pl_sc_LittC2SE"]
    assert set(alias["Split"]) == {"train"}


@pytest.mark.real
def test_real_recordings_are_partial_and_say_so(icbhi_root):
    table = read_cycles(icbhi_root / "recordings")
    state = completeness(table)
    assert state.partial
    assert "PARTIAL DATA" in state.message
    assert "50 of 920" in state.message
    assert len(state.message) <= 100
    per_class = {
        part: [state.counts[f"{part}_{name}"] for name in CLASSES] for part in ("train", "test")
    }
    assert per_class == {"train": [136, 81, 23, 9], "test": [177, 17, 27, 0]}
    assert table["PID"].nunique() == 42
    assert all(Path(path).is_file() for path in table["Recording"].unique())


# --- forms that are accepted ---------------------------------------------------------------------


def test_table_of_a_small_folder(icbhi_folder):
    table = read_cycles(icbhi_folder)
    assert len(table) == 24
    assert classes_of(table).tolist() == [0, 1, 2, 3] * 6
    first = table.iloc[0]
    assert (first["PID"], first["Split"], first["Device"], first["AuscLoc"]) == (
        101, "train", "Meditron", "Al",
    )  # fmt: skip
    assert (first["Age"], first["Sex"], first["CW"], first["CH"]) == (5, "M", 20, 110)
    assert np.isnan(first["BMI"])
    assert first["BMIDerived"] == pytest.approx(20 / 1.1**2, abs=1e-6)
    assert first["Recording"] == str(icbhi_folder / f"{STEM}.wav")
    assert table["BMI"].iloc[4] == 21.5


@pytest.mark.parametrize("place", ["same", "parent", *SUBFOLDERS])
def test_tables_are_found_around_the_recordings(icbhi_folder, place):
    expected = read_cycles(icbhi_folder).drop(columns="Recording")
    folder = icbhi_folder
    if place == "parent":
        for names in TABLES.values():
            (folder / names[0]).rename(folder.parent / names[0])
    elif place != "same":
        sub = folder / place
        sub.mkdir()
        for path in list(folder.glob("1*")):
            path.rename(sub / path.name)
    assert read_cycles(folder).drop(columns="Recording").equals(expected)


def test_the_mirrors_tables_and_any_letter_case(icbhi_folder):
    expected = read_cycles(icbhi_folder)
    split, demographics, diagnosis = (icbhi_folder / names[0] for names in TABLES.values())
    split.rename(icbhi_folder / split.name.upper())
    rows = demographics.read_text().replace("\t", " ").replace("\r", "")
    demographics.unlink()
    (icbhi_folder / "Demographic_Info.TXT").write_text("\n" + rows)
    rows = diagnosis.read_text().replace("\t", ",").replace("\r", "")
    diagnosis.unlink()
    (icbhi_folder / "Patient_Diagnosis.csv").write_text("ID,CLASS\n" + rows)
    assert read_cycles(icbhi_folder).equals(expected)


def test_byte_order_mark_line_ends_and_latin_1(icbhi_folder):
    expected = read_cycles(icbhi_folder)
    for path in icbhi_folder.glob("*.txt"):
        text = path.read_text().replace("\r", "").replace("\n", "\r\n\r\n")
        path.write_bytes(b"\xef\xbb\xbf\r\n" + text.encode())
    diagnosis = icbhi_folder / TABLES["diagnosis"][0]
    diagnosis.write_bytes(diagnosis.read_bytes()[3:].replace(b"COPD", b"Pneumonie\xe9"))
    table = read_cycles(icbhi_folder)
    assert set(table["Disease"]) == {"Pneumonieé"}
    assert table.drop(columns="Disease").equals(expected.drop(columns="Disease"))


def test_flac_upper_case_and_hidden_files(icbhi_folder):
    samples, rate = soundfile.read(icbhi_folder / f"{STEM}.wav")
    (icbhi_folder / f"{STEM}.wav").unlink()
    soundfile.write(icbhi_folder / f"{STEM}.flac", samples, rate)
    other = "102_1b1_Tc_mc_AKGC417L"
    (icbhi_folder / f"{other}.wav").rename(icbhi_folder / f"{other}.WAV")
    (icbhi_folder / f"._{STEM}.wav").write_bytes(b"left by another system")
    table = read_cycles(icbhi_folder)
    assert len(table) == 24
    assert table["Recording"].iloc[0].endswith(".flac")


def test_the_one_recording_with_two_names(make_icbhi, tmp_path):
    folder = make_icbhi(tmp_path / "data", {STEM: "train", "226_1b1_Pl_sc_LittC2SE": "test"})
    split = folder / TABLES["split"][0]
    split.write_text(split.read_text().replace("226_1b1_Pl_sc_LittC2SE", "226_1b1_Pl_sc_Meditron"))
    table = read_cycles(folder)
    assert set(table.loc[table["PID"] == 226, "Split"]) == {"test"}
    assert set(table.loc[table["PID"] == 226, "Device"]) == {"LittC2SE"}


def test_all_problems_can_be_collected(icbhi_folder):
    (icbhi_folder / f"{STEM}.txt").write_text("0 1 2 0\n")
    (icbhi_folder / "102_1b1_Tc_mc_AKGC417L.wav").unlink()
    problems = []
    table = read_cycles(icbhi_folder, report=problems.append)
    assert len(problems) == 2
    assert set(table["PID"]) == {103, 104, 105, 106}


# --- faults: each is refused with the file, the row and the remedy --------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0 1 0 0\n1 2 0\n", r"row 2: 3 columns, 4 expected"),
        ("0 1 0 0 0\n", r"row 1: 5 columns"),
        ("\n\n0 1 0 2\n", r"row 3: wheeze is '2'"),
        ("0 1 x 0\n", r"crackle is 'x'"),
        ("zero 1 0 0\n", r"start is 'zero', a finite number"),
        ("0 nan 0 0\n", r"end is 'nan'"),
        ("0 inf 0 0\n", r"end is 'inf'"),
        ("0 1e999 0 0\n", r"end is '1e999'"),
        ("-0.5 1 0 0\n", r"no breath is from -0.5 s"),
        ("2 1 0 0\n", r"no breath is from 2 s to 1 s"),
        ("0 0.0001 0 0\n", r"row 1: no breath is from 0 s to 0.0001 s"),
        ("0 1e300 0 0\n", r"row 1: no breath is from 0 s to 1e\+300 s"),
        ("3 4 0 0\n1 2 0 0\n", r"row 2: starts at 1 s, within or before"),
        ("0 2 0 0\n1 3 0 0\n", r"row 2: starts at 1 s, within or before"),
        ("\n \n", r"holds no cycle"),
    ],
)
def test_faulty_annotations(icbhi_folder, rows, message):
    (icbhi_folder / f"{STEM}.txt").write_text(rows)
    with pytest.raises(UserError, match=message) as error:
        read_cycles(icbhi_folder)
    assert f"{STEM}.txt" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("split", lambda t: t.replace("\ttest", "\tvalid"), r"row 5: .* is not a recording and"),
        ("split", lambda t: t + f"{STEM}\ttest\r\n", r"row 7: 101.* is there twice"),
        ("split", lambda t: t.replace(f"{STEM}\ttrain\r\n", ""),
         rf"recording {STEM} is not named in ICBHI_challenge_train_test.txt; add the row"),
        ("split", lambda t: "", "has no rows"),
        ("split", lambda t: "../../etc/passwd\ttrain\n", r"row 1: recording name"),
        ("demographics", lambda t: t + "101\t9\tF\tNA\tNA\tNA\n", r"row 7: 101 is there"),
        ("demographics", lambda t: t.replace("\tNA\tNA", "\tNA"), r"row 2: 5 columns, 6 expected"),
        ("demographics", lambda t: t.replace("\tF\t", "\tX\t"), r"row 2: sex is 'X'"),
        ("demographics", lambda t: t.replace("\t5\t", "\told\t"), r"row 1: age \(years\) is 'old'"),
        ("demographics", lambda t: t.replace("\t5\t", "\t-5\t"), r"age \(years\) is -5, outside"),
        ("demographics", lambda t: t.replace("\t5\t", "\tinf\t"), r"age \(years\) is 'inf'"),
        ("demographics", lambda t: t.replace("101\t", "one1\t", 1).replace("102", "1o2"),
         r"row 1: 'one1' is not a patient number"),
        ("demographics", lambda t: t.replace("101\t", "107\t", 1), r"patient 101 .* demographics"),
        ("diagnosis", lambda t: t + "101\tCOPD\n", r"row 7: 101 is there twice"),
        ("diagnosis", lambda t: t.replace("101\t", "107\t"), r"patient 101 .* the diagnosis"),
        ("diagnosis", lambda t: "", "has no rows"),
    ],
)  # fmt: skip
def test_faulty_tables(icbhi_folder, kind, change, message):
    path = icbhi_folder / TABLES[kind][0]
    path.write_bytes(change(path.read_bytes().decode()).encode())
    with pytest.raises(UserError, match=message) as error:
        read_cycles(icbhi_folder)
    assert path.name in str(error.value)


@pytest.mark.parametrize("kind", TABLES)
def test_a_missing_table_is_named_with_its_address(icbhi_folder, kind):
    name = TABLES[kind][0]
    (icbhi_folder / name).unlink()
    with pytest.raises(UserError) as error:
        read_cycles(icbhi_folder)
    address = f"https://bhichallenge.med.auth.gr/sites/default/files/ICBHI_final_database/{name}"
    assert address in str(error.value)


@pytest.mark.parametrize("suffix", [".wav", ".txt"])
def test_half_a_recording_is_refused(icbhi_folder, suffix):
    (icbhi_folder / f"{STEM}{suffix}").unlink()
    with pytest.raises(UserError, match=rf"{STEM}.* has no .*{suffix}"):
        read_cycles(icbhi_folder)
    table = read_cycles(icbhi_folder, require_audio=False)
    assert len(table) == (24 if suffix == ".wav" else 20)
    assert set(table["Recording"]) == {""}


@pytest.mark.parametrize(
    "name", [f"{STEM}_events.txt", f"{STEM}_label.txt", "101_notes.txt", "filename_format.txt"]
)
def test_other_text_files_are_ignored(icbhi_folder, name, caplog):
    _mention.cache_clear()
    expected = read_cycles(icbhi_folder)
    (icbhi_folder / name).write_text("crackle 0.3 0.4")
    for _ in range(2):
        assert read_cycles(icbhi_folder).equals(expected)
    assert caplog.text.count(name) == name[0].isdigit()  # said once


def test_no_wav_at_all(make_icbhi, tmp_path):
    folder = make_icbhi(tmp_path / "data", audio=False)
    with pytest.raises(UserError, match=r"annotations but no .wav .*data_folder"):
        read_cycles(folder)
    (folder / "ICBHI_final_database.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"unzip ICBHI_final_database.zip"):
        read_cycles(folder)


def test_an_empty_folder_names_the_download(tmp_path):
    with pytest.raises(UserError, match=r"no .wav and no annotation found there or in .* https://"):
        read_cycles(tmp_path, require_audio=False)


def test_no_data_folder(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist; set dataset.data_folder"):
        read_cycles(tmp_path / "nowhere")


def test_the_same_recording_twice(icbhi_folder):
    (icbhi_folder / "audio_and_txt_files").mkdir()
    shutil.copy(icbhi_folder / f"{STEM}.wav", icbhi_folder / "audio_and_txt_files")
    with pytest.raises(UserError, match=rf"recording {STEM} is there twice"):
        read_cycles(icbhi_folder)


def test_a_name_that_is_no_recording(icbhi_folder):
    for suffix in (".wav", ".txt"):
        path = icbhi_folder / f"{STEM}{suffix}"
        path.rename(icbhi_folder / f"101_1b1_Al_sc_Stetho{suffix}")
    with pytest.raises(UserError, match=r"'Stetho' is not one of AKGC417L"):
        read_cycles(icbhi_folder)


@pytest.mark.real
def test_other_counts_are_said_too(real):
    changed = real.copy()
    changed.loc[0, "Crackles"] = 1 - changed.loc[0, "Crackles"]
    state = completeness(changed)
    assert state.partial
    assert "NOT THE ICBHI 2017 COUNTS" in state.message


# --- properties ----------------------------------------------------------------------------------


@quick
@given(
    st.one_of(
        st.text(),
        st.lists(
            st.tuples(
                st.floats(), st.floats(), st.sampled_from("0123"), st.sampled_from(["0", "1", ""])
            ).map(lambda row: "\t".join(map(str, row)))
        ).map("\n".join),
    )
)
def test_any_annotation_is_sound_or_refused(text):
    try:
        cycles = parse_annotation(text, "x.txt")
    except UserError as error:
        assert "x.txt" in str(error)
        return
    end = 0.0
    for cycle in cycles:
        assert math.isfinite(cycle.start) and cycle.end <= 3600
        assert end <= cycle.start < cycle.end
        assert {cycle.crackle, cycle.wheeze} <= {0, 1}
        end = cycle.end


@quick
@given(st.text())
def test_any_table_is_understood_or_refused_in_words(text):
    for parse in (parse_split, parse_demographics, parse_diagnosis):
        try:
            assert parse(text, "table")
        except UserError as error:
            assert "table" in str(error)
