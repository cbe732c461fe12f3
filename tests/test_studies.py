"""The studies of experiments/ that rest on trained runs, at toy size."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
import yaml

from data.synthetic.corpus import write_corpus
from experiments import buckets, spectrograms, transfer
from experiments.planted_effect import REMARKS
from tests.utils.evaluation_tables import cycle_table, finish_run, predictions
from tests.utils.tiny import TINY, tiny_config
from utils.common.files import write_json
from utils.evaluation.report import evaluate_predictions
from utils.evaluation.trained_model import TrainedModel
from utils.metrics.bootstrap import Difference


def test_spectrograms_are_tabled(tmp_path, capsys):
    """Means and sd over seeds, the permutation test of one run; remarks are kept."""
    folders, table = [], cycle_table()
    for variant, seed in (("ast_film", 0), ("ast_film", 1), ("ast", 0)):
        where = {"training.output_dir": str(tmp_path), "training.seed": seed}
        folders.append(finish_run(tiny_config(variant, **where), table, seed=seed))
    task = tiny_config().task
    report = evaluate_predictions(
        predictions(task, table), task, (0.5, 0.5), selection="validation", bootstrap=20
    )
    rows = [("real", 0.0), ("shuffled", -2.25), ("all unknown", 1.5)]
    rows += [(f"{name} unknown", 0.25) for name in ("device", "site", "duration")]
    report.metadata_test = [
        {"metadata": name, "score": 61.25, "difference": Difference(value, value - 1, value + 1, 1)}
        for name, value in rows
    ]
    write_json(folders[0].path / "evaluation" / "test" / "report.json", report.to_dict())
    output = tmp_path / "out.md"
    output.write_text(f"old\n{REMARKS}\n\nA remark.\n")
    spectrograms.main([*(str(folder.path) for folder in folders), "--output", str(output)])
    text = output.read_text()
    scores = [f.read_report()["test"]["metrics"]["chosen"]["score"]["value"] for f in folders]
    starts = ("| AST |", "| FiLM-AST | 2")
    ast, film = (line.split(" | ") for line in text.splitlines() if line.startswith(starts))
    assert film[0] == "| FiLM-AST" and film[1] == "2" and ast[1] == "1"
    assert film[4].startswith(f"{np.mean(scores[:2]):.1f} [")
    assert film[6] == f"{np.std(scores[:2], ddof=1):.1f}" and film[7].endswith(" |")
    assert "| FiLM-AST | seed 0 | 61.2 | -2.2 [-3.2, -1.2] | 1.5 [0.5, 2.5] |" in text
    assert "| metadata only, trees | 1 |" in text and "| always normal |" in text
    assert text.endswith("A remark.\n") and "old" not in text


@pytest.fixture
def sprsound(tmp_path):
    """Two recordings of each of eight children, two events each."""
    folder, random = tmp_path / "spr", np.random.default_rng(0)
    folder.mkdir()
    for number in range(16):
        kinds = ("Normal", "Fine Crackle" if number % 2 else "Wheeze")
        events = [{"start": 600 * k, "end": 600 * k + 500, "type": t} for k, t in enumerate(kinds)]
        stem = f"{number // 2}_{number}.0_1_p{number % 4 + 1}_{number}"
        (folder / f"{stem}.json").write_text(json.dumps({"event_annotation": events}))
        soundfile.write(folder / f"{stem}.wav", random.normal(0, 0.1, 10_000), 8000)
    return folder


def test_transfer_both_ways(sprsound, tmp_path, monkeypatch):
    corpus, sizes = tmp_path / "icbhi", {"recordings_per_patient": 1, "cycles_per_recording": 6}
    write_corpus(corpus, patients=8, **sizes, traps=False)
    values = {"dataset": {"n_cls": 2, "split_strategy": "random"}, "models": {"*": {}}}
    values["training"] = {"selection": "fixed"}
    for key, value in {**TINY, "training.epochs": 1}.items():
        section, leaf = key.split(".")
        values.setdefault(section, {})[leaf] = value
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(transfer, "SETTINGS", tmp_path / "tiny.yaml")
    words = ["--icbhi", str(corpus), "--sprsound", str(sprsound), "--seeds", "1"]
    words += ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "out.md")]
    transfer.main(words)
    text = (tmp_path / "out.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row[1:4] for row in rows[:6]] == [
        ["ICBHI, held out", "AST", "none"],
        ["SPRSound, whole", "AST", "none"],
        ["ICBHI, held out", "SoftFiLM-AST", "real"],
        ["ICBHI, held out", "SoftFiLM-AST", "unknown"],
        ["SPRSound, whole", "SoftFiLM-AST", "real"],
        ["SPRSound, whole", "SoftFiLM-AST", "unknown"],
    ]
    assert len(rows) == 12 and "- SPRSound, whole: 32 cycles (16 abnormal) of 8 patients" in text
    path, file = tmp_path / "work" / "icbhi-ast-s0.pt", tmp_path / "work" / "sprsound.yaml"
    frame = TrainedModel.open(path, corpus_file=file).predictions("all")
    correct = frame["true_class"] == frame["pred_class"]
    sp, se = (100 * correct[frame["true_class"] == name].mean() for name in ("normal", "abnormal"))
    assert rows[1][4].startswith(f"{sp:.1f} [") and rows[1][5].startswith(f"{se:.1f} [")
    monkeypatch.setattr(transfer, "build_trainer", None)
    assert transfer.trained(None, path) == path, "what is there is not trained again"


def test_buckets_are_tabled(tmp_path, synthetic_corpus, monkeypatch):
    lengths = {"single length": "null", "buckets": "[0.5,1.0]"}
    monkeypatch.setattr(buckets, "LENGTHS", lengths)
    words = ["audio.clip_seconds=1", "dataset.w=64", "models.ast.input_tdim=64"]
    words += ["backbone.embed_dim=16", "backbone.depth=1", "backbone.num_heads=2"]
    words += ["training.epochs=1", "training.warmup_epochs=0"]
    text = buckets.study("Here", str(synthetic_corpus), tmp_path, 1, words)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == [
        "| single length",
        "| buckets",
        "| buckets minus single length",
    ]
    values = [[float(cell.split()[0]) for cell in row[2:5]] for row in rows[1:]]
    assert values[2] == pytest.approx(np.subtract(values[1], values[0]), abs=0.11)
