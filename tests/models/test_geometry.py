"""Patches of any shape: grids, and pretrained weights of another patch size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import ASTConfig, ASTForAudioClassification

from models.ast import AST
from models.config import BackboneConfig
from models.pretrained import adapt_positions, resize_kernel
from utils.common.errors import UserError
from utils.config.schema import config_from_dict, config_hash

VIEWS = ([16, 16], [32, 8], [64, 4], [128, 2], [256, 1])  # MVST's, on 256 x 1,024
TINY = {"embed_dim": 48, "depth": 1, "num_heads": 4, "mlp_ratio": 2.0}


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory):
    """A small checkpoint of the layout and geometry of MIT/ast-finetuned-audioset-16-16-0.442."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    strides = {"frequency_stride": 16, "time_stride": 16, "num_mel_bins": 128, "max_length": 1024}
    source = ASTForAudioClassification(ASTConfig(**sizes, **strides, intermediate_size=96)).eval()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("16-16")
    source.save_pretrained(folder)
    return str(folder), source.audio_spectrogram_transformer


def loaded(make_model, folder, **keys):
    return make_model("ast", weights="audioset", weights_path=folder, **{**TINY, **keys}).backbone


@pytest.mark.parametrize("patch", VIEWS)
def test_every_view_has_1024_tokens(patch):
    config = BackboneConfig(**TINY, patch_size=patch, freq_stride=patch[0], time_stride=patch[1])
    ast = AST(config, n_mels=256, n_frames=1024)
    assert ast.n_patches == 1024 and ast.grid == (256 // patch[0], 1024 // patch[1])
    assert ast.patch_embed(torch.zeros(1, 1, 256, 1024)).shape == (1, 1024, 48)


def test_one_number_is_a_square_patch():
    square, pair = (BackboneConfig(**TINY, patch_size=size) for size in (16, [16, 16]))
    assert square.patch == pair.patch == (16, 16)
    for wrong in ([16], [16, 16, 16], "wide", 2.5):
        with pytest.raises(UserError, match=r"patch_size=.*\[bands, frames\]"):
            _ = BackboneConfig(patch_size=wrong).patch


def test_the_16_16_checkpoint_gives_its_function(sixteen, make_model, make_spectrogram):
    folder, source = sixteen
    sizes = {"freq_stride": 16, "time_stride": 16, "n_mels": 128, "n_frames": 1024}
    backbone = loaded(make_model, folder, **sizes)
    x = make_spectrogram(1, 128, 1024)
    with torch.no_grad():
        expected = source(x[:, 0].transpose(1, 2)).pooler_output
        assert (backbone(x) - expected).abs().max() < 1e-4


def test_equal_patches_stay_as_they_are(sixteen, make_model):
    folder, _ = sixteen
    sizes = {"freq_stride": 16, "time_stride": 16, "n_mels": 128, "n_frames": 1024}
    plain = loaded(make_model, folder, **sizes).state_dict()
    asked = loaded(make_model, folder, **sizes, patch_size=[16, 16], patch_init="resize")
    assert all(torch.equal(plain[key], value) for key, value in asked.state_dict().items())


@pytest.mark.parametrize("patch", VIEWS[1:])
def test_resize_keeps_the_answer_to_a_constant(patch):
    kernel = torch.randn(5, 1, 16, 16, dtype=torch.float64)
    constant = torch.full((1, 1, 256, 64), 0.7, dtype=torch.float64)
    before = F.conv2d(constant, kernel, stride=16)[0, :, 0, 0]
    after = F.conv2d(constant, resize_kernel(kernel, tuple(patch)), stride=patch)[0, :, 0, 0]
    assert torch.allclose(before, after)


def test_resize_follows_the_kernel():
    """A ramp over the bands stays a ramp over twice as many, at half the weight each."""
    ramp = torch.linspace(-1, 1, 16).view(1, 1, 16, 1).expand(1, 1, 16, 4)
    out = resize_kernel(ramp, (32, 4))[0, 0, :, 0]
    assert torch.allclose(out[1:-1], (torch.arange(1, 31) / 2 - 0.25 - 7.5) / 15, atol=1e-6)


@pytest.mark.parametrize("init", ["random", "resize"])
def test_other_patches_take_the_rest_exactly(init, sixteen, make_model):
    folder, source = sixteen
    sizes = {"n_mels": 256, "n_frames": 1024, "freq_stride": 64, "time_stride": 4}
    ast = loaded(make_model, folder, **sizes, patch_size=[64, 4], patch_init=init)
    embed = source.embeddings
    positions = adapt_positions(embed.position_embeddings, (8, 64), (4, 256), same_patches=False)
    assert torch.equal(ast.pos_embed, positions)
    projection = embed.patch_embeddings.projection
    assert torch.equal(ast.patch_embed.proj.bias, projection.bias)
    resized = resize_kernel(projection.weight, (64, 4))
    assert torch.equal(ast.patch_embed.proj.weight, resized) == (init == "resize")
    assert torch.equal(ast.norm.weight, source.layernorm.weight)


def test_other_patches_are_refused_unless_asked_for(sixteen, make_model):
    with pytest.raises(UserError, match=r"set backbone\.patch_init"):
        loaded(make_model, sixteen[0], patch_size=[8, 32])


def test_positions_shrink_where_patches_grow():
    """On both axes the whole extent is kept, not its centre."""
    f, t = (torch.linspace(0, 1, n) for n in (8, 64))
    grid = torch.stack([f[:, None].expand(8, 64), t.expand(8, 64)])  # [2, f, t]
    positions = torch.cat([torch.zeros(1, 2, 2), grid.flatten(1).t()[None]], dim=1)
    out = adapt_positions(positions, (8, 64), (4, 16), same_patches=False)[0, 2:]
    out = out.t().unflatten(1, (4, 16))
    assert out[0, :, 0].min() < 0.15 and out[0, :, 0].max() > 0.85
    assert out[1, 0].min() < 0.05 and out[1, 0].max() > 0.95
    cut = adapt_positions(positions, (8, 64), (4, 16))[0, 2:].t().unflatten(1, (4, 16))
    assert cut[1, 0].min() > 0.3  # of equal patches the centre


def test_geometry_keys_leave_old_hashes(tmp_path):
    def named(**keys):
        values = {"models": {"ast": {}}, "dataset": {"data_folder": "x"}}
        return config_hash(config_from_dict(values | keys))

    assert named() == "5cd6b796"
    assert named(audio={"n_mels": 64}) != named()
    assert named(backbone={"patch_init": "resize"}) != named()
    assert named(backbone={"patch_size": [16, 8]}) != named()
