"""Pretrained weights -> our backbone: AudioSet (two layouts), ImageNet through timm, or none.

Sources: the transformers checkpoints MIT/ast-finetuned-audioset-10-10-0.4593 and -16-16-0.442, the
AST authors' audioset_10_10_0.4593.pth, and timm's DeiT. Only safetensors files and `torch.load`
with `weights_only=True` are opened. A file that does not fit is refused; nothing is loaded in part.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from models.ast import AST, N_SPECIAL, grid_size
from utils.common.archives import check_archive
from utils.common.cli import command
from utils.common.errors import UserError

AUDIOSET_HUB_NAME = "MIT/ast-finetuned-audioset-10-10-0.4593"
IMAGENET_TIMM_NAME = "deit_base_distilled_patch16_384"
HUB_FILES = ("config.json", "model.safetensors")
#: spectrogram that the authors' AudioSet checkpoints were trained on, bands x frames
AUDIOSET_INPUT = (128, 1024)

#: What people's files put around a state dictionary: DeiT's, Lightning's and others'.
WRAPPERS = {"model", "state_dict", "model_state_dict"}

State = dict[str, Tensor]


@dataclass
class Weights:
    """A backbone's weights under our names, as they lie in the source."""

    state: State  # positions and patch projection as in the source
    layer_norm_eps: float
    grid: tuple[int, int] | None  # patches (f, t) of the positions; None: unknown
    num_heads: int | None  # None: unknown
    source: str  # file or name, for messages


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
    **{f"attention.attention.{n}": f"attn.{n[0]}" for n in ("query", "key", "value")},
    **{f"attention.{n}_proj": f"attn.{n}" for n in "qkv"},
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def from_transformers(state: State) -> State:
    """Names of `ASTModel` or `ASTForAudioClassification` -> ours; q, k and v are fused.

    The classifier is left out; a name that is not understood stays as it is.
    """
    kept = {k: v for k, v in state.items() if not k.startswith("classifier.")}
    out: State = {_transformers_name(key) or key: value for key, value in kept.items()}
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


def from_vit(state: State) -> State:
    """timm's distilled vision transformer, which the AST authors' `v` is too -> ours, without the
    classifiers; patch weights of a colour image are summed over RGB."""
    out = {k: v for k, v in state.items() if not k.startswith(("head.", "head_dist."))}
    patch = out.get("patch_embed.proj.weight")
    if patch is not None and patch.ndim == 4 and patch.shape[1] == 3:
        out["patch_embed.proj.weight"] = patch.sum(dim=1, keepdim=True)
    return out


def backbone_of(state: State, source: str) -> tuple[State, bool]:
    """The transformer's part of a model's state, without what wrappers put before the names
    (`module.`, `model.`, `_orig_mod.`, `v.`), and whether it is in transformers' layout.

    Classifiers, decoders and losses lie outside it and are left out.

    Raises:
        UserError: there is none.
    """
    found = [key for key in state if key.rpartition(".")[2] == "cls_token"]
    if len(found) != 1:
        some = ", ".join(sorted(state)[:3])
        raise UserError(
            f"backbone.weights_path: {source} holds {len(found) or 'no'} vision transformers "
            f"(cls_token); its tensors are {some or 'none'}; give an AST, SSAST or DeiT file"
        )
    root = found[0].removesuffix("cls_token")
    hub = root.endswith("embeddings.")
    root = root.removesuffix("embeddings.")
    inside = {k.removeprefix(root): v for k, v in state.items() if k.startswith(root)}
    return inside, hub


# ---------------------------------------------------------------------- reading


def read_weights(weights: str, weights_path: str | None) -> Weights | None:
    """Read pretrained weights under our names; None for `weights` = none.

    Args:
        weights: audioset | imagenet | none.
        weights_path: audioset: a name on the Hugging Face hub, a local folder or file in
            transformers' layout (config.json next to it), or a .pth file of the AST authors;
            imagenet: a local file in timm's layout, or None (or the name of the AudioSet
            default) for timm's own download.

    Raises:
        UserError: with what to download, where to put it and which key to set.
    """
    if weights == "none":
        return None
    if weights == "imagenet":
        path = None if weights_path in (None, AUDIOSET_HUB_NAME) else weights_path
        return _read_imagenet(path)
    path = Path(weights_path)
    if path.is_dir():
        files = (path / name for name in (HUB_FILES[1], "pytorch_model.bin"))
        return _read_audioset(next((f for f in files if f.is_file()), path / HUB_FILES[1]))
    if path.is_file():
        return _read_audioset(path)
    if path.suffix in (".pth", ".pt", ".bin", ".safetensors") or not re.fullmatch(
        r"[\w.-]+/[\w.-]+", weights_path
    ):
        raise UserError(
            f"backbone.weights_path: {weights_path} does not exist; give a local folder or file, "
            f"the hub name {AUDIOSET_HUB_NAME}, or set backbone.weights=none"
        )
    config, tensors = (_download(weights_path, name) for name in HUB_FILES)
    state, _ = backbone_of(_tensors(tensors), weights_path)
    return _read_transformers(config, state, weights_path)


def _download(repository: str, name: str) -> Path:
    """One file of a hub repository, from the local cache if it is there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(repository, name))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"backbone.weights_path: {name} of {repository} cannot be had from the Hugging Face "
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
        check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # options, in many a file
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"backbone.weights_path: {path} does not exist; the folder must hold "
            f"{' and '.join(HUB_FILES)}"
        ) from None
    except Exception as error:  # damaged bytes can break the readers in any way
        # torch's own advice, to open it all the same, is for files that one has written oneself
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"backbone.weights_path: {path} holds a Python object ({found[1]}) that could run "
                "code and is not opened; save the tensors alone, as state_dict() gives them"
            ) from None
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise UserError(
            f"backbone.weights_path: {path} is no readable weights file ({reason}); it may be cut "
            "off: download it again"
        ) from error
    while isinstance(state, dict) and (inner := WRAPPERS & state.keys()):
        state = state[inner.pop()]
    if not isinstance(state, dict) or not all(map(_is_plain, state, state.values())):
        holds = f"a {type(state).__name__}"
        if isinstance(state, dict):
            holds = ", ".join(f"{k!r:.40} ({type(v).__name__})" for k, v in list(state.items())[:3])
        raise UserError(
            f"backbone.weights_path: {path} holds no state dictionary of tensors, but {holds}; "
            "save model.state_dict() alone"
        )
    return state


def _is_plain(name: Any, value: Any) -> bool:
    dense = isinstance(value, Tensor) and value.layout == torch.strided
    named = isinstance(name, str) and name.isprintable()
    return named and dense and value.device.type == "cpu"


def _read_audioset(path: Path) -> Weights:
    """A local file of transformers (its config.json next to it) or of the AST authors."""
    state, hub = backbone_of(_tensors(path), str(path))
    if hub:
        return _read_transformers(path.parent / HUB_FILES[0], state, str(path))
    state = from_vit(state)
    return Weights(state, 1e-6, _audioset_grid(state), None, str(path))


def _read_transformers(config_path: Path, state: State, source: str) -> Weights:
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        grid = (
            grid_size(config["num_mel_bins"], config["patch_size"], config["frequency_stride"]),
            grid_size(config["max_length"], config["patch_size"], config["time_stride"]),
        )
        eps, heads = float(config["layer_norm_eps"]), int(config["num_attention_heads"])
        act = config["hidden_act"]
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        raise UserError(
            f"backbone.weights_path: {config_path} cannot be read as the configuration of a "
            f"transformers AST ({type(error).__name__}: {error}); it must lie next to "
            f"{HUB_FILES[1]}"
        ) from error
    if act != "gelu":
        raise UserError(f"backbone.weights_path: {source} has hidden_act {act!r}, ours is gelu")
    return Weights(from_transformers(state), eps, grid, heads, source)


def _audioset_grid(state: State) -> tuple[int, int] | None:
    """The authors' files do not say their stride (equal in both directions): it follows from the
    number of positions and the 128 x 1,024 input."""
    positions, patch = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    if positions is None or patch is None or positions.ndim != 3 or patch.ndim != 4:
        return None
    size = patch.shape[-1]
    if size != patch.shape[-2]:
        return None
    for stride in range(1, size + 1):
        f, t = (grid_size(side, size, stride) for side in AUDIOSET_INPUT)
        if f * t == positions.shape[1] - N_SPECIAL:
            return f, t
    return None


def _read_imagenet(path: str | None) -> Weights:
    if path is None:
        state, source = _timm_download(), f"timm/{IMAGENET_TIMM_NAME}"
    else:
        state, source = _tensors(Path(path)), path
    state, hub = backbone_of(state, source)
    if hub:
        raise UserError(f"backbone.weights: imagenet, but {source} has transformers' layout")
    state = from_vit(state)
    grid = None
    if "pos_embed" in state and state["pos_embed"].ndim == 3:
        side = round(max(0, state["pos_embed"].shape[1] - N_SPECIAL) ** 0.5)
        grid = (side, side)
    return Weights(state, 1e-6, grid, None, source)


def _timm_download() -> State:
    import timm

    try:
        return timm.create_model(IMAGENET_TIMM_NAME, pretrained=True).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"backbone.weights: imagenet, but timm cannot download {IMAGENET_TIMM_NAME} "
            f"({type(error).__name__}). On a machine with a network, download model.safetensors "
            f"from https://huggingface.co/timm/{IMAGENET_TIMM_NAME}.fb_in1k and set "
            "backbone.weights_path to the file; or train from random weights with "
            "backbone.weights=none"
        ) from error


# ---------------------------------------------------------------------- loading


def adapt_positions(
    positions: Tensor,
    source: tuple[int, int],
    target: tuple[int, int],
    *,
    same_patches: bool = True,
) -> Tensor:
    """Positions [1, 2 + f t, D] of one patch grid -> of another.

    Per axis, time first, as in the AST authors' code: cut centrally where the target is shorter,
    interpolated bilinearly where it is longer. The two special tokens keep theirs.

    same_patches: False where the grids' patches have different sizes: a shorter axis then covers
        the same extent with larger patches, and is interpolated as well.
    """
    if source == target:
        return positions
    special, patches = positions[:, :N_SPECIAL], positions[:, N_SPECIAL:]
    grid = patches.transpose(1, 2).unflatten(2, source)  # [1, D, f, t]
    if not same_patches:
        grid = F.interpolate(grid, size=target, mode="bilinear", antialias=True)
    for axis in (3, 2):
        old, new = grid.shape[axis], target[axis - 2]
        if new < old:
            grid = grid.narrow(axis, old // 2 - new // 2, new)
        elif new > old:
            size = (grid.shape[2], new) if axis == 3 else (new, grid.shape[3])
            grid = F.interpolate(grid, size=size, mode="bilinear")
    return torch.cat([special, grid.flatten(2).transpose(1, 2)], dim=1)


def resize_kernel(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """Patch projection [D, 1, f, t] -> [D, 1, *size], resampled bilinearly and scaled so that every
    constant spectrogram gives what it gave."""
    out = F.interpolate(kernel, size=size, mode="bilinear", antialias=True)
    out = out * (kernel[0].numel() / out[0].numel())
    # resampling weighs a kernel's rim differently
    missing = kernel.sum((2, 3), keepdim=True) - out.sum((2, 3), keepdim=True)
    return out + missing / out[0].numel()


def load_into(backbone: AST, weights: Weights, patch_init: str | None = None) -> None:
    """Copy all weights into the backbone, positions adapted to its patch grid.

    patch_init: of the projection where the source's patches have another size: random (torch's
        start; the bias is copied), resize (`resize_kernel`), or None (refused).

    Raises:
        UserError: if the file does not fit: names the first missing and first unexpected key, or
            the first tensor of another shape. The backbone is then unchanged.
    """
    state, own = dict(weights.state), backbone.state_dict()
    where = f"backbone.weights_path: {weights.source}"
    if "dist_token" not in state:
        raise UserError(f"{where} has no distillation token, so it is no AST, SSAST or DeiT")
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    if missing or unexpected:
        depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
        remedy = f"it has {depth} blocks: set backbone.depth={depth}"
        if depth == backbone.depth:
            remedy = "it is no AST, SSAST or DeiT"
        raise UserError(
            f"{where} does not fit the backbone; first missing key: "
            f"{missing[0] if missing else 'none'}, first unexpected key: "
            f"{unexpected[0] if unexpected else 'none'} ({len(missing)} and {len(unexpected)} in "
            f"all); {remedy}"
        )
    projection = "patch_embed.proj.weight"
    patch, kernel = own[projection].shape[-2:], state[projection]
    same_patches = kernel.ndim != 4 or kernel.shape[-2:] == patch
    if not same_patches and patch_init:
        random = patch_init == "random"
        state[projection] = own[projection] if random else resize_kernel(kernel, patch)
    for key, value in own.items():
        if key != "pos_embed" and value.shape != state[key].shape:
            raise UserError(
                f"{where} does not fit the backbone: {key} is {tuple(state[key].shape)}, expected "
                f"{tuple(value.shape)}; check backbone.embed_dim, mlp_ratio and patch_size (of "
                "another patch size: set backbone.patch_init)"
            )
    positions, expected = state["pos_embed"].shape, own["pos_embed"].shape
    if len(positions) != 3 or positions[::2] != expected[::2]:
        raise UserError(
            f"{where} does not fit the backbone: pos_embed is {tuple(positions)}, expected "
            f"(1, positions, {expected[2]}); check backbone.embed_dim"
        )
    heads = backbone.blocks[0].attn.num_heads if backbone.depth else None
    if weights.num_heads not in (None, heads):
        raise UserError(
            f"backbone.num_heads: {heads}, but {weights.source} has {weights.num_heads} heads"
        )
    grid, n_positions = weights.grid, state["pos_embed"].shape[1]
    if grid is None and same_patches and n_positions == own["pos_embed"].shape[1]:
        grid = backbone.grid
    if grid is None or grid[0] * grid[1] + N_SPECIAL != n_positions:
        raise UserError(
            f"{where} has positions for {n_positions - N_SPECIAL} patches, and what grid they lie "
            "on is not known; the AST authors' AudioSet files have 1,212 (strides 10-10), 850 "
            "(12-12), 657 (14-14) or 512 (16-16)"
        )
    state["pos_embed"] = adapt_positions(
        state["pos_embed"], grid, backbone.grid, same_patches=same_patches
    )
    backbone.load_state_dict(state)


@command
def main() -> None:
    parser = argparse.ArgumentParser("python -m models.pretrained", description=__doc__)
    fetch = "fetch the AudioSet checkpoint into DIR, for machines without a network"
    parser.add_argument("--download", metavar="DIR", type=Path, required=True, help=fetch)
    parser.add_argument("--name", default=AUDIOSET_HUB_NAME, help="on the Hugging Face hub")
    options = parser.parse_args()
    options.download.mkdir(parents=True, exist_ok=True)
    for name in HUB_FILES:
        shutil.copyfile(_download(options.name, name), options.download / name)
    print(f"set backbone.weights_path={options.download}")


if __name__ == "__main__":
    raise SystemExit(main())
