"""evaluate.py --corpus: a checkpoint judged on a corpus that it was not trained on."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

import evaluate
from data.corpora.manifest import write_icbhi_manifest
from tests.test_evaluate import report_of, start, train
from utils.training.runfolder import RunFolder

SHARED = Path(__file__).parents[2] / "shared" / "sprsound"
ONE_EPOCH = {"training.epochs": 1}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("other")


@pytest.fixture(scope="module")
def run(synthetic_corpus, work) -> RunFolder:
    """A SoftFiLM trained on a corpus in ICBHI's format."""
    corpus = Path(shutil.copytree(synthetic_corpus, work / "corpus"))
    return train("ast_softfilm", corpus, work, **ONE_EPOCH)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("utils.figures.runs.evaluation_figures", lambda *_: [])


def corpus_file(folder: Path, name: str, data: Path, *more: str) -> Path:
    lines = [f"name: {name}", f"data_folder: {data}", f"cache_dir: {folder / 'cache'}"]
    path = folder / "clinic.yaml"
    path.write_text("\n  ".join(["dataset:", *lines, "store_workers: 1", *more]) + "\n")
    return path


def manifest(folder: Path, **columns) -> Path:
    """Six recordings of a second by six patients, two cycles each, and their manifest."""
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(0).normal(0, 0.1, (6, 8000))
    for number, sound in enumerate(noise):
        soundfile.write(folder / f"{number}.wav", sound, 8000)
    n = np.arange(12)
    table = pd.DataFrame({"file": [f"{k}.wav" for k in n // 2], "patient": n // 2 + 1})
    table = table.assign(start=n % 2 * 0.5, end=n % 2 * 0.5 + 0.4, crackle=n % 3 == 1, wheeze=0)
    table.astype({"crackle": int}).assign(**columns).to_csv(folder / "cycles.csv", index=False)
    return folder / "cycles.csv"


def spectrograms(folder: Path, bands: int) -> Path:
    """40 cycles of ten patients, the last four in the test part."""
    folder.mkdir(exist_ok=True)
    n, values = np.arange(40), np.random.default_rng(bands).normal(3, 2, (40, bands, 48))
    np.save(folder / "spectrograms.npy", values.astype(np.float32))
    part = np.where(n < 24, "train", "test")
    table = {"row": n, "crackle": n & 1, "wheeze": n >> 1 & 1, "patient": n // 4, "split": part}
    table |= {"device": np.where(n < 30, "A", "B"), "site": "S", "age": n // 4}
    pd.DataFrame(table).to_csv(folder / "manifest.csv", index=False)
    return folder


def judge(monkeypatch, run: RunFolder, file: Path, *words) -> int:
    return start(monkeypatch, "--checkpoint", run.best, "--corpus", file, *words)


def test_the_same_cycles_get_the_same_predictions(run, work, monkeypatch, capsys):
    """By a manifest, with other audio and class settings in the file: the model's own hold."""
    yaml = write_icbhi_manifest(work / "corpus", work / "again.csv")
    text = (
        yaml.read_text()
        + f"  cache_dir: {work / 'cache'}\n  store_workers: 1\n  n_cls: 2\n  h: 64\n"
    )
    yaml.write_text(text + "audio:\n  clip_seconds: 0.1\n  high_freq: 2000\n")
    assert judge(monkeypatch, run, yaml, "--no-metadata-test") == 0
    folder = run.path / "evaluation" / "test-again"
    report, own = report_of(folder), run.read_report()["test"]
    frames = [pd.read_csv(f) for f in (folder / "predictions.csv", run.predictions / "test.csv")]
    pd.testing.assert_frame_equal(*frames)
    assert report["metrics"] == own["metrics"] and report["subgroups"] == own["subgroups"]
    assert "floors" not in report, "nothing of the corpus may be trained on"
    names = report["partial_message"]
    assert "OTHER CORPUS" in names and "recordings have names of the run's own" in names
    assert "judged on manifest" in " ".join(capsys.readouterr().out[:500].split())


def test_unknown_values_are_said_first(run, tmp_path, monkeypatch, capsys):
    n = np.arange(12) // 2
    data = manifest(tmp_path / "own", device="Own", site=np.where(n < 3, "Tc", "Toe"), age=n * 9)
    assert judge(monkeypatch, run, corpus_file(tmp_path, "manifest", data)) == 0
    report = report_of(run.path / "evaluation" / "all-clinic")
    assert report["counts"]["cycles"] == 12 and report["counts"]["patients"] == 6
    assert report["part"] == "all", "there is no test part"
    note = report["notes"][0]
    assert "device Own (12 cycles)" in note and "site Toe (6 cycles)" in note
    assert "BMIDerived (12 cycles" in note and "Tc" not in note and "Age" not in note
    text = (run.path / "evaluation" / "all-clinic" / "report.md").read_text().splitlines()
    assert any("device Own" in line for line in text[:9])
    assert "device Own (12 cycles)" in " ".join(capsys.readouterr().err.split())
    assert [row["metadata"] for row in report["metadata_test"]][:3] == [
        "real", "shuffled", "all unknown"
    ]  # fmt: skip
    groups = pd.DataFrame(report["subgroups"]).query("group == 'site'")
    assert dict(zip(groups["value"], groups["cycles"], strict=True)) == {"Tc": 6, "Toe": 6}


def test_no_permutation_where_it_changes_nothing(run, tmp_path, monkeypatch):
    file = corpus_file(tmp_path, "manifest", manifest(tmp_path / "bare"))
    assert judge(monkeypatch, run, file, "--output", tmp_path / "o") == 0
    report = report_of(tmp_path / "o")
    assert "metadata_test" not in report
    assert "NO PERMUTATION TEST" in report["notes"][-1]


def test_parts_of_a_corpus(run, tmp_path, monkeypatch, capsys):
    split = np.where(np.arange(12) < 4, "test", "train")
    file = corpus_file(tmp_path, "manifest", manifest(tmp_path / "halves", split=split))
    for words, cycles in (((), 4), (("--split", "all"), 12)):
        assert judge(monkeypatch, run, file, "--output", tmp_path / "o", *words) == 0
        assert report_of(tmp_path / "o")["counts"]["cycles"] == cycles
    assert ": all parts of " in (tmp_path / "o" / "report.md").read_text(encoding="utf-8")
    manifest(tmp_path / "halves")
    assert judge(monkeypatch, run, file, "--split", "test") == 2
    assert "no test part" in " ".join(capsys.readouterr().err.split())
    for words in (("--split", "val"), ("--data-folder", "x")):
        with pytest.raises(SystemExit):
            evaluate.parse(["--checkpoint", "m.pt", "--corpus", "c.yaml", *words])
    with pytest.raises(SystemExit):
        evaluate.parse(["--compare", "a", "b", "--corpus", "c.yaml"])


def test_spectrograms_and_audio_do_not_mix(run, tmp_path, monkeypatch, capsys):
    own = spectrograms(tmp_path / "a", 32)
    mine = train("ast_film", own, tmp_path, **ONE_EPOCH, **{"dataset.name": "spectrograms"})
    other = spectrograms(tmp_path / "b", 32)
    words = ("--output", tmp_path / "o")
    assert judge(monkeypatch, mine, corpus_file(tmp_path, "spectrograms", other), *words) == 0
    report = report_of(tmp_path / "o")
    assert report["counts"]["cycles"] == 16, "its test part"
    assert "device B (10 cycles)" in report["notes"][0]
    capsys.readouterr()
    wide = corpus_file(tmp_path, "spectrograms", spectrograms(tmp_path / "c", 40))
    assert judge(monkeypatch, mine, wide) == 2
    assert "32 x 48" in (error := " ".join(capsys.readouterr().err.split())) and "40 x 48" in error
    assert judge(monkeypatch, run, wide) == 2
    assert "takes audio" in " ".join(capsys.readouterr().err.split())
    audio = corpus_file(tmp_path, "manifest", manifest(tmp_path / "own"))
    assert judge(monkeypatch, mine, audio) == 2
    assert "takes ready-made spectrograms" in " ".join(capsys.readouterr().err.split())


@pytest.mark.real
@pytest.mark.skipif(not SHARED.is_dir(), reason="the SPRSound sample is not there")
def test_real_children_of_another_hospital(run, tmp_path, monkeypatch):
    file = corpus_file(tmp_path, "sprsound", SHARED)
    assert judge(monkeypatch, run, file, "--output", tmp_path / "o") == 0
    report = report_of(tmp_path / "o")
    assert report["counts"]["cycles"] == 411 and report["counts"]["recordings"] == 109
    assert "device Yunting (411 cycles)" in report["notes"][0]
    assert "PARTIAL DATA: 411 of 9,089" in report["partial_message"]
    assert len(report["metadata_test"]) == 8
