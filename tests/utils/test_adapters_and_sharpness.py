"""LoRA and SAM in the loop: exact steps, exact resumption, checkpoints that open."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.utils.resuming import resumed_in_mid_epoch
from tests.utils.tiny import (
    LIVELY,
    QUIET,
    differing,
    gradient_norms,
    step_losses,
    tiny_config,
    tiny_trainer,
    weights,
)
from utils.common.errors import UserError
from utils.config.schema import config_hash
from utils.evaluation.trained_model import TrainedModel
from utils.training.assemble import describe_run
from utils.training.checkpoint import load_checkpoint, save_checkpoint
from utils.training.optim import sharpened

LORA = {"backbone.adapter": "lora", "backbone.lora_rank": 2}
SAM = {"training.sam_rho": 0.05}

# ---------------------------------------------------------------- SAM


def test_a_sharpened_step_by_hand():
    """x^2 at 1: the gradient 2.1 of 1.05 moves x to 0.79."""
    x = nn.Parameter(torch.tensor(1.0))
    optimiser = torch.optim.SGD([x], lr=0.1)
    (x**2).backward()
    with sharpened([x], 0.05):
        assert x.item() == pytest.approx(1.05) and x.grad is None
        (x**2).backward()
    assert x.item() == 1.0 and x.grad.item() == pytest.approx(2.1)
    optimiser.step()
    assert x.item() == pytest.approx(0.79)


def test_one_norm_over_all_parameters():
    a, b, unused = (nn.Parameter(torch.tensor([v])) for v in (1.0, 1 / 3, 2.0))
    (3 * a + 4 * b).sum().backward()
    with sharpened([a, b, unused], 0.05):
        found = [p.item() for p in (a, b, unused)]
    assert found == pytest.approx([1.03, 1 / 3 + 0.04, 2.0])
    assert b.item() == torch.tensor(1 / 3).item()  # to the last bit


def test_a_step_of_no_length_is_adamw(tmp_path):
    """With dropout and augmentation: both passes see the same masks, and the next step its own."""
    losses = [
        step_losses(
            tiny_trainer(
                tiny_config("ast_film", **LIVELY, **{"training.sam_rho": rho}), tmp_path / n
            )
        )
        for n, rho in (("a", 0.0), ("b", 1e-12))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sharpness_of_a_batch_in_parts(precision, tmp_path):
    """Both gradients are of the whole step, and every cycle counts once in the epoch's figures."""
    found = []
    for parts in (1, 2):
        keys = {"training.accumulation_steps": parts, "training.epochs": 1,
                "training.precision": precision, "training.sam_rho": 0.5}  # fmt: skip
        trainer = tiny_trainer(tiny_config("ast_film", **QUIET, **keys), tmp_path / str(parts))
        norms, seen, close = gradient_norms(trainer), [], trainer.close_epoch
        trainer.close_epoch = lambda t=trainer, s=seen, c=close: (
            s.extend(row for rows, _ in t.seen for row in rows.tolist()),
            c(),
        )[1]
        history = trainer.fit().history
        assert sorted(seen) == sorted(trainer.rows.tolist())
        found.append((norms, history[0]["train_loss"]))
    rtol = 1e-3 if precision == "fp32" else 0.1
    torch.testing.assert_close(
        torch.tensor(found[0][0]), torch.tensor(found[1][0]), rtol=rtol, atol=1e-4
    )
    assert found[0][1] == pytest.approx(found[1][1], rel=rtol)


def test_sharpness_changes_the_step(tmp_path):
    once = {**QUIET, "training.epochs": 1}
    runs = [
        tiny_trainer(tiny_config("ast", **once, **keys), tmp_path / str(n))
        for n, keys in enumerate(({}, SAM))
    ]
    first = [step_losses(trainer) for trainer in runs]
    assert first[0][0] == first[1][0] and first[0][1:] != first[1][1:]  # the first loss is of w
    assert differing(*map(weights, runs))


# ---------------------------------------------------------------- both


@pytest.mark.parametrize(
    ("variant", "keys"),
    [("ast", LORA), ("ast_film", LORA | SAM | {"methods.add_rsc": {}})],
    ids=["lora", "all"],
)
def test_killed_and_resumed_equals_uninterrupted(variant, keys, tmp_path):
    config = tiny_config(variant, **LIVELY, **keys, **{"training.epochs": 2})
    history = resumed_in_mid_epoch(config, tmp_path).progress.history
    assert all(math.isfinite(row["train_loss"]) for row in history)


def test_adapters_alone_train_and_a_checkpoint_merges_them(tmp_path):
    config = tiny_config("ast_film", **QUIET, **LORA)
    trainer = tiny_trainer(config, tmp_path / "run")
    start = weights(trainer)
    trainer.fit()
    moved = {name for name in differing(start, weights(trainer)) if name.startswith("backbone.")}
    assert {name.rpartition(".adapter.")[2] for name in moved if "norm" not in name} == {
        "up", "down"
    }  # fmt: skip
    path = tmp_path / "best.pt"
    save_checkpoint(path, trainer.checkpoint(describe_run(config, trainer.data)))
    assert any(".adapter." in name for name in load_checkpoint(path).weights)
    model = TrainedModel.open(path, device="cpu")
    assert model.title == "FiLM-AST + LoRA"
    assert not any(".adapter." in name for name in model.model.state_dict())
    rows = trainer.data.split.test
    batch = trainer.data.batch(rows)
    expected = torch.from_numpy(trainer.predict(rows))
    torch.testing.assert_close(model.logits(batch), expected, atol=1e-5, rtol=0)


def test_names_and_refusals():
    plain = tiny_config("ast")
    both = tiny_config("ast", **LORA, **SAM)
    assert both.title == "AST + LoRA + SAM"
    assert config_hash(both) != config_hash(plain)
    for keys, match in (
        ({"backbone.lora_targets": ["x"]}, "some of q, k and v"),
        (LORA | {"backbone.trainable_blocks": 0}, "needs a block"),
        ({"training.sam_rho": -1}, "at least 0"),
        (SAM | {"training.precision": "fp16"}, "no loss scale"),
    ):
        with pytest.raises(UserError, match=match):
            tiny_config("ast", **keys)
