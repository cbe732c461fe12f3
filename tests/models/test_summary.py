"""Parameters and FLOPs: the published totals, and torch's own counter on a small model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.ast import AST
from models.conditioner import Features
from models.config import BackboneConfig
from utils.config.schema import load_config
from utils.runs.model_summary import (
    backbone_flops,
    count_parameters,
    small_parts_flops,
    summarise,
)

CONFIGS = Path(__file__).parents[2] / "configs"


def test_totals_of_the_full_size_backbone():
    with torch.device("meta"):
        ast = AST(BackboneConfig())
    usual, ours = backbone_flops(ast, all_tokens=True), backbone_flops(ast)
    assert usual.forward / 1e9 == pytest.approx(261.03, abs=0.005)
    assert usual.training / 1e9 == pytest.approx(782.6, abs=0.05)
    assert ours.forward < 0.93 * usual.forward


CASES = [
    ("ast", {}, 3),
    ("ast", {}, 0),
    ("ast", {}, 1),
    ("ast_grf", {}, 3),
    ("ast_film", {}, 0),
    ("ast_film", {"conditioned_layers": [1]}, 1),
    ("ast_tafilm", {"conditioned_layers": [2]}, 0),
    ("ast_softfilm", {"conditioned_layers": "last_2"}, 2),
]


@pytest.mark.parametrize(("variant", "config", "n"), CASES)
def test_formula_agrees_with_the_counter(
    variant, config, n, make_model, make_spectrogram, make_metadata
):
    """The counter knows attention as matrix products only, so that form is counted."""
    model = make_model(variant, config, trainable_blocks=n).train()
    small = small_parts_flops(make_meta(make_model, variant, config, n))
    x, metadata = make_spectrogram(1), make_metadata(1)
    for cached in (False, True) if model.cacheable else (False,):
        expected = backbone_flops(model.backbone, model.cut, cached=cached) + small
        inputs = Features(model.frozen_prefix(x) if cached else x, from_prefix=cached)
        with sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as counter:
                out = model(inputs, metadata)
                forward = counter.get_total_flops()
                (out.logits.sum() + out.regularisation).backward()
            training = counter.get_total_flops()
        assert forward == expected.forward
        # encoders whose input is data need no gradient of it: less than the rule of three says
        assert training <= expected.training
        assert training == pytest.approx(expected.training, abs=0.4 * small.training)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.backbone.tokens(x)
    usual = backbone_flops(model.backbone, model.cut, all_tokens=True)
    assert counter.get_total_flops() == usual.forward


def make_meta(make_model, variant, config, n):
    with torch.device("meta"):
        return make_model(variant, config, trainable_blocks=n)


def test_parts_add_up(make_model):
    model = make_model("ast_grf", trainable_blocks=1)
    rows = {r.part.strip(): r for r in count_parameters(model)}
    total = sum(rows[part].total for part in ("backbone", "conditioner", "head"))
    assert rows["total"].total == total == sum(p.numel() for p in model.parameters())
    assert sum(rows[p].total for p in ("embedding", "blocks", "final LN")) == rows["backbone"].total
    parts = sum(rows[p].total for p in ("embeddings", "project", "other"))
    assert parts == rows["conditioner"].total
    assert rows["embedding"].trainable == 0
    assert rows["blocks"].trainable * 3 == rows["blocks"].total
    assert rows["head"].trainable == rows["head"].total


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("ast_config.yaml", [], "86,238,146"),
        ("ast_film_soft_config.yaml", [], "89,848,714"),
        ("ast_film_config.yaml", ["backbone.trainable_blocks=0"], "frozen prefix cached"),
    ],
)
def test_summary_of_a_shipped_configuration(name, overrides, expected):
    text = summarise(load_config([CONFIGS / name], overrides))
    assert expected in text
    assert "261.03" in text
    assert ("782.6" in text) == (not overrides)
