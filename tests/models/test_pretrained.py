"""Reading and fitting pretrained weights; nothing is downloaded."""

from __future__ import annotations

import argparse
import os
import zipfile

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import ASTConfig, ASTForAudioClassification

from models import pretrained
from models.ast import AST
from models.config import BackboneConfig
from models.pretrained import AUDIOSET_HUB_NAME, adapt_positions, load_into, read_weights
from utils.common.errors import UserError

TRANSFORMERS = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "num_mel_bins": 32,
    "max_length": 64,
}


@pytest.fixture
def transformers_folder(tmp_path):
    """A small AudioSet-like checkpoint in transformers' layout, and the model it holds."""
    model = ASTForAudioClassification(ASTConfig(**TRANSFORMERS, num_labels=5)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "hub")
    return tmp_path / "hub", model


@pytest.fixture
def original_file(tmp_path):
    """A small file as the AST authors write it (positions of the 128 x 1,024 input, stride 16),
    and the backbone it holds."""
    ast = AST(
        BackboneConfig(
            **{"embed_dim": 48, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0},
            **{"freq_stride": 16, "time_stride": 16},
        )
    )
    state = {f"module.v.{k}": v for k, v in ast.state_dict().items()}
    for name in ("module.v.head.weight", "module.v.head_dist.weight", "module.mlp_head.1.weight"):
        state[name] = torch.zeros(5, 48)
    torch.save(state, tmp_path / "audioset.pth")
    return tmp_path / "audioset.pth", ast


@pytest.mark.parametrize("bare", [False, True])
def test_transformers_folder_gives_the_same_function(
    bare, transformers_folder, make_model, make_spectrogram
):
    folder, source = transformers_folder
    if bare:  # ASTModel instead of ASTForAudioClassification: other prefixes
        source.audio_spectrogram_transformer.save_pretrained(folder)
    model = make_model("ast", weights="audioset", weights_path=str(folder))
    assert model.backbone.norm.eps == 1e-12  # follows the source
    x = make_spectrogram(2)
    with torch.no_grad():
        expected = source.audio_spectrogram_transformer(x[:, 0].transpose(1, 2))
        assert (model.backbone.tokens(x) - expected.last_hidden_state).abs().max() < 1e-4
        assert (model.backbone(x) - expected.pooler_output).abs().max() < 1e-4


def test_names_of_the_published_file_are_understood(transformers_folder):
    """What save_pretrained writes is what the published checkpoint has."""
    keys = load_file(transformers_folder[0] / "model.safetensors").keys()
    prefix = "audio_spectrogram_transformer.encoder.layer.0."
    assert f"{prefix}attention.attention.query.weight" in keys
    assert f"{prefix}intermediate.dense.bias" in keys


def test_original_file_gives_the_same_function(original_file, make_model, make_spectrogram):
    path, source = original_file
    arguments = {"n_mels": 128, "n_frames": 1024, "freq_stride": 16, "time_stride": 16}
    model = make_model("ast", weights="audioset", weights_path=str(path), **arguments)
    assert model.backbone.norm.eps == 1e-6
    x = make_spectrogram(1, 128, 1024)
    with torch.no_grad():
        assert torch.equal(model.backbone.tokens(x), source.tokens(x))


def rename(state, old, new):
    return {new + key.removeprefix(old): value for key, value in state.items()}


WRAPPED = {  # what a file holds, made of the authors' state dictionary
    "module twice": lambda s: rename(s, "", "module."),
    "no module": lambda s: rename(s, "module.", ""),
    "v alone": lambda s: {k.removeprefix("module.v."): t for k, t in s.items() if ".v." in k},
    "Lightning": lambda s: {"epoch": 3, "state_dict": rename(s, "module.", "model.net.")},
    "compiled": lambda s: rename(s, "module.", "_orig_mod."),
    "patch-mix": lambda s: {"model": s, "args": argparse.Namespace(lr=5e-5), "epoch": 3},
    "SSAST": lambda s: {
        **s,
        "module.mask_embed": torch.zeros(1),
        "module.cpred.weight": torch.ones(2),
    },
    "our own": lambda s: {
        **rename({k: t for k, t in s.items() if ".v." in k}, "module.v.", "backbone."),
        "conditioner.gate": torch.zeros(()),
    },
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrapped_files_load_exactly(wrapper, original_file, tmp_path):
    path, source = original_file
    torch.save(WRAPPED[wrapper](torch.load(path)), tmp_path / "wrapped.pth")
    found = read_weights("audioset", str(tmp_path / "wrapped.pth"))
    own = source.state_dict()
    state = {k: t for k, t in found.state.items() if not k.startswith("head")}
    assert found.grid == (8, 64) and state.keys() == own.keys()
    assert all(torch.equal(state[key], own[key]) for key in own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"conv.weight": torch.zeros(2)}, r"holds no vision.*conv\.weight"),
        (lambda s: {**s, "other.cls_token": torch.zeros(1)}, "holds 2 vision"),
        (lambda s: {k: t for k, t in s.items() if "dist" not in k}, "no distillation token"),
        (lambda s: {**s, "module.v.pos_embed": torch.zeros(1, 950, 48)}, "948 patches.*657 .14-14"),
        (
            lambda s: {**s, "module.v.patch_embed.proj.weight": torch.zeros(48, 1, 128, 2)},
            r"patch_embed.proj.weight is \(48, 1, 128, 2\)",  # SSAST's frames
        ),
    ],
)
def test_other_layouts_are_named(change, message, original_file, tmp_path, make_model):
    torch.save(change(torch.load(original_file[0])), tmp_path / "other.pth")
    with pytest.raises(UserError, match=message):
        make_model("ast", weights="audioset", weights_path=str(tmp_path / "other.pth"))


@pytest.mark.parametrize("stride", [10, 12, 14, 16])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_every_stride_of_the_authors_loads_exactly(stride, suffix, tmp_path):
    size = {"embed_dim": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 1.0}
    config = BackboneConfig(**size, freq_stride=stride, time_stride=stride)
    source, path = AST(config), tmp_path / f"audioset{suffix}"
    state = {f"module.v.{k}": v.contiguous() for k, v in source.state_dict().items()}
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    backbone = AST(config)
    load_into(backbone, read_weights("audioset", str(path)))
    own = source.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in backbone.state_dict().items())


@pytest.mark.parametrize("length", [512, 128])  # of the ESC-50 and Speech Commands files
def test_the_authors_files_of_other_lengths_are_named(length, tmp_path, make_model):
    size = {"embed_dim": 48, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0}
    source = AST(BackboneConfig(**size), n_frames=length)
    torch.save({f"module.v.{k}": v for k, v in source.state_dict().items()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"positions for \d+ patches.*1,212 .strides 10-10"):
        make_model("ast", weights="audioset", weights_path=str(tmp_path / "a.pth"))


@pytest.mark.parametrize("strides", [(10, 10), (12, 16), (16, 14)])
@pytest.mark.parametrize("frames", [64, 100])
def test_the_hubs_files_say_their_grid(strides, frames, tmp_path, make_model):
    keys = {"frequency_stride": strides[0], "time_stride": strides[1], "max_length": frames}
    ASTForAudioClassification(ASTConfig(**TRANSFORMERS | keys)).save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"the safetensors come first")
    found = read_weights("audioset", str(tmp_path))
    state = load_file(tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    own = {"freq_stride": strides[0], "time_stride": strides[1], "n_frames": frames}
    arguments = {"weights": "audioset", "weights_path": str(tmp_path), **own}
    backbone = make_model("ast", **arguments).backbone  # from pytorch_model.bin
    assert backbone.grid == found.grid
    positions = state["audio_spectrogram_transformer.embeddings.position_embeddings"]
    assert torch.equal(backbone.pos_embed, positions)


def test_original_file_is_adapted_to_other_inputs(original_file, make_model):
    path, source = original_file
    model = make_model("ast", weights="audioset", weights_path=str(path))  # grid (2, 5)
    cut = source.pos_embed[:, 2:].unflatten(1, (8, 64))[:, 3:5, 30:35].flatten(1, 2)
    assert torch.equal(model.backbone.pos_embed[:, 2:], cut)
    assert torch.equal(model.backbone.pos_embed[:, :2], source.pos_embed[:, :2])


def test_imagenet_file_sums_colours_and_adapts_positions(tmp_path, make_model):
    arguments = {"embed_dim": 48, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0, "img_size": 96}
    deit = timm.create_model("deit_base_distilled_patch16_384", **arguments)
    state = {k: v.contiguous() for k, v in deit.state_dict().items()}
    save_file(state, tmp_path / "deit.safetensors")
    torch.save({"model": state}, tmp_path / "deit.pth")
    for name in ("deit.safetensors", "deit.pth"):
        path = str(tmp_path / name)
        backbone = make_model("ast", weights="imagenet", weights_path=path).backbone
        colours = state["patch_embed.proj.weight"]
        assert backbone.norm.eps == 1e-6
        assert torch.equal(backbone.patch_embed.proj.weight, colours.sum(1, keepdim=True))
        assert torch.equal(backbone.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])
        expected = state["pos_embed"][:, 2:].unflatten(1, (6, 6))[:, 2:4, 1:6].flatten(1, 2)
        assert torch.equal(backbone.pos_embed[:, 2:], expected)


# ---------------------------------------------------------------------- positions


def authors_positions(patches, source, target):
    """The AST authors' adaptation, written after their ast_models.py: time, then frequency."""
    (f0, t0), (f, t) = source, target
    grid = patches.transpose(1, 2).reshape(1, patches.shape[2], f0, t0)
    if t < t0:
        start = int(t0 / 2) - int(t / 2)
        grid = grid[:, :, :, start : start + t]
    else:
        grid = F.interpolate(grid, size=(f0, t), mode="bilinear")
    if f < f0:
        start = int(f0 / 2) - int(f / 2)
        grid = grid[:, :, start : start + f, :]
    else:
        grid = F.interpolate(grid, size=(f, t), mode="bilinear")
    return grid.reshape(1, patches.shape[2], f * t).transpose(1, 2)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((24, 24), (12, 101)),  # ImageNet -> the paper's input
        ((12, 101), (12, 101)),
        ((12, 101), (12, 50)),
        ((12, 101), (7, 133)),
        ((12, 101), (15, 133)),
        ((5, 6), (4, 3)),
    ],
)
def test_positions_follow_the_authors_adaptation(source, target):
    positions = torch.randn(1, 2 + source[0] * source[1], 4)
    out = adapt_positions(positions, source, target)
    assert torch.equal(out[:, :2], positions[:, :2])
    assert torch.allclose(out[:, 2:], authors_positions(positions[:, 2:], source, target))


# ---------------------------------------------------------------------- refusals


def rewrite(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_missing_and_unexpected_keys_are_named(transformers_folder, make_model):
    folder, _ = transformers_folder

    def change(state):
        prefix = "audio_spectrogram_transformer."
        state.pop(f"{prefix}encoder.layer.1.intermediate.dense.bias")
        state[f"{prefix}encoder.layer.1.extra.bias"] = torch.zeros(1)

    rewrite(folder, change)
    with pytest.raises(UserError, match=r"missing.*blocks\.1\.mlp\.fc1\.bias.*layer\.1\.extra"):
        make_model("ast", weights="audioset", weights_path=str(folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 2}, "unexpected key: blocks.2"),
        ({"depth": 4}, "missing key: blocks.3"),
        ({"mlp_ratio": 4.0}, "mlp.fc1.weight is"),
        ({"embed_dim": 96}, "is .*expected"),
        ({"num_heads": 6}, "num_heads: 6.*has 4"),
        ({"patch_size": 8}, "patch_embed.proj.weight is"),
    ],
)
def test_another_architecture_is_refused(arguments, message, transformers_folder, make_model):
    folder, _ = transformers_folder
    with pytest.raises(UserError, match=message):
        make_model("ast", weights="audioset", weights_path=str(folder), **arguments)


def test_the_wrong_layout_is_refused(original_file, transformers_folder, make_model):
    folder, _ = transformers_folder
    with pytest.raises(UserError, match="transformers' layout"):
        make_model("ast", weights="imagenet", weights_path=str(folder / "model.safetensors"))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        make_model("ast", weights="audioset", weights_path=str(folder))


def test_positions_on_an_unknown_grid_are_refused(original_file, make_model):
    path, _ = original_file
    state = torch.load(path, weights_only=True)
    state["module.v.pos_embed"] = state["module.v.pos_embed"][:, :-1]
    torch.save(state, path)
    with pytest.raises(UserError, match="511 patches"):
        make_model("ast", weights="audioset", weights_path=str(path))


def test_broken_and_absent_files_are_refused(tmp_path, transformers_folder, make_model):
    folder, _ = transformers_folder
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="no readable weights file"):
        read_weights("audioset", str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"does not exist.*config\.json and model\.safetensors"):
        read_weights("audioset", str(folder))
    (tmp_path / "x.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match="no readable weights file"):
        read_weights("audioset", str(tmp_path / "x.pth"))
    torch.save([1, 2], tmp_path / "x.pth")
    with pytest.raises(UserError, match="no state dictionary"):
        read_weights("audioset", str(tmp_path / "x.pth"))
    for path in ("nowhere/x.pth", "/nowhere/at/all"):
        with pytest.raises(UserError, match=r"weights_path.*does not exist"):
            read_weights("audioset", path)


FOREIGN = {
    "list": (lambda s: list(s.values()), "but a list; save"),
    "tensor": (lambda s: torch.zeros(3), "but a Tensor; save"),
    "two models": (lambda s: {"student": s, "teacher": s}, r"but 'student' \(dict\), 'teacher'"),
    "numbered": (lambda s: {0: torch.zeros(1), **s}, r"but 0 \(Tensor\)"),
    "escapes": (lambda s: {"\x1b[31m": torch.zeros(1), **s}, r"but '\\x1b\[31m' \(Tensor\)"),
    "sparse": (lambda s: {**s, CLS: s[CLS].to_sparse()}, "no state dictionary of tensors"),
    "no values": (lambda s: {**s, CLS: s[CLS].to("meta")}, "no state dictionary of tensors"),
    "nothing": (lambda s: {}, "its tensors are none"),
    "flat positions": (lambda s: {**s, POSITIONS: s[POSITIONS][0]}, r"pos_embed is \(514, 48\)"),
    "narrow": (
        lambda s: {**s, POSITIONS: s[POSITIONS][..., :8]},
        r"is \(1, 514, 8\), expected \(1",
    ),
    "number": (lambda s: {**s, POSITIONS: torch.zeros(())}, r"pos_embed is \(\), expected"),
}
CLS, POSITIONS = "module.v.cls_token", "module.v.pos_embed"


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_content_is_named(kind, original_file, tmp_path, make_model):
    change, message = FOREIGN[kind]
    torch.save(change(torch.load(original_file[0])), tmp_path / "x.pth")
    with pytest.raises(UserError, match=message) as error:
        make_model("ast", weights="audioset", weights_path=str(tmp_path / "x.pth"))
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_bytes_are_refused(zipped, original_file, tmp_path):
    path, noise = tmp_path / "x.pth", np.random.default_rng(0)
    state = torch.load(original_file[0])
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    end = len(content) if zipped else 3000  # the older form has no checksums
    for number in range(60):
        damaged = bytearray(content[: noise.integers(0, end)] if number % 3 == 0 else content)
        for place in noise.integers(0, max(1, min(end, len(damaged))), 20):
            damaged[place : place + 1] = bytes(noise.integers(0, 256, 1, np.uint8))
        path.write_bytes(damaged)
        try:
            read_weights("audioset", str(path))
        except UserError as error:
            assert "x.pth" in str(error) and str(error).isprintable()
        else:
            assert not zipped, number


def test_what_unpacks_to_more_is_refused_unread(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"0" * 10_000_000)
    with pytest.raises(UserError, match=r"x\.pth is no readable .* unpacks to more than its size"):
        read_weights("audioset", str(tmp_path / "x.pth"))


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"mkdir.*could run code") as error:
        read_weights("audioset", str(tmp_path / "evil.pth"))
    assert "weights_only" not in str(error.value) and "\x1b" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_offline_says_what_to_do(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(UserError) as error:
        read_weights("audioset", AUDIOSET_HUB_NAME)
    message = str(error.value)
    for part in (AUDIOSET_HUB_NAME, "model.safetensors", "backbone.weights_path", "weights=none"):
        assert part in message
    monkeypatch.setattr(timm, "create_model", offline)
    for path in (None, AUDIOSET_HUB_NAME):
        with pytest.raises(UserError, match=r"timm.*backbone\.weights_path"):
            read_weights("imagenet", path)


def test_hub_name_reads_what_the_hub_gives(transformers_folder, make_model, monkeypatch):
    import huggingface_hub

    folder, _ = transformers_folder
    asked = []

    def download(repository, name):
        asked.append((repository, name))
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    make_model("ast", weights="audioset", weights_path="someone/some-ast")
    assert asked == [("someone/some-ast", n) for n in ("config.json", "model.safetensors")]


def test_weights_are_fetched_ahead(transformers_folder, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    folder, _ = transformers_folder
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, name: str(folder / name))
    monkeypatch.setattr("sys.argv", ["pretrained", "--download", str(tmp_path / "weights")])
    assert pretrained.main() == 0
    assert capsys.readouterr().out == f"set backbone.weights_path={tmp_path / 'weights'}\n"
    assert read_weights("audioset", str(tmp_path / "weights")) is not None


def test_none_reads_nothing():
    assert read_weights("none", "nowhere/x.pth") is None
