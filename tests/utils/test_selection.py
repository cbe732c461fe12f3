"""The test half cannot reach the training: all its labels are permuted, and the scripts' own path
from the annotation files to weights and thresholds gives the same, bit for bit."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.utils.tiny import LIVELY, differing, tiny_config
from utils.config.schema import RunConfig
from utils.runs.run import Run
from utils.training.checkpoint import load_checkpoint
from utils.training.device import Runtime

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def permuted_corpus(synthetic_corpus, tmp_path_factory) -> Path:
    """The synthetic corpus with the labels of all test cycles permuted among them."""
    folder = tmp_path_factory.mktemp("permuted") / "corpus"
    shutil.copytree(synthetic_corpus, folder, copy_function=shutil.copy2)
    for derived in ("icbhi_metadata.csv", "synthetic_cycles.csv"):
        (folder / derived).unlink(missing_ok=True)
    lines = (folder / "ICBHI_challenge_train_test.txt").read_text().split("\n")
    stems = [line.split()[0] for line in lines if line.strip().endswith("test")]
    rows = [
        (stem, line.split("\t"))
        for stem in stems
        for line in (folder / f"{stem}.txt").read_text().splitlines()
        if line.strip()
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    content: dict[str, list[str]] = {}
    for (stem, (start, end, *_)), source in zip(rows, order, strict=True):
        label = rows[source][1][2:]
        content.setdefault(stem, []).append("\t".join([start, end, *label]))
    for stem, new in content.items():
        (folder / f"{stem}.txt").write_text("\n".join(new) + "\n")
    return folder


def train(config: RunConfig) -> dict:
    """The five scripts' own steps; what the run left behind."""
    run = Run(config, Runtime("cpu", "fp32", "false"))
    with run:
        data = run.data()
        run.test(run.fit(run.model(data), data))
    with run.folder.metrics.open() as file:
        history = [
            {k: v for k, v in r.items() if k != "train_clips_per_s"} for r in csv.DictReader(file)
        ]
    predictions = {p.stem: p.read_text() for p in run.folder.predictions.glob("*.csv")}
    rows = list(csv.DictReader(predictions["test"].splitlines()))
    return {
        "checkpoint": load_checkpoint(run.folder.best),
        "history": history,
        "predictions": predictions,
        "true": [row["true_class"] for row in rows],
        "logits": [row["logit_crackle"] for row in rows],
    }


@pytest.fixture(scope="module")
def both(synthetic_corpus, permuted_corpus, tmp_path_factory):
    """selection -> results on the corpus as it is, and on the permuted one."""

    caches = [tmp_path_factory.mktemp("cache") for _ in range(2)]

    def run(selection: str) -> list[dict]:
        results = []
        for folder, cache in zip((synthetic_corpus, permuted_corpus), caches, strict=True):
            place = tmp_path_factory.mktemp(selection)
            keys = {
                "dataset.data_folder": str(folder),
                "dataset.cache_dir": str(cache),
                "dataset.store_workers": 1,
                "training.output_dir": str(place / "runs"),
                "training.checkpoint_dir": str(place / "checkpoints"),
                "training.selection": selection,
            }
            results.append(train(tiny_config("ast_film", **LIVELY, **keys)))
        return results

    return run


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("utils.runs.end.draw_figures", lambda *_: None)


def test_permuted_test_labels_change_test_metrics_only(both):
    plain, permuted = both("validation")
    a, b = plain["checkpoint"], permuted["checkpoint"]
    assert not differing(a.weights, b.weights)
    assert (a.thresholds, a.epoch, a.pos_weight) == (b.thresholds, b.epoch, b.pos_weight)
    assert str(a.score) == str(b.score)
    assert a.statistics == b.statistics
    assert plain["history"] == permuted["history"]
    assert plain["predictions"]["val"] == permuted["predictions"]["val"]
    assert plain["logits"] == permuted["logits"]
    assert plain["true"] != permuted["true"]
    assert sorted(plain["true"]) == sorted(permuted["true"])


def test_selection_on_test_does_depend_on_them(both):
    """The control: were the permutation not seen, the test above would say nothing."""
    plain, permuted = both("test")
    assert plain["history"] != permuted["history"]
    assert plain["checkpoint"].thresholds != permuted["checkpoint"].thresholds
