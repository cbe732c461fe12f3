"""The run folder: its name, its files, what a fresh start removes and what it never touches."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from tests.utils.tiny import tiny_config
from utils.common.errors import UserError
from utils.config.schema import load_config
from utils.training.runfolder import RunFolder, run_name


def folder_of(tmp_path, **overrides) -> tuple[RunFolder, object]:
    config = tiny_config(**{"training.output_dir": str(tmp_path / "runs"), **overrides})
    return RunFolder.of(config), config


def test_name_says_variant_task_selection_and_seed():
    name = run_name(tiny_config("ast_film", **{"training.seed": 7, "dataset.n_cls": 2}))
    assert name.startswith("ast_film-2cls-validation-s7-")
    assert len(name.rpartition("-")[2]) == 8


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("training.lr", 5e-4, False),
        ("models.*.dropout", 0.1, False),
        ("audio.pad_type", "zero", False),
        ("dataset.val_seed", 3, False),
        ("dataset.cache_dir", "elsewhere", True),
        ("training.checkpoint_minutes", 3.0, True),
        ("training.resume", "never", True),
        ("mlflow.tracking_uri", "http://host:1", True),
    ],
)
def test_only_what_can_change_the_result_makes_another_folder(key, value, same):
    assert (run_name(tiny_config()) == run_name(tiny_config(**{key: value}))) is same


def test_prepare_writes_the_resolved_configuration(tmp_path):
    folder, config = folder_of(tmp_path)
    folder.prepare(config, fresh=False)
    assert load_config([folder.config]) == config
    assert not folder.finished


def test_resuming_keeps_the_files_and_removes_what_a_kill_left(tmp_path):
    folder, config = folder_of(tmp_path)
    folder.prepare(config, fresh=False)
    folder.checkpoints.mkdir()
    folder.last.write_text("state")
    leftover = folder.checkpoints / ".last.pt.4711.tmp"
    leftover.write_text("half")
    folder.prepare(config, fresh=False)
    assert folder.last.read_text() == "state"
    assert not leftover.exists()


def test_a_fresh_start_removes_the_earlier_attempt(tmp_path):
    folder, config = folder_of(tmp_path)
    folder.prepare(config, fresh=False)
    folder.checkpoints.mkdir()
    folder.last.write_text("state")
    folder.prepare(config, fresh=True)
    assert {p.name for p in folder.path.iterdir()} == {"config.yaml", "record.json"}


def test_a_fresh_start_never_removes_something_else(tmp_path):
    folder, config = folder_of(tmp_path)
    folder.path.mkdir(parents=True)
    (folder.path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not a run folder; move it away"):
        folder.prepare(config, fresh=True)
    assert (folder.path / "thesis.tex").exists()
    (folder.path / "thesis.tex").unlink()
    folder.path.rmdir()
    folder.path.write_text("a file")
    with pytest.raises(UserError, match="is not a run folder; move it away"):
        folder.prepare(config, fresh=True)


def test_finished_means_report_and_weights(tmp_path):
    folder, config = folder_of(tmp_path)
    folder.prepare(config, fresh=False)
    folder.write_report({"score": 1.0})
    assert not folder.finished
    folder.checkpoints.mkdir()
    folder.best.write_text("weights")
    assert folder.finished


def test_report_is_plain_json(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_report(
        {
            "a": np.float32(0.5),
            "b": np.arange(3),
            "c": float("nan"),
            "d": (np.int64(4), {"x": float("inf")}),
            5: "é",
        }
    )
    text = folder.report.read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "é" in text
    assert json.loads(text) == {
        "a": 0.5,
        "b": [0, 1, 2],
        "c": None,
        "d": [4, {"x": None}],
        "5": "é",
    }
    assert folder.read_report() == json.loads(text)


def test_metrics_have_a_row_per_epoch_and_empty_cells_for_what_is_not(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_metrics([{"epoch": 0, "loss": 1.5}, {"epoch": 1, "loss": float("nan"), "se": 3.0}])
    with folder.metrics.open() as file:
        assert list(csv.DictReader(file)) == [
            {"epoch": "0", "loss": "1.5", "se": ""},
            {"epoch": "1", "loss": "", "se": "3.0"},
        ]
