"""Interrupted and resumed equals uninterrupted, bit for bit, wherever the interruption falls."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch

from tests.utils.resuming import assert_same, at_step, outcome, sigterm
from tests.utils.tiny import (
    LIVELY,
    cycle_table,
    differing,
    tiny_config,
    tiny_data,
    tiny_trainer,
    weights,
)
from utils.common.cli import sigterm_exits
from utils.common.errors import Preempted, UserError
from utils.training.checkpoint import load_state
from utils.training.runfolder import RunFolder

#: Dropout (the default .4), augmentation, annealed masks, metadata dropout, accumulation, early
#: stopping: everything that has a state.
STATEFUL = LIVELY | {
    "models.*.mask_annealing": True,
    "models.*.mask_annealing_epochs": 9,
    "models.*.metadata_dropout": 0.2,
    "training.accumulation_steps": 2,
    "training.early_stopping_patience": 7,
    "training.epochs": 8,
}
STEPS = 3  # per epoch


class Crash(Exception):
    """Stands for a kill: nothing is saved on the way out."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    config = tiny_config(**STATEFUL)
    trainer = tiny_trainer(config, tmp_path_factory.mktemp("whole"))
    assert trainer.steps_per_epoch == STEPS
    progress = trainer.fit()
    result = outcome(trainer)
    temperatures = {row["model_masks/temperature"] for row in progress.history}
    assert len(temperatures) > 1, "the annealing never began: the test would not see it"
    assert progress.stale > 0
    return result


# Step 2 is the last of its epoch: its flag is read at the boundary.
@pytest.mark.parametrize("number", [1, 2, 16])
def test_sigterm_in_an_epoch(number, uninterrupted, tmp_path):
    config = tiny_config(**STATEFUL)
    first = tiny_trainer(config, tmp_path)
    at_step(first, number, sigterm)
    with pytest.raises(Preempted):
        first.fit()
    done = first.progress.epoch * STEPS + first.progress.step
    assert number + 1 <= done <= number + 2
    torch.manual_seed(99)  # a new process has other generators
    np.random.seed(99)  # noqa: NPY002
    second = tiny_trainer(config, tmp_path)
    second.fit()
    assert_same(outcome(second), uninterrupted)


@pytest.mark.parametrize("moment", ["evaluation", "tracking"])
def test_sigterm_between_two_epochs(moment, uninterrupted, tmp_path):
    config = tiny_config(**STATEFUL)
    first = tiny_trainer(config, tmp_path)
    name = {"evaluation": "close_epoch", "tracking": "_report"}[moment]
    method, calls = getattr(first, name), []

    def watched(*arguments):
        calls.append(name)
        if len(calls) == 2:
            sigterm()
        return method(*arguments)

    setattr(first, name, watched)
    with pytest.raises(Preempted):
        first.fit()
    assert (first.progress.epoch, first.progress.step) == (2, 0)
    second = tiny_trainer(config, tmp_path)
    second.fit()
    assert_same(outcome(second), uninterrupted)


def test_crashes_lose_only_what_came_after_the_checkpoint(uninterrupted, tmp_path):
    """Checkpoints at every step, no farewell, several times over."""
    config = tiny_config(**STATEFUL, **{"training.checkpoint_minutes": 1e-9})

    def crash():
        raise Crash

    positions = []
    for survive in (1, 4, 3):
        trainer = tiny_trainer(config, tmp_path)
        at_step(trainer, survive, crash)
        with pytest.raises(Crash):
            trainer.fit()
        positions.append(trainer.progress.epoch * STEPS + trainer.progress.step)
    assert positions == sorted(set(positions))  # each went on where the one before was
    last = tiny_trainer(config, tmp_path)
    last.fit()
    assert_same(outcome(last), uninterrupted)


def test_a_finished_training_is_not_trained_again(uninterrupted, tmp_path):
    config = tiny_config(**STATEFUL, **{"training.checkpoint_minutes": 1e-9})
    tiny_trainer(config, tmp_path).fit()
    again = tiny_trainer(config, tmp_path)
    again.train_epoch = None
    again.fit()
    result = outcome(again)
    assert not differing(result["weights"], uninterrupted["weights"])
    assert result["history"] == uninterrupted["history"]
    assert np.array_equal(result["logits"], uninterrupted["logits"])


@pytest.mark.parametrize("variant", ["ast_grf", "ast_tafilm"])
def test_other_variants_resume_as_exactly(variant, tmp_path):
    config = tiny_config(variant, **LIVELY, **{"training.sampler": "balanced"})
    whole = tiny_trainer(config, tmp_path / "whole")
    whole.fit()
    expected = outcome(whole)
    first = tiny_trainer(config, tmp_path / "parts")
    at_step(first, 3, sigterm)
    with pytest.raises(Preempted):
        first.fit()
    second = tiny_trainer(config, tmp_path / "parts")
    second.fit()
    assert_same(outcome(second), expected)


def test_the_state_on_disk_holds_the_best_weights(tmp_path):
    config = tiny_config(**LIVELY, **{"training.checkpoint_minutes": 1e-9, "training.epochs": 6})
    trainer = tiny_trainer(config, tmp_path)
    folder, close, seen = RunFolder(tmp_path).checkpoints, trainer.close_epoch, []

    def checked():
        row = close()
        seen.append(sorted(p.name for p in folder.iterdir()))
        return row

    trainer.close_epoch = checked
    progress = trainer.fit()
    assert all(names in ([], ["last.pt"]) for names in seen)
    state = load_state(RunFolder(tmp_path).last)
    assert not differing(state["best"], weights(trainer))
    assert state["progress"]["best_epoch"] == progress.best_epoch


def interrupted(tmp_path, **overrides):
    config = tiny_config(**overrides)
    trainer = tiny_trainer(config, tmp_path)
    at_step(trainer, 4, sigterm)
    with pytest.raises(Preempted):
        trainer.fit()
    return config


def test_another_configuration_is_refused(tmp_path):
    interrupted(tmp_path)
    other = tiny_trainer(tiny_config(**{"training.lr": 5e-4}), tmp_path)
    with pytest.raises(UserError, match=r"belongs to another configuration .*resume=never"):
        other.fit()


def test_keys_that_do_not_change_the_result_may_change(tmp_path):
    interrupted(tmp_path)
    config = tiny_config(**{"training.checkpoint_minutes": 1.0, "mlflow.experiment_name": "x"})
    assert tiny_trainer(config, tmp_path).fit().epoch == 3


def test_changed_data_is_refused(tmp_path):
    config = interrupted(tmp_path)
    table = cycle_table()
    table.loc[table.index[0], "Age"] = 99.0
    with pytest.raises(UserError, match=r"data has changed .*: 101_\S+ differs in Age.*never"):
        tiny_trainer(config, tmp_path, tiny_data(config, table)).fit()
    table = cycle_table()
    table["Crackles"] = table["Crackles"].to_numpy()[::-1].copy()
    with pytest.raises(UserError, match=r"data has changed .*and \d+ more differ in Crackles;"):
        tiny_trainer(config, tmp_path, tiny_data(config, table)).fit()


def test_a_damaged_state_is_named(tmp_path):
    config = interrupted(tmp_path)
    last = RunFolder(tmp_path).last
    last.write_bytes(last.read_bytes()[:100])
    with pytest.raises(UserError, match=r"last\.pt cannot be read"):
        tiny_trainer(config, tmp_path).fit()


def test_a_state_of_other_code_is_refused(tmp_path):
    config = interrupted(tmp_path)
    last = RunFolder(tmp_path).last
    state = torch.load(last, weights_only=True)
    del state["model"]["head.2.weight"]
    torch.save(state, last)
    with pytest.raises(UserError, match=r"does not fit this code .*resume=never"):
        tiny_trainer(config, tmp_path).fit()


# ------------------------------------------------------------------ outside the loop


@pytest.mark.slow
def test_sigterm_in_the_report_keeps_the_training(tmp_path, synthetic_corpus, monkeypatch):
    """No checkpoint was due before the end; the training is not done a second time."""
    from utils.runs import run as runs
    from utils.training.device import Runtime
    from utils.training.trainer import Trainer

    monkeypatch.setattr("utils.runs.end.draw_figures", lambda *_: None)
    config = tiny_config(
        **{
            "dataset.data_folder": str(synthetic_corpus),
            "dataset.cache_dir": str(tmp_path / "cache"),
            "dataset.store_workers": 1,
            "training.output_dir": str(tmp_path / "runs"),
            "training.checkpoint_dir": str(tmp_path / "checkpoints"),
            "training.checkpoint_minutes": 1e3,
            "training.epochs": 1,
        }
    )
    previous = signal.getsignal(signal.SIGTERM)

    def once() -> runs.Run:
        with sigterm_exits(), runs.Run(config, Runtime("cpu")) as run:
            data = run.data()
            run.test(run.fit(run.model(data), data))
        return run

    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_run_report", lambda *_: sigterm())
        with pytest.raises(SystemExit) as stopped:
            once()
    assert stopped.value.code == 75
    assert signal.getsignal(signal.SIGTERM) is previous
    folder = RunFolder.of(config)
    assert folder.last.is_file()
    assert not folder.finished
    monkeypatch.setattr(Trainer, "train_epoch", None)
    assert once().folder.finished
    assert not folder.last.exists()
