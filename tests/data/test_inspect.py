"""What `python -m data.inspect` says about a folder."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from data.config import DatasetConfig
from data.corpora.icbhi import read_cycles
from data.inspect import describe, inspect_corpus, main, traps

STEM = "101_1b1_Al_sc_Meditron"


def inspect_folder(folder):
    return inspect_corpus(DatasetConfig(data_folder=str(folder)))


def report(folder) -> str:
    return describe(*inspect_folder(folder))


def test_counts_of_a_small_folder(icbhi_folder):
    text = report(icbhi_folder)
    assert "PARTIAL DATA: 6 of 920 recordings, 24 of 6,898 cycles" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "official train 16 4 4 4 4 4 4" in lines
    assert "official test 8 2 2 2 2 2 2" in lines
    assert "AKGC417L 8 2 75.0 0 0 -" in lines
    assert "Litt3200 0 0 - 4 1 75.0" in lines
    assert "Tc 4 1 75.0 0 0 -" in lines
    assert "min 0.400, 5 % 0.400, median 0.700, mean 0.70, 95 % 1.000, max 1.000 s" in lines
    assert "BMI 12 3" in lines
    assert "6 4000 Hz, PCM_16, 1 channel(s)" in lines
    assert text.endswith("none found")


def test_the_text_fits_100_columns(icbhi_folder):
    (icbhi_folder / f"{STEM}.txt").write_text("1 2 0\n")
    assert max(len(line) for line in report(icbhi_folder).splitlines()) <= 100


@pytest.mark.real
def test_real_annotations_and_their_traps(icbhi_root):
    table, problems = inspect_folder(icbhi_root / "annotations")
    assert problems == []
    text = " ".join(describe(table, problems).split())
    for fact in (
        "Complete: all counts",
        "Patients 156, 218 are in both halves (120 of 2,756 test cycles)",
        "official_disjoint leaves 2,636",
        "Litt3200 is 73.2 % abnormal in train (41 cycles) and 29.5 % in test (461)",
        "LittC2SE has no test cycle (594 in the other)",
        "122 of 126 patients have one device only",
        "2 cycles are longer than 10 s; 5.17 h in total",
        "no audio here: annotations only",
    ):
        assert fact in text


@pytest.mark.real
def test_real_recordings(icbhi_root, capsys):
    assert main(["--data-folder", str(icbhi_root / "recordings")]) == 0
    out = capsys.readouterr().out
    assert "PARTIAL DATA: 50 of 920 recordings" in out
    assert "    8  4000 Hz, PCM_16" in out
    assert out.rstrip().endswith("none found")


def test_every_problem_is_found_in_one_go(icbhi_folder, capsys):
    (icbhi_folder / f"{STEM}.txt").write_text("0 1 0\n")
    (icbhi_folder / "102_1b1_Tc_mc_AKGC417L.txt").unlink()
    (icbhi_folder / "103_2b2_Pr_mc_AKGC417L.wav").write_bytes(b"no audio")
    soundfile.write(icbhi_folder / "104_1b1_Ll_sc_Meditron.wav", np.zeros(0), 4000)
    short = icbhi_folder / "105_1b1_Pl_sc_Litt3200.wav"
    soundfile.write(short, np.random.default_rng(0).normal(0, 0.1, 8000), 4000)
    muted = np.random.default_rng(0).normal(0, 0.1, 12000)
    muted[8000:] = 0
    soundfile.write(icbhi_folder / "106_1b1_Ar_sc_LittC2SE.wav", muted, 4000)
    assert main(["--data-folder", str(icbhi_folder)]) == 1
    out = " ".join(capsys.readouterr().out.split()).split("Problems")[1]
    for part in (
        f"{STEM}.txt, row 1: 3 columns",
        "102_1b1_Tc_mc_AKGC417L.wav has no annotation",
        "103_2b2_Pr_mc_AKGC417L.wav",
        "104_1b1_Ll_sc_Meditron.wav",
        "is 2.000 s long, but its annotation ends at 2.900 s",
        "106_1b1_Ar_sc_LittC2SE.wav: 2 cycles are silent throughout",
    ):
        assert part in out
    assert out.count(" - ") == 6


def test_a_cycle_that_training_would_cut_is_no_problem(icbhi_folder):
    path = icbhi_folder / f"{STEM}.wav"
    for seconds, problems in ((2.86, 0), (2.84, 1)):  # the annotation ends at 2.9 s
        soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, int(4000 * seconds)), 4000)
        assert len(inspect_folder(icbhi_folder)[1]) == problems


def test_many_problems_are_cut_short(icbhi_folder):
    text = describe(read_cycles(icbhi_folder), [f"problem {n}" for n in range(70)])
    assert "- problem 49" in text
    assert "- problem 50" not in text
    assert text.endswith("- and 20 more")


def test_a_split_that_cannot_be_made_is_said(make_icbhi, tmp_path):
    folder = make_icbhi(tmp_path / "data", {STEM: "train"})
    assert "no cycle is in the test part" in report(folder)


def test_patients_in_both_halves_are_a_trap(make_icbhi, tmp_path):
    stems = {STEM: "train", "101_1b1_Ar_sc_Meditron": "test", "102_1b1_Ar_sc_Meditron": "test"}
    found = traps(read_cycles(make_icbhi(tmp_path / "data", stems)))
    assert "Patients 101 are in both halves (4 of 8 test cycles)" in found[0]


def test_nothing_to_inspect(tmp_path, caplog):
    assert main(["--data-folder", str(tmp_path / "none")]) == 2
    assert "does not exist" in caplog.text
    (tmp_path / "empty").mkdir()
    assert main(["--data-folder", str(tmp_path / "empty")]) == 2
    assert "https://" in caplog.text  # where the tables come from


def test_a_manifest_without_halves(tmp_path, capsys):
    rows = ["file,start,end,crackle,wheeze,patient,device"]
    for number in range(10):
        noise = np.random.default_rng(number).normal(0, 0.1, 8000)
        soundfile.write(tmp_path / f"{number}.wav", noise, 4000)
        rows += [f"{number}.wav,{i},{i + 1},{i},{number & 1},{number},Eko" for i in (0, 1)]
    (tmp_path / "cycles.csv").write_text("\n".join([*rows[:-1], rows[-1][:-3]]) + "\n")
    words = [f"dataset.data_folder={tmp_path / 'cycles.csv'}", "dataset.split_strategy=random"]
    assert main(["--corpus", "configs/corpora/manifest.yaml", *words]) == 0
    out = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "all 20 10 10 5 5 5 5" in out
    assert out[out.index("Cycles by device") + 3 :][:2] == ["Eko 19 10 73.7", "unknown 1 1 100.0"]
    assert "Device 1 1" in out and "BMI 20 10" in out
    assert (
        "- The corpus names no halves: dataset.split_strategy random or foldwise draws patients."
        in out
    )
    parts = out[out.index("Parts under the random split") + 3 :][:3]
    assert [line.split()[0] for line in parts] == ["train", "val", "test"]
    assert sum(int(line.split()[1]) for line in parts) == 20


def test_a_wrong_key_of_a_corpus_is_said(tmp_path, caplog):
    file = tmp_path / "corpus.yaml"
    for text in ("dataset:\n  folder: x\n", "dataset:\n  name: sprsound\n", "dataset: [\n"):
        file.write_text(text)
        assert main(["--corpus", str(file)]) == 2
        assert f"the section dataset of {file} cannot be read" in caplog.messages[-1]
        assert "\n" not in caplog.messages[-1]


@pytest.mark.real
def test_several_real_corpora(icbhi_root, capsys, monkeypatch):
    children = icbhi_root.parent / "sprsound"
    if not children.is_dir():
        pytest.skip("the SPRSound sample is not there")
    monkeypatch.setenv("ICBHI", str(icbhi_root / "recordings"))
    monkeypatch.setenv("SPRSOUND", str(children))
    assert main(["--corpus", "configs/corpora/icbhi_and_sprsound.yaml"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "SEVERAL CORPORA: icbhi as official, 470 cycles; PARTIAL DATA: 50 of 920" in out
    assert "Yunting 411 59 22.1 0 0 -" in out
    assert "109 8000 Hz, PCM_16" in out
