"""Parameters and FLOPs: the published totals, and the products of a small model written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from utils.config.schema import load_config
from utils.runs.model_summary import count_parameters, flops_of_parts, summarise

CONFIGS = Path(__file__).parents[2] / "configs"


def gflops(text: str, row: str) -> list[float]:
    """Forward and training of a row of the printed table."""
    line = next(line for line in text.splitlines() if line.startswith(row))
    return [float(word) for word in line.split()[-2:]]


@pytest.mark.parametrize(("variant", "n"), [("ast", 3), ("ast", 1), ("ast_film", 0)])
def test_cost_is_that_of_the_products(variant, n, make_model):
    """The patch convolution and one block's products, written out."""
    with torch.device("meta"):
        model = make_model(variant, trainable_blocks=n)
    parts = flops_of_parts(model)
    tokens, grid, dim, mlp = 12, 10, 48, 96
    assert model.backbone.grid == (2, 5)
    attention = 2 * tokens * dim * 4 * dim + 4 * tokens * tokens * dim
    block = attention + 4 * tokens * dim * mlp
    usual = parts["backbone, all tokens in the last block"]
    assert usual.forward == 2 * grid * dim * 16 * 16 + 3 * block
    if n == 3:  # the convolution needs no gradient of the spectrogram
        assert usual.training == 3 * usual.forward - 2 * grid * dim * 16 * 16
    elif variant == "ast":  # the last block alone trains
        assert usual.training == usual.forward + 2 * block
    last = 2 * tokens * dim * 2 * dim + 2 * (4 * dim * dim + 4 * tokens * dim + 4 * dim * mlp)
    ours = parts["backbone, as computed here"]
    assert ours.forward == usual.forward - block + last
    assert parts["total, as computed here"].forward > ours.forward
    if n < 3:
        cached = parts["total, frozen prefix cached"]
        assert cached.training < parts["total, as computed here"].training


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


def test_an_input_filter_is_counted():
    """Four products with 2 x 256 columns, two attentions padded to 64, SwiGLU, the filter's two."""
    overrides = ["dataset.h=256", "models.*.input_fdim=256", "backbone.freq_stride=16",
                 "backbone.time_stride=16"]  # fmt: skip
    files = [CONFIGS / "ast_config.yaml", CONFIGS / "methods" / "add_rsc.yaml"]
    text = summarise(load_config(files, overrides))
    assert text.startswith("AST + ADD-RSC") and "1026 tokens" in text
    assert "methods                    955,204" in text
    products = 2 * 1024 * 256 * 512 * (4 + 3) + 2 * 2 * 513 * 8 * 64 * 64
    attention = 2 * 2 * 2 * 1024 * 1024 * 512
    assert gflops(text, "input filter")[0] == round((products + attention) / 1e9, 2)


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("ast_film_soft_config.yaml", [], "89,848,714"),
        ("ast_film_config.yaml", ["backbone.trainable_blocks=0"], "frozen prefix cached"),
    ],
)
def test_summary_of_a_shipped_configuration(name, overrides, expected):
    text = summarise(load_config([CONFIGS / name], overrides))
    assert expected in text
    forward, training = gflops(text, "backbone, all tokens")
    assert forward == 261.03 and (training == 782.6) == (not overrides)
    forward, training = gflops(text, "backbone, as computed")
    assert forward == 242.21 and (training == 726.2) == (not overrides)
