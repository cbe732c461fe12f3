"""Runs that are stopped and resumed, and what must be equal then."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.utils.tiny import comparable, differing, tiny_trainer, weights
from utils.common.errors import Preempted
from utils.config.schema import RunConfig
from utils.training.trainer import Trainer


def outcome(trainer):
    """Everything that must be equal, with the figures that may not."""
    return {
        "weights": weights(trainer),
        "moments": [v for s in trainer.optimizer.state.values() for v in s.values()],
        "schedule": trainer.schedule.state_dict(),
        "history": comparable(trainer.progress.history),
        "progress": (
            trainer.progress.epoch,
            trainer.progress.best_epoch,
            trainer.progress.best_score,
            trainer.progress.thresholds,
            trainer.progress.stale,
        ),
        "logits": trainer.predict(trainer.data.split.test),
        "generator": torch.get_rng_state(),
    }


def assert_same(a, b) -> None:
    assert not differing(a["weights"], b["weights"])
    assert all(torch.equal(x, y) for x, y in zip(a["moments"], b["moments"], strict=True))
    assert a["history"] == b["history"]
    assert a["progress"] == b["progress"]
    assert a["schedule"] == b["schedule"]
    assert np.array_equal(a["logits"], b["logits"])
    assert torch.equal(a["generator"], b["generator"])


def at_step(trainer, number: int, act) -> None:
    """Call `act` during optimiser step `number` (from 0 in this process)."""
    step, count = trainer.step, [0]

    def watched(parts, batches):
        if count[0] == number:
            act()
        count[0] += 1
        return step(parts, batches)

    trainer.step = watched


def sigterm() -> None:
    signal.raise_signal(signal.SIGTERM)


def resumed_in_mid_epoch(config: RunConfig, folder: Path, step: int = 3) -> Trainer:
    """A run that got SIGTERM in optimiser step `step` (from 0) and was resumed; it must have ended
    as one that was never stopped."""
    whole = tiny_trainer(config, folder / "whole")
    whole.fit()
    first = tiny_trainer(config, folder / "parts")
    at_step(first, step, sigterm)
    with pytest.raises(Preempted):
        first.fit()
    assert 0 < first.progress.step < first.steps_per_epoch
    torch.manual_seed(99)
    second = tiny_trainer(config, folder / "parts")
    second.fit()
    assert_same(outcome(second), outcome(whole))
    return second
