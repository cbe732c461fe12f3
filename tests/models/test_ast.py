"""The backbone against implementations that we did not write: transformers and timm."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ASTConfig, ASTForAudioClassification

from models.ast import AST
from models.config import BackboneConfig
from models.pretrained import Weights, backbone_of, from_transformers, from_vit, load_into

SIZES = [  # bands, frames, stride over bands, over frames
    (32, 64, 10, 10),
    (48, 80, 16, 16),
    (40, 70, 8, 12),
]


def small_ast(**sizes) -> AST:
    return AST(BackboneConfig(embed_dim=48, num_heads=4, **sizes), n_mels=32, n_frames=64)


def transformers_model(f, t, fs, ts, attention="sdpa"):
    config = ASTConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        num_mel_bins=f,
        max_length=t,
        frequency_stride=fs,
        time_stride=ts,
        attn_implementation=attention,
        num_labels=5,
        initializer_range=0.2,
    )
    model = ASTForAudioClassification(config).eval()
    with torch.no_grad():  # everything that starts at a special value would hide an error
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def ours_like(model) -> AST:
    """Our backbone with the weights of a transformers model."""
    c = model.config
    ast = AST(
        BackboneConfig(
            embed_dim=c.hidden_size,
            depth=c.num_hidden_layers,
            num_heads=c.num_attention_heads,
            mlp_ratio=c.intermediate_size / c.hidden_size,
            freq_stride=c.frequency_stride,
            time_stride=c.time_stride,
        ),
        n_mels=c.num_mel_bins,
        n_frames=c.max_length,
        layer_norm_eps=c.layer_norm_eps,
    )
    state = from_transformers(backbone_of(model.state_dict(), "test")[0])
    load_into(ast, Weights(state, c.layer_norm_eps, ast.grid, c.num_attention_heads, "test"))
    return ast


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("size", SIZES)
def test_tokens_pooled_and_logits_equal_transformers(size, attention, make_spectrogram):
    theirs = transformers_model(*size, attention)
    ours = ours_like(theirs)
    x = make_spectrogram(3, *size[:2])
    with torch.no_grad():
        base = theirs.audio_spectrogram_transformer(x[:, 0].transpose(1, 2))
        logits = theirs(x[:, 0].transpose(1, 2)).logits
        tokens, pooled = ours.tokens(x), ours(x)
    assert tokens.std() > 0.5  # an input that vanishes would make any two models equal
    assert (tokens - base.last_hidden_state).abs().max() < 1e-4
    assert (pooled - base.pooler_output).abs().max() < 1e-4
    assert (theirs.classifier(pooled) - logits).abs().max() < 1e-4


@pytest.mark.parametrize("size", SIZES)
def test_gradients_equal_transformers(size, make_spectrogram):
    theirs = transformers_model(*size)
    ours = ours_like(theirs)
    x = make_spectrogram(3, *size[:2])
    direction = torch.randn(3, 48)
    out = theirs.audio_spectrogram_transformer(x[:, 0].transpose(1, 2)).pooler_output
    (out * direction).sum().backward()
    (ours(x) * direction).sum().backward()
    named = theirs.named_parameters()
    grads = {k: p.grad for k, p in named if p.grad is not None}
    expected = from_transformers(backbone_of(grads, "test")[0])
    actual = {k: p.grad for k, p in ours.named_parameters()}
    assert expected.keys() == actual.keys()
    blocks = {k: k.split(".")[1] if k.startswith("blocks.") else "outside" for k in actual}
    for block in set(blocks.values()):
        keys = [k for k in actual if blocks[k] == block]
        largest = max(expected[k].abs().max() for k in keys)
        for k in keys:
            assert (actual[k] - expected[k]).abs().max() <= 1e-4 * largest, k


class StridedPatches(nn.Module):
    """The AST authors' change to timm's patch embedding."""

    def __init__(self, proj, size):
        super().__init__()
        self.proj = nn.Conv2d(1, 48, 16, stride=size)
        self.proj.load_state_dict({"weight": proj.weight.sum(1, keepdim=True), "bias": proj.bias})

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


def test_original_layout_equals_the_distilled_transformer_of_timm(make_spectrogram):
    """The AST authors' model is timm's DeiT with another patch embedding; its file prefixes the
    names with `module.v.`."""
    deit = timm.create_model(
        "deit_base_distilled_patch16_384",
        **{"embed_dim": 48, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0, "img_size": 48},
    ).eval()
    ast = AST(
        BackboneConfig(embed_dim=48, depth=3, num_heads=4, mlp_ratio=2.0), n_mels=32, n_frames=64
    )
    deit.patch_embed = StridedPatches(deit.patch_embed.proj, (10, 10))
    deit.pos_embed = nn.Parameter(torch.randn_like(ast.pos_embed))
    state = {f"module.v.{k}": v for k, v in deit.state_dict().items()}
    state["module.mlp_head.0.weight"] = torch.zeros(48)
    vit, _ = backbone_of(state, "test")
    load_into(ast, Weights(from_vit(vit), 1e-6, ast.grid, None, "test"))
    x = make_spectrogram(2)
    with torch.no_grad():
        expected = deit.forward_features(x)
        assert (ast.tokens(x) - expected).abs().max() < 1e-4
        assert (ast(x) - expected[:, :2].mean(1)).abs().max() < 1e-4


@pytest.mark.parametrize("n_queries", [None, 2])
def test_attention_equals_the_explicit_softmax(n_queries):
    attention = small_ast(depth=1).blocks[0].attn
    nn.init.normal_(attention.qkv.weight)
    x = torch.randn(2, 9, 48)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    heads = []
    for i in range(4):
        part = slice(12 * i, 12 * (i + 1))
        scores = q[..., part] @ k[..., part].transpose(1, 2) / 12**0.5
        heads.append(torch.softmax(scores, dim=-1) @ v[..., part])
    expected = attention.proj(torch.cat(heads, dim=-1))[:, :n_queries]
    assert torch.allclose(attention(x, n_queries), expected, atol=1e-5)


def test_the_pooled_vector_comes_from_all_tokens_of_the_full_computation(make_spectrogram):
    """The last block is computed for CLS and DIST only; that must change nothing."""
    ast = small_ast(depth=2)
    x = make_spectrogram(2)
    expected = ast.tokens(x)[:, :2].mean(dim=1)
    assert torch.allclose(ast(x), expected, atol=1e-6)


def test_attention_is_fused(make_spectrogram, monkeypatch):
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k)
    )
    small_ast(depth=3)(make_spectrogram(1))
    assert len(calls) == 3


def test_full_size_grid_and_parameter_count():
    with torch.device("meta"):
        ast = AST(BackboneConfig())
    assert ast.grid == (12, 101)
    assert ast.pos_embed.shape == (1, 1214, 768)
    assert sum(p.numel() for p in ast.parameters()) == 86_187_264
    assert {m.eps for m in ast.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_spectrogram_of_another_size_is_refused(make_spectrogram):
    ast = small_ast(depth=1)
    with pytest.raises(ValueError, match="expected"):
        ast(make_spectrogram(1, 64, 32))


def test_gradient_checkpointing_changes_no_gradient(make_model, make_spectrogram, make_metadata):
    gradients = []
    for checkpointing in (False, True):
        model = make_model("ast_tafilm", {"dropout": 0.0}, gradient_checkpointing=checkpointing)
        torch.nn.init.normal_(model.conditioner.generators.weight, std=0.1)
        model.train()
        calls = []
        for block in model.backbone.blocks:
            block.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        out = model(make_spectrogram(2), make_metadata(2))
        out.logits.square().sum().backward()
        assert len(calls) == (6 if checkpointing else 3)  # each block computed twice, or once
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
