"""Pretrained weights -> our backbone: AudioSet (two layouts), ImageNet through timm, or none.

Sources: the transformers checkpoint MIT/ast-finetuned-audioset-10-10-0.4593, the AST authors'
audioset_10_10_0.4593.pth, and timm's DeiT. Only safetensors files and `torch.load` with
`weights_only=True` are opened. A file that does not fit is refused; nothing is loaded in part.
"""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.ast import AST, N_SPECIAL, grid_size
from utils.common.errors import UserError

AUDIOSET_HUB_NAME = "MIT/ast-finetuned-audioset-10-10-0.4593"
IMAGENET_TIMM_NAME = "deit_base_distilled_patch16_384"
HUB_FILES = ("config.json", "model.safetensors")
#: spectrogram that the authors' AudioSet checkpoints were trained on, bands x frames
AUDIOSET_INPUT = (128, 1024)

State = dict[str, Tensor]


@dataclass
class Weights:
    """A backbone's weights under our names, as they lie in the source.

    Attributes:
        state: name -> tensor; positions and patch projection as in the source.
        layer_norm_eps: of the source.
        grid: patch grid (f, t) of the source's positions; None: not told by the source.
        num_heads: of the source; None: not told by the source.
        source: file or name, for messages.
    """

    state: State
    layer_norm_eps: float
    grid: tuple[int, int] | None
    num_heads: int | None
    source: str


# ---------------------------------------------------------------------- names

_TRANSFORMERS_TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
#: inside a block; files carry the first of two names, transformers 5 has the second in memory
_TRANSFORMERS_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "attention.q_proj": "attn.q",
    "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def from_transformers(state: State) -> State:
    """Names of `ASTModel` or `ASTForAudioClassification` -> ours; q, k and v are fused.

    The classifier is left out; a name that is not understood stays as it is.
    """
    out: State = {}
    for key, value in state.items():
        name = key.removeprefix("audio_spectrogram_transformer.")
        if name.startswith("classifier."):
            continue
        out[_transformers_name(name) or key] = value
    for name in [n for n in out if re.fullmatch(r"blocks\.\d+\.attn\.q\.(weight|bias)", n)]:
        parts = [name.replace(".q.", f".{part}.") for part in "qkv"]
        if all(part in out for part in parts):
            out[name.replace(".q.", ".qkv.")] = torch.cat([out.pop(part) for part in parts])
    return out


def _transformers_name(name: str) -> str | None:
    if name in _TRANSFORMERS_TOP:
        return _TRANSFORMERS_TOP[name]
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if stem in _TRANSFORMERS_TOP:
        return f"{_TRANSFORMERS_TOP[stem]}.{kind}"
    match = re.fullmatch(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)", stem)
    if match and match[2] in _TRANSFORMERS_BLOCK:
        return f"blocks.{match[1]}.{_TRANSFORMERS_BLOCK[match[2]]}.{kind}"
    return None


def from_original(state: State) -> State:
    """Names of the AST authors' files (`module.v.*`) -> ours, without any classifier."""
    out = {}
    for key, value in state.items():
        name = key.removeprefix("module.")
        if name.startswith(("mlp_head.", "v.head.", "v.head_dist.")):
            continue
        out[name[2:] if name.startswith("v.") else key] = value
    return out


def from_timm(state: State) -> State:
    """timm's distilled vision transformer -> ours: patch weights summed over RGB, no classifier."""
    out = {k: v for k, v in state.items() if not k.startswith(("head.", "head_dist."))}
    patch = out.get("patch_embed.proj.weight")
    if patch is not None and patch.ndim == 4:
        out["patch_embed.proj.weight"] = patch.sum(dim=1, keepdim=True)
    return out


# ---------------------------------------------------------------------- reading


def read_weights(weights: str, weights_path: str | None) -> Weights | None:
    """Read pretrained weights under our names; None for `weights` = none.

    Args:
        weights: audioset | imagenet | none.
        weights_path: audioset: a name on the Hugging Face hub, a local folder or .safetensors
            file in transformers' layout (config.json beside it), or a .pth file of the AST
            authors; imagenet: a local file in timm's layout, or None (or the name of the AudioSet
            default) for timm's own download.

    Raises:
        UserError: with what to download, where to put it and which key to set.
    """
    if weights == "none":
        return None
    if weights == "imagenet":
        path = None if weights_path in (None, AUDIOSET_HUB_NAME) else weights_path
        return _read_imagenet(path)
    if weights != "audioset":
        raise UserError(f"backbone.weights: {weights!r} is not known; audioset, imagenet or none")
    if not weights_path:
        raise UserError(
            "backbone.weights_path: empty, but backbone.weights is audioset; set it to "
            f"{AUDIOSET_HUB_NAME}, a local folder or a .pth file, or set backbone.weights=none"
        )
    path = Path(weights_path).expanduser()
    if path.is_dir():
        return _read_transformers(path / HUB_FILES[0], path / HUB_FILES[1], str(path))
    if path.is_file() and path.suffix == ".safetensors":
        return _read_transformers(path.parent / HUB_FILES[0], path, str(path))
    if path.is_file():
        return _read_original(path)
    if path.suffix in (".pth", ".pt", ".safetensors") or not re.fullmatch(
        r"[\w.-]+/[\w.-]+", weights_path
    ):
        raise UserError(
            f"backbone.weights_path: {weights_path} does not exist; give a local folder or file, "
            f"the hub name {AUDIOSET_HUB_NAME}, or set backbone.weights=none"
        )
    config, tensors = (_download(weights_path, name) for name in HUB_FILES)
    return _read_transformers(config, tensors, weights_path)


def _download(repository: str, name: str) -> Path:
    """One file of a hub repository, from the local cache if it is there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(repository, name))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"backbone.weights_path: {name} of {repository} can not be had from the Hugging Face "
            f"hub ({type(error).__name__}). On a machine with a network, download "
            f"{' and '.join(HUB_FILES)} from https://huggingface.co/{repository}, put them into "
            "one folder and set backbone.weights_path to it; or train from random weights with "
            "backbone.weights=none"
        ) from error


def _tensors(path: Path) -> State:
    """A file's tensors, without running any code that it may hold."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"backbone.weights_path: {path} does not exist; the folder must hold "
            f"{' and '.join(HUB_FILES)}"
        ) from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise UserError(
            f"backbone.weights_path: {path} is no readable weights file "
            f"({str(error).splitlines()[0]}); download it again"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]  # DeiT's own files
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"backbone.weights_path: {path} holds no state dictionary of tensors")
    return state


def _read_transformers(config_path: Path, tensors_path: Path, source: str) -> Weights:
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        grid = (
            grid_size(config["num_mel_bins"], config["patch_size"], config["frequency_stride"]),
            grid_size(config["max_length"], config["patch_size"], config["time_stride"]),
        )
        eps, heads = float(config["layer_norm_eps"]), int(config["num_attention_heads"])
        act = config["hidden_act"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"backbone.weights_path: {config_path} can not be read as the configuration of a "
            f"transformers AST ({type(error).__name__}: {error}); the folder must hold "
            f"{' and '.join(HUB_FILES)}"
        ) from error
    if act != "gelu":
        raise UserError(f"backbone.weights_path: {source} has hidden_act {act!r}, ours is gelu")
    return Weights(from_transformers(_tensors(tensors_path)), eps, grid, heads, source)


def _read_original(path: Path) -> Weights:
    state = from_original(_tensors(path))
    return Weights(state, 1e-6, _audioset_grid(state), None, str(path))


def _audioset_grid(state: State) -> tuple[int, int] | None:
    """The authors' files do not tell their stride (equal in both directions): it follows from the
    number of positions and the 128 x 1,024 input."""
    positions, patch = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    if positions is None or patch is None or positions.ndim != 3 or patch.ndim != 4:
        return None
    size = patch.shape[-1]
    for stride in range(1, size + 1):
        f, t = (grid_size(side, size, stride) for side in AUDIOSET_INPUT)
        if f * t == positions.shape[1] - N_SPECIAL:
            return f, t
    return None


def _read_imagenet(path: str | None) -> Weights:
    if path is None:
        state, source = _timm_download(), f"timm/{IMAGENET_TIMM_NAME}"
    else:
        state, source = _tensors(Path(path).expanduser()), path
    state = from_timm(state)
    grid = None
    if "pos_embed" in state and state["pos_embed"].ndim == 3:
        side = round((state["pos_embed"].shape[1] - N_SPECIAL) ** 0.5)
        grid = (side, side)
    return Weights(state, 1e-6, grid, None, source)


def _timm_download() -> State:
    import timm

    try:
        return timm.create_model(IMAGENET_TIMM_NAME, pretrained=True).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"backbone.weights: imagenet, but timm can not download {IMAGENET_TIMM_NAME} "
            f"({type(error).__name__}). On a machine with a network, download model.safetensors "
            f"from https://huggingface.co/timm/{IMAGENET_TIMM_NAME}.fb_in1k and set "
            "backbone.weights_path to the file; or train from random weights with "
            "backbone.weights=none"
        ) from error


# ---------------------------------------------------------------------- loading


def adapt_positions(positions: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Positions [1, 2 + f t, D] of one patch grid -> of another.

    Per axis, time first, as in the AST authors' code: cut centrally where the target is shorter,
    interpolated bilinearly where it is longer. The two special tokens keep theirs.
    """
    if source == target:
        return positions
    special, patches = positions[:, :N_SPECIAL], positions[:, N_SPECIAL:]
    grid = patches.transpose(1, 2).unflatten(2, source)  # [1, D, f, t]
    for axis in (3, 2):
        old, new = grid.shape[axis], target[axis - 2]
        if new < old:
            grid = grid.narrow(axis, old // 2 - new // 2, new)
        elif new > old:
            size = (grid.shape[2], new) if axis == 3 else (new, grid.shape[3])
            grid = F.interpolate(grid, size=size, mode="bilinear")
    return torch.cat([special, grid.flatten(2).transpose(1, 2)], dim=1)


def load_into(backbone: AST, weights: Weights) -> None:
    """Copy all weights into the backbone, positions adapted to its patch grid.

    Raises:
        UserError: if the file does not fit: names the first missing and first unexpected key, or
            the first tensor of another shape. The backbone is then unchanged.
    """
    state, own = dict(weights.state), backbone.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    if missing or unexpected:
        raise UserError(
            f"backbone.weights_path: {weights.source} does not fit the backbone; first missing "
            f"key: {missing[0] if missing else 'none'}, first unexpected key: "
            f"{unexpected[0] if unexpected else 'none'} ({len(missing)} and {len(unexpected)} in "
            "all); use the layout that backbone.weights says and check backbone.depth"
        )
    heads = backbone.blocks[0].attn.num_heads if backbone.depth else None
    if weights.num_heads not in (None, heads):
        raise UserError(
            f"backbone.num_heads: {heads}, but {weights.source} has {weights.num_heads} heads"
        )
    grid, n_positions = weights.grid, state["pos_embed"].shape[1]
    if grid is None and n_positions == own["pos_embed"].shape[1]:
        grid = backbone.grid
    if grid is None or grid[0] * grid[1] + N_SPECIAL != n_positions:
        raise UserError(
            f"backbone.weights_path: {weights.source} has positions for {n_positions - N_SPECIAL} "
            "patches, and what grid they lie on is not known; use one of the published files"
        )
    state["pos_embed"] = adapt_positions(state["pos_embed"], grid, backbone.grid)
    for key, value in own.items():
        if value.shape != state[key].shape:
            raise UserError(
                f"backbone.weights_path: {weights.source} does not fit the backbone: {key} is "
                f"{tuple(state[key].shape)}, expected {tuple(value.shape)}; check "
                "backbone.embed_dim, mlp_ratio and patch_size"
            )
    backbone.load_state_dict(state)
