"""The four conditioners: formulas, identities, parameter counts, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.ast import AST
from models.conditioner import Modulation
from models.config import BackboneConfig
from models.registry import VARIANTS

CONDITIONED = ("ast_grf", "ast_film", "ast_tafilm", "ast_softfilm")

#: With 12 conditioned layers and 2 logits. TAFiLM: 88,644,034 with a patch generator in the last
#: block, 99,840 = 64 * 1536 + 1536 less without it: no output depends on that block's patches.
COUNTS = {
    "ast": 86_238_146,
    "ast_grf": 86_847_275,
    "ast_film": 87_445_954,
    "ast_tafilm": 88_644_034 - (64 * 1536 + 1536),
    "ast_softfilm": 89_848_714,
}


@pytest.mark.parametrize("variant", COUNTS)
def test_parameter_counts_at_full_size(variant, make_model):
    with torch.device("meta"):
        model = make_model(
            variant,
            embed_dim=768,
            depth=12,
            num_heads=12,
            mlp_ratio=4.0,
            n_mels=128,
            n_frames=1024,
            trainable_blocks=12,
        )
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == COUNTS[variant]


def test_the_paper_variants_are_discovered_in_the_order_of_the_paper():
    assert list(VARIANTS)[:5] == ["ast", "ast_grf", "ast_film", "ast_tafilm", "ast_softfilm"]
    assert [VARIANTS[v].short for v in COUNTS] == ["ast", "grf", "film", "tafilm", "softfilm"]


# ---------------------------------------------------------------------- the hook


def plain_block(block, x, gamma, beta):
    """Reference of SPEC's block: modulation after LN2, inside the residual branch."""
    x = x + block.attn(block.norm1(x))
    u = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, block.norm2.eps)
    u = gamma * u + beta
    hidden = F.gelu(u @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    return x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layers", [(0, 1, 2), (2,), (0, 1), ()])
def test_modulation_acts_after_ln2_inside_the_residual_branch(groups, layers, make_spectrogram):
    ast = AST(BackboneConfig(embed_dim=48, depth=3, num_heads=4), n_mels=32, n_frames=64)
    for norm in [m for m in ast.modules() if isinstance(m, torch.nn.LayerNorm)]:
        torch.nn.init.normal_(norm.weight)
    x = make_spectrogram(2)
    modulation = [
        Modulation(torch.randn(2, groups, 48), torch.randn(2, groups, 48)) if i in layers else None
        for i in range(3)
    ]
    tokens = ast.embed(x)
    owner = torch.tensor([0, 0] + [groups - 1] * (tokens.shape[1] - 2))
    for block, m in zip(ast.blocks, modulation, strict=True):
        gamma = torch.ones(1) if m is None else 1 + m.scale[:, owner]
        beta = torch.zeros(1) if m is None else m.shift[:, owner]
        tokens = plain_block(block, tokens, gamma, beta)
    expected = ast.norm(tokens)
    assert torch.allclose(ast.tokens(x, modulation), expected, atol=1e-5)
    assert torch.allclose(ast(x, modulation), expected[:, :2].mean(1), atol=1e-5)


# ---------------------------------------------------------------------- formulas


def hidden_reference(encoder, e, norm=True):
    """h = act(W2 act(W1 LN(e))), written out."""
    first, second = encoder.net[1], encoder.net[4]
    if norm:
        e = F.layer_norm(e, e.shape[-1:], encoder.net[0].weight, encoder.net[0].bias)
    return F.relu(F.relu(e @ first.weight.T + first.bias) @ second.weight.T + second.bias)


def fill(module):
    """Give every parameter a value that is neither 0 nor 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def film_hidden_reference(film, metadata):
    each, joint = film.scalar_encoder.each, film.scalar_encoder.joint
    scalars = []
    for i in range(3):
        z = metadata.rest[:, i, None] @ each[i][0].weight.T + each[i][0].bias
        scalars.append(F.relu(F.layer_norm(z, (10,), each[i][1].weight, each[i][1].bias)))
    z = torch.cat(scalars, 1) @ joint[0].weight.T + joint[0].bias
    z = F.relu(F.layer_norm(z, (32,), joint[1].weight, joint[1].bias))
    rest32 = z @ joint[4].weight.T + joint[4].bias
    tables = film.embeddings
    m = [tables.device.weight[metadata.device], tables.site.weight[metadata.site], rest32]
    return hidden_reference(film.encoder, torch.cat(m, dim=1))


def test_grf_follows_its_formula(make_model, make_metadata):
    grf = make_model("ast_grf").conditioner.eval()
    fill(grf)
    metadata, pooled = make_metadata(5), torch.randn(5, 48)
    w1, ln1, _, _, w2, ln2 = grf.project
    tables = grf.embeddings
    m = torch.cat(
        [tables.device.weight[metadata.device], tables.site.weight[metadata.site], metadata.rest], 1
    )
    z = F.relu(F.layer_norm(m @ w1.weight.T + w1.bias, (48,), ln1.weight, ln1.bias))
    z = F.layer_norm(z @ w2.weight.T + w2.bias, (48,), ln2.weight, ln2.bias)
    state = grf.encode(metadata)
    assert torch.allclose(grf.fuse(pooled, state), pooled + grf.gate * z, atol=1e-5)


@pytest.mark.parametrize("layers", [[0, 1, 2], [1], [0, 2]])
def test_film_and_tafilm_follow_their_formula(layers, make_model, make_metadata):
    metadata = make_metadata(5)
    for variant in ("ast_film", "ast_tafilm"):
        film = make_model(variant, {"conditioned_layers": layers}).conditioner.eval()
        fill(film)
        h = film_hidden_reference(film, metadata)
        modulation = film.encode(metadata).modulation
        assert [i for i, m in enumerate(modulation) if m is not None] == layers
        for index, layer in enumerate(layers):
            generators = [film.generators]
            if variant == "ast_tafilm" and layer < 2:
                generators.append(film.patch_generators)
            for group, g in enumerate(generators):
                expected = h @ g.weight[index].T + g.bias[index]  # [dg; b]
                scale, shift = modulation[layer]
                assert scale.shape == (5, len(generators), 48)
                assert torch.allclose(scale[:, group], expected[:, :48], atol=1e-5)
                assert torch.allclose(shift[:, group], expected[:, 48:], atol=1e-5)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("mode", ["sigmoid", "softmax"])
def test_softfilm_follows_its_formula(mode, per_layer, make_model, make_metadata):
    config = {"mask_mode": mode, "per_layer_masks": per_layer, "mask_temperature": 0.5}
    soft = make_model("ast_softfilm", config).conditioner.eval()
    fill(soft)
    metadata, tables, tau = make_metadata(5), soft.embeddings, 0.5
    e = {
        "device": tables.device.weight[metadata.device],
        "site": tables.site.weight[metadata.site],
        "rest": metadata.rest,
    }
    for layer in range(3):
        logits = soft.masks.logits[:, layer if per_layer else 0] / tau
        w = torch.softmax(logits, 0) if mode == "softmax" else torch.sigmoid(logits)
        scale, shift = torch.zeros(5, 48), torch.zeros(5, 48)
        for k, name in enumerate(("device", "site", "rest")):
            h = hidden_reference(soft.encoders[name], e[name], norm=name != "rest")
            g = soft.generators[name]
            out = h @ g.weight[layer].T + g.bias[layer]
            scale = scale + w[k] * out[:, :48]
            shift = shift + w[k] * out[:, 48:]
        m = soft.encode(metadata).modulation[layer]
        assert torch.allclose(m.scale[:, 0], scale, atol=1e-5)
        assert torch.allclose(m.shift[:, 0], shift, atol=1e-5)


@pytest.mark.parametrize(("act", "function"), [("relu", F.relu), ("gelu", F.gelu)])
def test_head_follows_its_formula(act, function, make_model):
    head = make_model("ast", {"activation": act}).head.eval()
    fill(head)
    ln, _, w1, _, _, w2 = head
    pooled = 3 * torch.randn(5, 48) + 1
    z = F.layer_norm(pooled, (48,), ln.weight, ln.bias)
    z = function(z @ w1.weight.T + w1.bias) @ w2.weight.T + w2.bias
    assert torch.allclose(head(pooled), z, atol=1e-5)


def test_softfilm_starts_small_but_not_at_zero(make_model):
    """Xavier-uniform with gain 0.1 in every block: |G| up to 0.1 sqrt(6 / (H + 2 D))."""
    soft = make_model("ast_softfilm", {"film_hidden_dim": 32}).conditioner
    bound = 0.1 * (6 / (32 + 2 * 48)) ** 0.5
    for generators in soft.generators.values():
        assert (generators.bias == 0).all()
        for weight in generators.weight:
            assert 0.99 * bound < weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


# ---------------------------------------------------------------------- identities


def outputs(model, x, metadata, bf16):
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        state = model.conditioner.encode(metadata)
        return model.backbone.tokens(x, state.modulation), *model.embed(x, metadata)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("variant", ["ast_film", "ast_tafilm"])
def test_film_and_tafilm_start_from_the_plain_ast(
    variant, bf16, make_model, make_spectrogram, make_metadata
):
    x, metadata = make_spectrogram(3), make_metadata(3)
    expected = outputs(make_model("ast"), x, metadata, bf16)
    model = make_model(variant)
    actual = outputs(model, x, metadata, bf16)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    fill(model.conditioner.generators)  # ... and no longer when the generators have moved
    moved = outputs(model, x, metadata, bf16)
    assert not any(torch.allclose(a, b) for a, b in zip(moved, expected, strict=True))


def test_tafilm_with_equal_generators_is_film(make_model, make_spectrogram, make_metadata):
    film, tafilm = make_model("ast_film"), make_model("ast_tafilm")
    fill(film.conditioner)
    own = tafilm.conditioner.state_dict()
    state = {**film.conditioner.state_dict()}
    state["patch_generators.weight"] = state["generators.weight"][:-1]
    state["patch_generators.bias"] = state["generators.bias"][:-1]
    assert own.keys() == state.keys()
    tafilm.conditioner.load_state_dict(state)
    x, metadata = make_spectrogram(3), make_metadata(3)
    pairs = zip(*(outputs(m, x, metadata, False) for m in (film, tafilm)), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


@pytest.mark.parametrize("bf16", [False, True])
def test_grf_with_a_closed_gate_is_the_plain_ast(bf16, make_model, make_spectrogram, make_metadata):
    x, metadata = make_spectrogram(3), make_metadata(3)
    expected = outputs(make_model("ast"), x, metadata, bf16)
    model = make_model("ast_grf", {"gate_init": 0.0})
    actual = outputs(model, x, metadata, bf16)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    open_gate = outputs(make_model("ast_grf"), x, metadata, bf16)
    assert not torch.allclose(open_gate[2], expected[2])


def test_conditioner_and_head_stay_in_full_precision(make_model, make_spectrogram, make_metadata):
    """In bf16, 1 + dg would be 1 for every |dg| below 2^-8."""
    model, x, metadata = make_model("ast_film").eval(), make_spectrogram(3), make_metadata(3)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        before = model(x, metadata).logits
        model.conditioner.generators.bias.fill_(1e-3)
        _, fused = model.embed(x, metadata)
        after = model(x, metadata).logits
    assert after.dtype == torch.float32 and not torch.equal(before, after)
    assert torch.equal(after, model.head(fused.float()))


@pytest.mark.slow
def test_a_compiled_tafilm_starts_from_the_plain_ast(make_model, make_spectrogram, make_metadata):
    x, metadata = make_spectrogram(2), make_metadata(2)
    ast, tafilm = (
        make_model(variant, depth=2, trainable_blocks=2).eval() for variant in ("ast", "ast_tafilm")
    )
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(tafilm, fullgraph=True)(x, metadata).logits
        assert torch.allclose(compiled, ast(x, metadata).logits, atol=1e-5)


@pytest.mark.parametrize("variant", COUNTS)
def test_no_graph_break_in_training(variant, make_model, make_spectrogram, make_metadata):
    config = {} if variant == "ast" else {"metadata_dropout": 0.2}
    # one frozen block, so that the prefix without gradients is in the graph too
    model = make_model(variant, config, trainable_blocks=2).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = compiled(make_spectrogram(2), make_metadata(2))
    (out.logits.sum() + out.regularisation).backward()
    assert out.logits.dtype == torch.float32


# ---------------------------------------------------------------------- gradients


CASES = [
    (variant, config)
    for variant in COUNTS
    for config in (
        {},
        {"conditioned_layers": "last_2"},
        {"conditioned_layers": [0]},
        {"conditioned_layers": [2]},
        {"metadata_fields": ["device"]},
        {"metadata_fields": ["bmi", "site"]},
        {"metadata_dropout": 0.3},
        {"per_layer_masks": True, "mask_mode": "softmax", "mask_coverage_lambda": 0.005},
        {"activation": "gelu"},
    )
    if all(hasattr(VARIANTS[variant].config_class(), key) for key in config)
]


@pytest.mark.parametrize(("variant", "config"), CASES)
def test_every_parameter_moves_in_two_steps(
    variant, config, make_model, make_spectrogram, make_metadata
):
    model = make_model(variant, {**config, "dropout": 0.1}).train()
    start = {k: p.detach().clone() for k, p in model.named_parameters()}
    assert all(p.requires_grad for p in model.parameters())
    groups = model.parameter_groups()
    grouped = [p for g in groups for p in g.parameters]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}
    assert len(grouped) == len(start)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(2):
        optimiser.zero_grad()
        out = model(make_spectrogram(16, seed=step), make_metadata(16, seed=step))
        (out.logits.sum(1).sigmoid().square().mean() + out.regularisation).backward()
        optimiser.step()
    for k, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, f"{k} has no gradient"
        assert not torch.equal(p, start[k]), f"{k} has not moved"
