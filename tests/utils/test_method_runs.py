"""Training methods in the loop: they train, resume exactly, and leave everything else alone."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from data.loader import MicroBatch
from models import methods
from models.registry import METHODS as METHOD_TYPES
from tests.utils.resuming import resumed_in_mid_epoch
from tests.utils.tiny import (
    LIVELY,
    QUIET,
    differing,
    step_losses,
    tiny_config,
    tiny_trainer,
    weights,
)
from utils.common.errors import UserError
from utils.config.schema import config_hash
from utils.config.validation import check_micro_batches
from utils.runs.run import Run
from utils.training.device import Runtime

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("patchmix_cl", "sg_scl", "dat", "pafa", "add_rsc")


def with_method(method, variant="ast_film", **overrides):
    return tiny_config(variant, **{f"methods.{method}": {}, **overrides})


@pytest.mark.parametrize(("variant", "n_cls"), [("ast", 2), ("ast_softfilm", 4)])
@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_learns_and_the_base_is_shared(method, variant, n_cls, tmp_path):
    """The model starts as it does without the method; the method's own parameters train too."""
    task = {"dataset.n_cls": n_cls}
    trainer = tiny_trainer(with_method(method, variant, **task), tmp_path / "a")
    plain = tiny_trainer(tiny_config(variant, **task), tmp_path / "b")
    start = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    assert all(torch.equal(start[k], v) for k, v in plain.model.state_dict().items())
    rows = trainer.rows[:8]
    test = trainer.data.split.test
    equal = np.array_equal(trainer.predict(test), plain.predict(test))
    assert equal != trainer.model.methods[0].filters
    trainer.model.train()
    for seed in range(2):  # generators start at zero: what lies behind them moves in step two
        trainer.step([MicroBatch(rows, 1 / 8, seed)], trainer.inputs.batches([rows]))
    owned = [k for k in start if k.startswith("methods.") and not k.endswith("alpha")]
    now = trainer.model.state_dict()
    assert owned and not any(torch.equal(start[k], now[k]) for k in owned)
    groups = [p for g in trainer.model.parameter_groups() for p in g.parameters]
    assert len(groups) == len(set(map(id, groups))) == len(list(trainer.model.parameters()))


@pytest.mark.parametrize("method", (*METHODS, "prior_product", "group_dro"))
def test_killed_and_resumed_equals_uninterrupted(method, tmp_path):
    resumed_in_mid_epoch(with_method(method, **LIVELY, **{"training.epochs": 2}), tmp_path)


@pytest.fixture
def patchout(tmp_path, monkeypatch):
    """The worked example of docs/methods.md, among the methods; gives its YAML."""
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    added = re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```", page, re.M | re.S)
    assert [name for name, _ in added] == [
        "models/methods/patchout.py",
        "configs/methods/patchout.yaml",
    ]
    for name, text in added:
        (tmp_path / Path(name).name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    METHOD_TYPES.__dict__.pop("_methods", None)
    yield tmp_path / "patchout.yaml"
    METHOD_TYPES.__dict__.pop("_methods", None)
    sys.modules.pop("models.methods.patchout", None)


def test_the_example_of_the_page_trains(patchout, tmp_path):
    sections = yaml.safe_load(patchout.read_text())["methods"] | {"patchmix_cl": {}}
    config = tiny_config("ast_film", methods=sections, **{**LIVELY, "training.epochs": 1})
    assert config.title == "FiLM-AST + Patchout + Patch-Mix CL"
    trainer = tiny_trainer(config, tmp_path / "run")
    seen, blocks = set(), trainer.model.backbone.blocks
    blocks[0].register_forward_pre_hook(lambda _, args: seen.add(args[0].shape[1]))
    losses = step_losses(trainer)
    assert np.isfinite(losses).all()
    assert trainer.model.backbone.n_patches == 6 and seen == {2 + 3, 2 + 6}  # training, evaluation
    patchout_ = trainer.model.methods[0]
    kept = [patchout_.draw(4, 100, seed)["kept"] for seed in (0, 0, 1)]
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])
    assert len(set(kept[0].tolist())) == 52 and kept[0][:2].tolist() == [0, 1]


OFF = {
    "patchmix_cl": {"weight": 0},
    "sg_scl": {"weight": 0},
    "dat": {"weight": 0},
    "pafa": {"pcsl_weight": 0, "gpal_weight": 0},
    "prior_product": {"strength": 0},
    "group_dro": {"strength": 0},
    "structured_patchout": {"freq_share": 0, "time_share": 0},
}


@pytest.mark.parametrize("method", OFF)
def test_without_weight_it_is_the_run_without(method, tmp_path):
    """Same order, augmentation and dropout; the rows that some add move only the rounding."""
    once = {**LIVELY, "training.epochs": 1}
    off = tiny_config("ast_film", **once, **{f"methods.{method}": dict(OFF[method])})
    losses = [
        step_losses(tiny_trainer(config, tmp_path / str(number)))
        for number, config in enumerate((off, tiny_config("ast_film", **once)))
    ]
    exact = method not in ("patchmix_cl", "sg_scl")
    assert losses[0] == (losses[1] if exact else pytest.approx(losses[1], rel=1e-4))


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
    with pytest.raises(UserError, match="4 and 1 process leave 2; leave at least 4"):
        with_method("sg_scl", **{"training.accumulation_steps": 4})
    with pytest.raises(UserError, match="4 processes leave 2; leave at least 4"):
        check_micro_batches(with_method("patchmix_cl"), 4)
    check_micro_batches(with_method("patchmix_cl"), 2)
    check_micro_batches(with_method("pafa"), 8)
    with pytest.raises(UserError, match=r"methods\.mixup"):
        with_method("mixup")
    with pytest.raises(UserError, match=r"methods\.dat\.schedule"):
        tiny_config("ast", **{"methods.dat.schedule": "linear"})


def test_methods_act_in_the_configured_order():
    """So another order is another run; one method alone keeps the name that it had."""
    first = tiny_config("ast", **{"methods.dat": {}, "methods.pafa": {}})
    second = tiny_config("ast", **{"methods.pafa": {}, "methods.dat": {}})
    assert list(second.methods) == ["pafa", "dat"]
    assert first.title == "AST + DAT + PAFA" and second.title == "AST + PAFA + DAT"
    assert config_hash(first) != config_hash(second)


def test_methods_that_oppose_or_idle_are_named(tmp_path, caplog):
    def said(config, words="opposite directions"):
        caplog.clear()
        with contextlib.suppress(UserError), Run(config, Runtime("cpu", "fp32", "false")):
            raise UserError("nothing is trained here")
        return words in caplog.text

    place = {"training.output_dir": str(tmp_path)}
    assert said(with_method("dat", "ast_film", **place))
    assert not said(with_method("dat", "ast", **place))
    assert not said(with_method("pafa", "ast_film", **place))
    fields = {"models.*.metadata_fields": ["site", "age"]}
    assert not said(with_method("dat", "ast_film", **place, **fields))
    silent = {"augment.enabled": False}
    assert said(with_method("sg_scl", "ast", **place, **silent), "makes them equal")
    assert not said(with_method("patchmix_cl", "ast", **place, **silent), "makes them equal")
    assert not said(with_method("sg_scl", "ast", **place, **{"augment.enabled": True}), "equal")


def test_non_finite_logits_are_no_metric(tmp_path):
    trainer = tiny_trainer(tiny_config("ast"), tmp_path)
    trainer.progress.epoch = 1
    with torch.no_grad():
        next(trainer.model.head.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="after epoch 2 the logits of"):
        trainer.close_epoch() if trainer.seen else trainer.predict(trainer.data.split.val)
