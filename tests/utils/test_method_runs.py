"""Training methods in the loop: they train, resume exactly, and leave everything else alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.loader import MicroBatch
from tests.utils.tiny import LIVELY, QUIET, differing, tiny_config, tiny_trainer, weights
from utils.common.errors import Preempted, UserError
from utils.config.schema import config_hash

METHODS = ("patchmix_cl", "sg_scl", "dat", "pafa")


def with_method(method, variant="ast_film", **overrides):
    return tiny_config(variant, **{f"methods.{method}": {}, **overrides})


@pytest.mark.parametrize("variant", ["ast", "ast_softfilm"])
@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_learns_and_the_base_is_shared(method, variant, tmp_path):
    """The model starts as it does without the method; the method's own parameters train too."""
    trainer = tiny_trainer(with_method(method, variant), tmp_path / "a")
    plain = tiny_trainer(tiny_config(variant), tmp_path / "b")
    start = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    assert all(torch.equal(start[k], v) for k, v in plain.model.state_dict().items())
    rows = trainer.rows[:8]
    test = trainer.data.split.test
    assert np.array_equal(trainer.predict(test), plain.predict(test))
    trainer.model.train()
    for seed in range(2):  # generators start at zero: what lies behind them moves in step two
        trainer.step([MicroBatch(rows, 1 / 8, seed)], trainer.inputs.batches([rows]))
    owned = [k for k in start if k.startswith("methods.") and not k.endswith("alpha")]
    now = trainer.model.state_dict()
    assert owned and not any(torch.equal(start[k], now[k]) for k in owned)
    groups = [p for g in trainer.model.parameter_groups() for p in g.parameters]
    assert len(groups) == len(set(map(id, groups))) == len(list(trainer.model.parameters()))


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_resumed_equals_uninterrupted(method, tmp_path):
    config = with_method(method, **LIVELY)
    whole = tiny_trainer(config, tmp_path / "whole")
    whole.fit()
    stopped = tiny_trainer(config, tmp_path / "cut")
    step, count = stopped.step, 0

    def interrupted(parts, batches):
        nonlocal count
        count += 1
        if count == 5:  # in the middle of the second epoch
            stopped._save()
            raise Preempted
        return step(parts, batches)

    stopped.step = interrupted
    with pytest.raises(Preempted):
        stopped.fit()
    resumed = tiny_trainer(config, tmp_path / "cut")
    resumed.fit()
    assert not differing(weights(whole), weights(resumed))


def test_a_method_changes_the_training_and_the_name(tmp_path):
    quiet = tiny_config("ast", **QUIET)
    plain = tiny_trainer(quiet, tmp_path / "a")
    other = tiny_trainer(with_method("pafa", "ast", **QUIET), tmp_path / "b")
    plain.fit(), other.fit()
    assert differing(weights(plain), weights(plain)) == []
    assert any(not torch.equal(v, weights(other)[k]) for k, v in weights(plain).items())
    assert config_hash(quiet) != config_hash(with_method("pafa", "ast", **QUIET))


def test_what_cannot_run_together_is_refused():
    with pytest.raises(UserError, match="cannot run together"):
        tiny_config("ast", **{"methods.patchmix_cl": {}, "methods.sg_scl": {}})
    with pytest.raises(UserError, match="at least 4"):
        with_method("sg_scl", **{"training.accumulation_steps": 4})
    with pytest.raises(UserError, match=r"methods\.mixup"):
        with_method("mixup")
    with pytest.raises(UserError, match=r"methods\.dat\.schedule"):
        tiny_config("ast", **{"methods.dat.schedule": "linear"})


def test_non_finite_logits_are_no_metric(tmp_path):
    trainer = tiny_trainer(tiny_config("ast"), tmp_path)
    trainer.progress.epoch = 1
    with torch.no_grad():
        next(trainer.model.head.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="after epoch 2 the logits of"):
        trainer.close_epoch() if trainer.seen else trainer.predict(trainer.data.split.val)
