"""Low-rank adapters: where they act, what trains, and that merging changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.ast import AST, Cut
from models.config import BackboneConfig

LORA = {"adapter": "lora", "lora_rank": 4}


def disturb(model):
    for block in model.backbone.blocks:
        if block.attn.adapter is not None:
            nn.init.normal_(block.attn.adapter.down, std=0.3)
    return model


@pytest.mark.parametrize("variant", ["ast", "ast_softfilm"])
def test_it_starts_as_the_frozen_model(variant, make_model, make_spectrogram, make_metadata):
    plain, model = (make_model(variant, **keys).eval() for keys in ({}, LORA))
    added = model.state_dict().keys() - plain.state_dict().keys()
    assert len(added) == 6 and all(".attn.adapter." in name for name in added)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in plain.state_dict().items())
    arguments = make_spectrogram(3), make_metadata(3)
    assert torch.equal(plain(*arguments).logits, model(*arguments).logits)
    assert not torch.equal(plain(*arguments).logits, disturb(model)(*arguments).logits)


def test_as_many_parameters_as_the_authors():
    config = BackboneConfig(adapter="lora")
    with torch.device("meta"):
        ast = AST(config)
        ast.adapt(config)
        ast.freeze(12)
    trained = {k: p.numel() for k, p in ast.named_parameters() if p.requires_grad}
    assert sum(n for k, n in trained.items() if "adapter" in k) == 294_912
    assert sum(trained.values()) == 294_912 + 1_536  # the final LN


@pytest.mark.parametrize("targets", [["k", "v"], ["v", "q"]])
def test_the_named_rows_change_by_the_product(targets, make_model):
    model = disturb(make_model("ast", **LORA, lora_targets=targets, lora_scale=0.5))
    attention = model.backbone.blocks[1].attn
    change = (attention.adapter(attention.qkv.weight) - attention.qkv.weight).chunk(3)
    named = [name for name in "qkv" if name in targets]
    for name, part in zip("qkv", change, strict=True):
        if name not in targets:
            assert not part.any()
            continue
        at = named.index(name)
        product = 0.5 * attention.adapter.up[at] @ attention.adapter.down[at]
        torch.testing.assert_close(part, product, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("variant", ["ast", "ast_film"])
def test_merged_is_unmerged(variant, make_model, make_spectrogram, make_metadata):
    model = disturb(make_model(variant, **LORA)).eval()
    arguments = make_spectrogram(3), make_metadata(3)
    before, tokens = model(*arguments).logits, model.backbone.tokens(arguments[0])
    names = make_model(variant).state_dict().keys()
    model.backbone.merge()
    close = {"atol": 2e-6, "rtol": 1e-5}
    torch.testing.assert_close(model(*arguments).logits, before, **close)
    torch.testing.assert_close(model.backbone.tokens(arguments[0]), tokens, **close)
    assert model.state_dict().keys() == names


@pytest.mark.parametrize(("n", "adapted"), [(3, (0, 1, 2)), (1, (2,))])
def test_only_adapters_and_what_is_new_train(n, adapted, make_model, make_spectrogram,
                                             make_metadata):  # fmt: skip
    model = disturb(make_model("ast_film", {"dropout": 0.0}, trainable_blocks=n, **LORA)).train()
    assert model.cut == (Cut() if n == 3 else Cut(0, attended=True))
    assert model.cacheable == (n == 1)
    for parameter in model.conditioner.parameters():
        nn.init.normal_(parameter, std=0.3)
    model(make_spectrogram(3), make_metadata(3)).logits.square().sum().backward()
    learn = {name for name, p in model.named_parameters() if p.grad is not None}
    inside = {name for name in learn if name.startswith("backbone.")}
    expected = {f"backbone.blocks.{i}.attn.adapter.{p}" for i in adapted for p in ("up", "down")}
    assert inside == expected | {"backbone.norm.weight", "backbone.norm.bias"}
    assert {name.partition(".")[0] for name in learn} == {"backbone", "conditioner", "head"}
    grouped = {id(p) for group in model.parameter_groups() for p in group.parameters}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}


def test_bfloat16_rounds_the_sum_not_the_change(make_model, make_spectrogram, make_metadata):
    """Under autocast the merged weights are those that trained."""
    model = disturb(make_model("ast", **LORA)).eval()
    arguments = make_spectrogram(3), make_metadata(3)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(*arguments).logits
        model.backbone.merge()
        assert torch.equal(model(*arguments).logits, before)
