"""evaluate.py as a user starts it: reports from a checkpoint alone, and paired comparisons."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest

import evaluate
from data.frontend import AudioFrontend
from data.synthetic.corpus import MARKER, write_corpus
from data.task import FIELDS, Task
from tests.utils.tiny import tiny_config
from utils.common.files import plain
from utils.evaluation import compare as comparison
from utils.evaluation.model_report import report_on, stored
from utils.evaluation.report import compare_predictions, read_report
from utils.evaluation.trained_model import TrainedModel
from utils.figures.runs import model_notice, read_evaluation
from utils.metrics.predictions import read_predictions
from utils.metrics.protocol import LEAKY_MARK, LEAKY_NOTE
from utils.runs import judge
from utils.runs.run import Run
from utils.tracking import read_record
from utils.training.checkpoint import load_checkpoint, save_checkpoint
from utils.training.device import Runtime
from utils.training.runfolder import RunFolder

SAME = (
    "task", "protocol", "partial", "partial_message", "synthetic", "counts", "thresholds",
    "metrics", "confusion", "operating_curve", "calibration", "subgroups", "patients",
    "patient_tables", "floors",
)  # fmt: skip


def train(variant: str, corpus: Path, work: Path, **overrides) -> RunFolder:
    """A finished tiny run."""
    config = tiny_config(
        variant,
        **{
            "dataset.data_folder": str(corpus),
            "dataset.cache_dir": str(corpus.parent / "cache"),
            "dataset.store_workers": 1,
            "training.output_dir": str(work / "runs"),
            "training.checkpoint_dir": str(work / "checkpoints"),
            "training.lr": 1e-2,
            "training.min_sensitivity": 0.5,  # so that something is called abnormal
            **overrides,
        },
    )
    with mock.patch("utils.runs.end.draw_figures"), Run(config, Runtime("cpu")) as run:
        data = run.data()
        run.test(run.fit(run.model(data), data))
    return RunFolder.of(config)


@pytest.fixture(scope="module")
def corpus(synthetic_corpus, tmp_path_factory) -> Path:
    """A copy, next to which the waveform store may lie."""
    return Path(shutil.copytree(synthetic_corpus, tmp_path_factory.mktemp("evaluate") / "corpus"))


@pytest.fixture(scope="module")
def work(corpus, tmp_path_factory) -> Path:
    """runs/ and checkpoints/ of a SoftFiLM and a plain AST."""
    work = tmp_path_factory.mktemp("work")
    for variant in ("ast_softfilm", "ast"):
        train(variant, corpus, work)
    return work


def best(work: Path, variant: str) -> Path:
    (folder,) = work.glob(f"runs/{variant}-*")
    return folder / "checkpoints" / "best.pt"


def start(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    return evaluate.main()


@pytest.fixture
def no_pictures(monkeypatch):
    """For tests that look at something else."""
    monkeypatch.setattr("utils.figures.runs.evaluation_figures", lambda *_: [])


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


# -------------------------------------------------------------------- one model


@pytest.mark.parametrize("variant", ["ast_softfilm", "ast"])
def test_the_figures_of_the_test_part_are_the_runs_own(variant, work, monkeypatch, capsys):
    checkpoint = best(work, variant)
    run = checkpoint.parent.parent
    assert start(monkeypatch, "--checkpoint", checkpoint) == 0
    folder = run / "evaluation" / "test"
    own, again = report_of(run)["test"], report_of(folder)
    for key in SAME:
        assert again[key] == own[key], key
    assert (folder / "predictions.csv").read_bytes() == (run / "predictions/test.csv").read_bytes()
    assert {p.name for p in (folder / "figures").iterdir()} == {
        "confusion.png", "operating_curve.png", "reliability.png", "subgroups.png"
    }  # fmt: skip
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert (
        "PARTIAL DATA" in text
        and "Metadata-only baselines" in text
        and "SYNTHETIC RECORDINGS" in text
    )
    assert (
        ("Metadata permutation test" in text)
        == (variant == "ast_softfilm")
        == ("metadata_test" in again)
    )
    printed = capsys.readouterr()
    score = own["metrics"]["chosen"]["score"]["value"]
    assert f"{score:.2f}" in printed.out and "PARTIAL DATA" in printed.err
    lines = [line for line in printed.out.splitlines() if str(run) not in line]
    assert max(map(len, lines)) <= 100


def test_the_metadata_test_reads_each_sound_once(work, monkeypatch):
    model = TrainedModel.open(best(work, "ast_softfilm"))
    heard = []
    forward = AudioFrontend.forward

    def counted(self, waveform, length, seed):
        heard.append(len(waveform))
        return forward(self, waveform, length, seed)

    monkeypatch.setattr(AudioFrontend, "forward", counted)
    rows = model.rows("test")
    table = report_on(model, "test")[0].metadata_test
    assert sum(heard) == 2 * len(rows) + len(model.rows("val")), "predictions and one pass for all"
    assert [row["metadata"] for row in table] == [
        "real", "shuffled", "all unknown", *(f"{f} unknown" for f in FIELDS)
    ]  # fmt: skip
    own = report_of(model.run_folder.path)["test"]["metrics"]["chosen"]
    for key in ("sp", "se", "score", "collapsed_score"):
        assert table[0][key] == own[key]["value"]


def test_the_run_is_found_from_a_copy_only_if_it_is_its(work, no_pictures, monkeypatch, tmp_path):
    copy = work / "checkpoints" / "softfilm_best.pt"
    assert copy.with_suffix(".md").read_text().startswith("# Model card: SoftFiLM-AST")
    run = best(work, "ast_softfilm").parent.parent
    options = evaluate.parse(["--checkpoint", str(copy)])
    model = judge.open_model(options.checkpoint, options)
    assert judge.output_folder(model, "test").resolve() == run.resolve() / "evaluation" / "test"
    alone = Path(shutil.copy(copy, tmp_path / "mailed.pt"))
    model = TrainedModel.open(alone)
    model.config.training.output_dir = str(tmp_path / "nowhere")
    assert judge.output_folder(model, "val") == tmp_path / "mailed_evaluation" / "val"
    assert start(monkeypatch, "--checkpoint", alone, "--no-metadata-test", "--output",
                 tmp_path / "o", "--batch-size", 3) == 0  # fmt: skip
    report = report_of(tmp_path / "o")
    assert "metadata_test" not in report
    own = report_of(run)["test"]["metrics"]["chosen"]["auroc_crackle"]["value"]
    assert report["metrics"]["chosen"]["auroc_crackle"]["value"] == pytest.approx(own, abs=1e-3)


def test_a_foreign_checkpoint_writes_nowhere_else(work, no_pictures, monkeypatch, tmp_path):
    """Its configuration and run name come from whoever made it."""
    mail, victim = tmp_path / "mail", tmp_path / "victim"
    here = tmp_path / "here"
    for folder in (mail, victim / "a-run", here):
        folder.mkdir(parents=True)
    (victim / "a-run" / "config.yaml").write_text("{}\n")
    (victim / "a-run" / "checkpoints").mkdir()
    (victim / "a-run" / "checkpoints" / "best.pt").write_bytes(b"another model")
    checkpoint = load_checkpoint(best(work, "ast"))
    checkpoint.config["dataset"] |= {
        "cycle_metadata_path": str(victim / "icbhi_metadata.csv"),
        "cache_dir": str(victim / "cache"),
    }
    checkpoint.config["training"]["output_dir"] = str(victim)
    checkpoint.run = "a-run"
    before = sorted(victim.rglob("*"))
    monkeypatch.chdir(here)
    for name in ("first", "second"):
        save_checkpoint(mail / f"{name}.pt", checkpoint)
        checkpoint.run = "another-run"
    assert start(monkeypatch, "--checkpoint", mail / "first.pt", "--no-metadata-test") == 0
    assert start(monkeypatch, "--compare", mail / "first.pt", mail / "second.pt") == 0
    assert sorted(victim.rglob("*")) == before
    assert (mail / "first_evaluation" / "test" / "report.json").is_file()
    (compared,) = mail.glob("comparison-*")
    assert (compared / "comparison.md").is_file()
    assert [p.name for p in here.iterdir()] == ["cache"], "the default of dataset.cache_dir"


def test_other_parts_say_what_they_are(work, no_pictures, monkeypatch, capsys):
    checkpoint = best(work, "ast")
    run = checkpoint.parent.parent
    for split, mark in (("train", "SEEN IN TRAINING"), ("val", "SELECTED HERE"), ("all", "SEEN")):
        assert start(monkeypatch, "--checkpoint", checkpoint, "--split", split) == 0
        assert mark in capsys.readouterr().err
        folder = run / "evaluation" / split
        assert mark in (folder / "report.md").read_text(encoding="utf-8")
        report = report_of(folder)
        assert report["part"] == split and "floors" not in report
    counts = report_of(run)["counts"]
    everything = sum(counts[part]["cycles"] for part in ("train", "val", "test"))
    assert report["counts"]["cycles"] == everything
    val = report_of(run / "evaluation" / "val")
    assert val["metrics"] == report_of(run)["val"]["metrics"]


def test_other_data_are_named_and_kept_apart(work, no_pictures, monkeypatch, capsys, tmp_path):
    write_corpus(tmp_path / "clinic", patients=9, seed=5)
    checkpoint = best(work, "ast_softfilm")
    model = TrainedModel.open(checkpoint, data_folder=str(tmp_path / "clinic"))
    assert model.data.statistics.to_dict() == model.checkpoint.statistics, "nothing is fitted again"
    words = ("--checkpoint", checkpoint, "--data-folder", tmp_path / "clinic")
    assert start(monkeypatch, *words, "--no-metadata-test") == 0
    assert "OTHER DATA" in capsys.readouterr().err
    folder = checkpoint.parent.parent / "evaluation" / "test-clinic"
    report = report_of(folder)
    assert "OTHER DATA" in report["partial_message"] and report["partial"]
    assert "OTHER DATA" in (folder / "report.md").read_text(encoding="utf-8")
    assert report["counts"]["cycles"] == len(model.rows("test"))
    # the same cycles in another folder are the same data
    moved = Path(shutil.copytree(model.checkpoint.run_config().dataset.data_folder, tmp_path / "m"))
    assert TrainedModel.open(checkpoint, data_folder=str(moved)).other_data() == ""


def test_synthetic_is_marked_without_the_corpus(work, corpus, tmp_path):
    other = Path(shutil.copytree(corpus, tmp_path / "copy"))
    (other / MARKER).unlink()
    away = (corpus / MARKER).rename(tmp_path / MARKER)
    try:
        assert TrainedModel.open(best(work, "ast"), data_folder=str(other)).synthetic
    finally:
        away.rename(corpus / MARKER)


def test_what_is_not_there_is_named(work, corpus, monkeypatch, capsys, tmp_path):
    assert start(monkeypatch, "--checkpoint", tmp_path / "no.pt") == 2
    assert "no.pt" in capsys.readouterr().err
    words = ("--checkpoint", best(work, "ast"), "--data-folder", tmp_path / "gone")
    assert start(monkeypatch, *words) == 2
    assert "gone" in capsys.readouterr().err
    rule = {"training.selection": "fixed", "training.min_sensitivity": 0.0, "training.epochs": 1}
    fixed = train("ast", corpus, tmp_path, **rule)
    assert start(monkeypatch, "--checkpoint", fixed.best, "--split", "val") == 2
    assert "no val part" in " ".join(capsys.readouterr().err.split())
    for words in ((), ("--compare", "a.pt"), ("--compare", "a", "b", "--split", "val")):
        with pytest.raises(SystemExit):
            start(monkeypatch, *words)


def test_an_evaluation_is_added_to_the_tracked_run(corpus, monkeypatch, tmp_path):
    run = train("ast_grf", corpus, tmp_path, **{"training.epochs": 1})
    before = read_record(run.path)
    assert start(monkeypatch, "--checkpoint", run.best, "--no-metadata-test") == 0
    record = read_record(run.path)
    assert (record["status"], record["end"]) == ("FINISHED", before["end"])
    score = read_report(run.report).test.metrics["chosen"]["score"].value
    assert record["values"]["evaluation_test/score"] == score
    assert record["files"]["evaluation/test/report.json"] == "evaluation/test"
    assert record["files"]["evaluation/test/figures/confusion.png"] == "evaluation/test/figures"
    words = ("--checkpoint", run.best, "--no-metadata-test", "--output", tmp_path / "elsewhere")
    assert start(monkeypatch, *words) == 0
    assert read_record(run.path) == record


# -------------------------------------------------------------------- several models


def test_comparing_stored_or_computed_is_the_same(work, monkeypatch, capsys, tmp_path):
    first, second = best(work, "ast"), best(work, "ast_softfilm")
    frames = [read_predictions(p.parent.parent / "predictions/test.csv", Task(4))
              for p in (first, second)]  # fmt: skip
    named = {"AST": frames[0], "SoftFiLM-AST": frames[1]}
    expected = [vars(pair) for pair in compare_predictions(named, Task(4), bootstrap=10_000)]
    assert start(monkeypatch, "--compare", first, second, "--output", tmp_path / "o") == 0
    result = json.loads((tmp_path / "o" / "comparison.json").read_text())
    assert result["pairs"] == plain(expected)
    row = next(r for r in expected if r["figure"] == "score")
    interval = f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
    text = (tmp_path / "o" / "comparison.md").read_text(encoding="utf-8")
    assert f"| {interval} | {row['p']:.4f} |" in text and "PARTIAL DATA" in text
    captions = [line for line in text.splitlines() if line.endswith(")**")]
    assert len(captions) == 2 and all("SYNTHETIC RECORDINGS" in line for line in captions)
    floors = report_of(first.parent.parent)["test"]["floors"]
    assert result["floors"]["class prior"]["metrics"] == floors["class prior"]["metrics"]
    assert "| baseline: metadata only, trees |" in text
    printed = capsys.readouterr()
    assert f"{interval}  {row['p']:.4f}" in printed.out and "PARTIAL DATA" in printed.err
    lines = [line for line in printed.out.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 100

    strangers = []
    for path, name in ((first, "a.pt"), (second, "b.pt")):
        strangers.append(TrainedModel.open(shutil.copy(path, tmp_path / name)))
        strangers[-1].config.training.output_dir = str(tmp_path / "nowhere")
        assert stored(strangers[-1]) is None
    again = plain(comparison.compare(strangers).to_dict())
    assert again["pairs"] == plain(expected)
    assert again["floors"] == result["floors"]


def test_predictions_of_another_training_are_not_taken(work):
    model = TrainedModel.open(best(work, "ast"))
    assert stored(model) is not None
    model.checkpoint.epoch += 1
    assert stored(model) is None


def test_what_can_not_be_compared_is_refused(work, corpus, monkeypatch, capsys, tmp_path):
    ast = best(work, "ast")
    short = {"training.epochs": 1}
    two = train("ast_grf", corpus, tmp_path, **short, **{"dataset.n_cls": 2})
    assert start(monkeypatch, "--compare", ast, two.best) == 2
    assert "4 classes" in capsys.readouterr().err
    other = train("ast_grf", corpus, tmp_path, **short, **{"dataset.split_strategy": "random"})
    assert start(monkeypatch, "--compare", ast, other.best) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "equal test parts" in error and "GRF-AST on" in error
    assert start(monkeypatch, "--compare", ast, ast) == 2
    assert "given twice" in capsys.readouterr().err


def test_which_selection_rules_are_compared(work, corpus, monkeypatch, capsys, tmp_path):
    ast, short = best(work, "ast"), {"training.epochs": 1}
    biased = train("ast", corpus, tmp_path, **short, **{"training.selection": "test"})
    for pair in ((ast, biased.best), (biased.best, ast)):
        assert start(monkeypatch, "--compare", *pair) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert "never put into one table" in error and f"{biased.best} was selected on" in error
    rule = {"training.selection": "fixed", "training.min_sensitivity": 0.0}
    fixed = train("ast", corpus, tmp_path, **short, **rule)
    assert start(monkeypatch, "--compare", ast, fixed.best, "--output", tmp_path / "o") == 0
    assert "DIFFERENT SELECTION RULES" in capsys.readouterr().err
    text = (tmp_path / "o" / "comparison.md").read_text()
    assert "DIFFERENT SELECTION RULES" in text and "nothing selected" in text
    assert fixed.path.name in text, "two ASTs go by the names of their runs"


def test_a_leaky_split_is_marked_and_kept_apart(
    work, corpus, no_pictures, monkeypatch, capsys, tmp_path, caplog
):
    short = {"training.epochs": 1, "training.selection": "fixed", "training.min_sensitivity": 0.0}
    leaky, rival = (
        train(name, corpus, tmp_path, **short, **{"dataset.split_strategy": "recordings"})
        for name in ("ast", "ast_grf")
    )
    for text in (caplog.text, capsys.readouterr().out):
        assert LEAKY_NOTE in text  # in the banners of the run's start and end
    for page in (leaky.path / "report.md", leaky.path / "model_card.md"):
        text = page.read_text(encoding="utf-8")
        captions = [line for line in text.splitlines() if line.endswith(")**")]
        assert captions and all(LEAKY_MARK in line for line in captions)
        assert LEAKY_NOTE in text
    record = read_record(leaky.path)
    assert record["tags"]["leaky_split"] == "true"
    assert "test_leaky_split/score" in record["values"] and "test/score" not in record["values"]
    (official,) = work.glob("runs/ast-*")
    assert read_record(official)["tags"]["leaky_split"] == "false"

    assert start(monkeypatch, "--checkpoint", leaky.best) == 0
    printed = capsys.readouterr()
    assert LEAKY_MARK in printed.out and LEAKY_NOTE in printed.err
    assert read_evaluation(leaky.path / "evaluation" / "test").notice().leaky
    assert model_notice(TrainedModel.open(leaky.best)).leaky
    for pair in ((leaky.best, best(work, "ast")), (best(work, "ast"), leaky.best)):
        assert start(monkeypatch, "--compare", *pair) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert f"{leaky.best} was tested on patients of its training part" in error
    out = ("--output", tmp_path / "o")
    assert start(monkeypatch, "--compare", leaky.best, rival.best, *out) == 0
    text = (tmp_path / "o" / "comparison.md").read_text(encoding="utf-8")
    assert LEAKY_NOTE in text and LEAKY_NOTE in capsys.readouterr().err
    assert all(LEAKY_MARK in line for line in text.splitlines() if line.endswith(")**"))


# -------------------------------------------------------------------- real recordings
