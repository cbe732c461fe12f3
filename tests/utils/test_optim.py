"""Optimiser groups and schedule, computed by hand next to torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from models.conditioner import ParameterGroup
from tests.utils.tiny import tiny_config, tiny_data
from utils.config.schema import TrainingConfig
from utils.training.assemble import build_model
from utils.training.optim import build_optimizer, build_schedule, lr_factor


def test_warm_up_then_cosine_by_hand():
    factors = [lr_factor(step, 4, 10) for step in range(11)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    expected = [0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(7)]
    assert factors[4:] == pytest.approx(expected)
    assert factors[10] == pytest.approx(0.0, abs=1e-12)
    assert lr_factor(11, 4, 10) == pytest.approx(0.0, abs=1e-12)


def test_no_warm_up_starts_at_the_top_and_all_warm_up_never_falls():
    assert lr_factor(0, 0, 5) == 1.0
    assert [lr_factor(step, 3, 3) for step in range(4)] == [1 / 3, 2 / 3, 1.0, 1.0]


def test_schedule_reaches_every_group_per_step():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    groups = [ParameterGroup("a", [a]), ParameterGroup("b", [b], lr_multiplier=10.0)]
    training = TrainingConfig(lr=0.1, weight_decay=0.0, warmup_epochs=1.5, epochs=3)
    optimizer = build_optimizer(groups, training)
    schedule = build_schedule(optimizer, training, 4)
    for step in range(12):
        found = [group["lr"] for group in optimizer.param_groups]
        assert found == pytest.approx([0.1 * lr_factor(step, 6, 12), lr_factor(step, 6, 12)])
        optimizer.step()
        schedule.step()


def test_adamw_step_is_the_one_of_the_paper():
    """Decoupled decay, bias-corrected moments (Loshchilov & Hutter, algorithm 2)."""
    start, gradients = 2.0, [0.3, -0.7, 0.1]
    parameter = nn.Parameter(torch.tensor([start]))
    optimizer = build_optimizer(
        [ParameterGroup("x", [parameter])], TrainingConfig(lr=0.01, weight_decay=0.1)
    )
    x, m, v = start, 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        parameter.grad = torch.tensor([g])
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        x -= 0.01 * 0.1 * x
        x -= 0.01 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
    assert parameter.item() == pytest.approx(x, rel=1e-5)


@pytest.mark.parametrize("variant", ["ast", "ast_grf", "ast_film", "ast_tafilm", "ast_softfilm"])
def test_every_trainable_parameter_is_in_one_group(variant):
    config = tiny_config(variant, **{"backbone.trainable_blocks": 1})
    model = build_model(config, tiny_data(config).statistics)
    groups = model.parameter_groups()
    found = [id(p) for group in groups for p in group.parameters]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    optimizer = build_optimizer(groups, TrainingConfig(lr=3e-5, weight_decay=0.01))
    settings = {g["name"]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert settings.pop("masks", (3e-4, 0.0)) == (pytest.approx(3e-4), 0.0)
    assert set(settings.values()) == {(3e-5, 0.01)}
    assert {"backbone", "head"} <= settings.keys()
