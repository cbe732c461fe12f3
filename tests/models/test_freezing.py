"""Frozen backbones: what trains, what is differentiated, and the cacheable prefix."""

from __future__ import annotations

import pytest
import torch

from models.ast import Cut
from models.conditioner import Features, Modulation

VARIANTS = ("ast", "ast_grf", "ast_film", "ast_tafilm", "ast_softfilm")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n", [0, 1, 2, 3, 12])
def test_the_last_n_blocks_train(variant, n, make_model, make_spectrogram, make_metadata):
    model = make_model(variant, {"dropout": 0.1}, trainable_blocks=n).train()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    expected = set()
    if n < 3:
        expected = {f"backbone.{k}" for k in ("cls_token", "dist_token", "pos_embed")}
        prefixes = ("backbone.patch_embed.", *(f"backbone.blocks.{i}." for i in range(3 - n)))
        expected |= {k for k, _ in model.named_parameters() if k.startswith(prefixes)}
    assert frozen == expected
    for name, module in model.backbone.named_modules():
        inside = any(f"backbone.{name}.".startswith(k + ".") for k in _frozen_modules(n))
        assert module.training == (not inside), name
    start = {k: p.detach().clone() for k, p in model.named_parameters()}
    grouped = [p for group in model.parameter_groups() for p in group.parameters]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    optimiser = torch.optim.Adam(grouped, lr=1e-3)
    for step in range(2):
        optimiser.zero_grad()
        out = model(make_spectrogram(16, seed=step), make_metadata(16, seed=step))
        (out.logits.sum(1).sigmoid().square().mean() + out.regularisation).backward()
        optimiser.step()
    for k, p in model.named_parameters():
        assert torch.equal(p, start[k]) == (k in frozen), k
        assert (p.grad is None) == (k in frozen), k


def _frozen_modules(n: int) -> list[str]:
    if n >= 3:
        return []
    return ["backbone.patch_embed", *(f"backbone.blocks.{i}" for i in range(3 - n))]


CUTS = [  # variant, conditioned layers, trainable blocks -> cut, tokens in the prefix
    ("ast", None, 3, None, None),
    ("ast", None, 0, Cut(3), 2),
    ("ast_grf", None, 0, Cut(3), 2),
    ("ast", None, 1, Cut(2), 12),
    ("ast_film", "all", 0, Cut(0, True), 12),
    ("ast_film", [2], 0, Cut(2, True), 2),
    ("ast_tafilm", "last_2", 0, Cut(1, True), 12),
    ("ast_softfilm", "last_2", 2, Cut(1), 12),
    ("ast_softfilm", "last_2", 1, Cut(1, True), 12),
    ("ast_softfilm", [2], 2, Cut(1), 12),
]


@pytest.mark.parametrize(("variant", "layers", "n", "cut", "tokens"), CUTS)
def test_the_prefix_ends_where_something_trains_or_is_conditioned(
    variant, layers, n, cut, tokens, make_model, make_spectrogram, make_metadata
):
    config = {} if layers is None else {"conditioned_layers": layers}
    model = make_model(variant, config, trainable_blocks=n)
    for parameter in model.conditioner.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert model.cut == cut
    assert model.cacheable == (cut is not None)
    x, metadata = make_spectrogram(4), make_metadata(4)
    if cut is None:
        with pytest.raises(ValueError, match="frozen"):
            model.frozen_prefix(x)
        return
    results = []
    for cached in (False, True):
        model.zero_grad()
        torch.manual_seed(3)  # the same dropout
        if cached:
            prefix = model.frozen_prefix(x.clone().requires_grad_())
            assert prefix.shape == (4, tokens, 48)
            assert not prefix.requires_grad
            out = model(Features(prefix, from_prefix=True), metadata)
        else:
            out = model(x, metadata)
        (out.logits.square().sum() + out.regularisation).backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        results.append([out.logits, out.regularisation, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    # the same function as that of the whole model without any cut
    model.eval()
    state = model.conditioner.encode(metadata)
    whole = model.backbone(x, state.modulation)
    assert torch.allclose(model.embed(x, metadata)[0], whole, atol=1e-6)


@pytest.mark.parametrize(("variant", "n"), [("ast_film", 1), ("ast", 1), ("ast", 0)])
def test_a_prefix_in_half_precision_is_accepted(
    variant, n, make_model, make_spectrogram, make_metadata
):
    """It may be stored in half precision; the computation continues in full precision."""
    model = make_model(variant, trainable_blocks=n).eval()
    x, metadata = make_spectrogram(4), make_metadata(4)
    half = model.frozen_prefix(x).bfloat16()
    out = model(Features(half, from_prefix=True), metadata)
    assert out.logits.dtype == torch.float32
    full = model(Features(half.float(), from_prefix=True), metadata)
    assert torch.equal(out.logits, full.logits)
    assert torch.allclose(out.logits, model(x, metadata).logits, atol=0.02)


def test_frozen_conditioned_blocks_pass_the_gradient_to_the_conditioner(
    make_model, make_spectrogram, make_metadata
):
    model = make_model("ast_film", {"conditioned_layers": [1]}, trainable_blocks=0)
    model(make_spectrogram(4), make_metadata(4)).logits.sum().backward()
    assert model.conditioner.generators.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.backbone.blocks.parameters())


def test_nothing_frozen_is_differentiated(make_model, make_spectrogram, make_metadata):
    """The frozen, unconditioned blocks save nothing for a backward pass."""
    sizes = []
    for n in (0, 3):
        model = make_model("ast", trainable_blocks=n).train()
        saved = []

        def pack(tensor, saved=saved):
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(make_spectrogram(4), make_metadata(4))
        sizes.append(sum(saved))
    assert sizes[0] < 0.05 * sizes[1]


def test_a_modulation_before_the_cut_is_an_error(make_model, make_spectrogram):
    backbone = make_model("ast", trainable_blocks=1).backbone
    tokens = backbone.prefix(make_spectrogram(1), Cut(2))
    m = Modulation(torch.zeros(1, 1, 48), torch.zeros(1, 1, 48))
    with pytest.raises(ValueError, match="already computed"):
        backbone.resume(tokens, (m, None, None), Cut(2))


def test_the_fingerprint_follows_the_frozen_weights_only(make_model):
    model = make_model("ast", trainable_blocks=1)
    first = model.prefix_fingerprint()
    with torch.no_grad():
        model.backbone.blocks[2].mlp.fc1.weight.add_(1)
        model.backbone.norm.weight.add_(1)
    assert model.prefix_fingerprint() == first
    with torch.no_grad():
        model.backbone.blocks[1].mlp.fc1.weight[0, 0] += 1e-6
    assert model.prefix_fingerprint() != first
    assert make_model("ast", trainable_blocks=2).prefix_fingerprint() != first
    film = [make_model("ast_film", {"conditioned_layers": [i]}, trainable_blocks=0) for i in (0, 1)]
    assert film[0].prefix_fingerprint() != film[1].prefix_fingerprint()  # another cut
    near = [make_model("ast", trainable_blocks=0, time_stride=n) for n in (15, 16)]
    assert near[0].backbone.grid == near[1].backbone.grid
    assert near[0].prefix_fingerprint() != near[1].prefix_fingerprint()  # other places
    lora = make_model("ast", trainable_blocks=1, adapter="lora", lora_rank=2)
    torch.nn.init.normal_(lora.backbone.blocks[2].attn.adapter.down)
    trained = lora.prefix_fingerprint()
    lora.merge()  # as evaluation does, which shall find the stored features
    assert lora.prefix_fingerprint() == trained
