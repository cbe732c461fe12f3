"""A checkpoint as a folder in the hub's layout: nothing in it can run code.

model.safetensors   weights
config.json         all other fields of the `Checkpoint`
README.md           model card
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from utils.common.errors import UserError
from utils.common.files import atomic_write, write_json

WEIGHTS, CONFIG = FILES = ("model.safetensors", "config.json")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MAX_CONFIG = 64_000_000  # bytes; a real one has some hundred thousand


def write_folder(folder: Path, content: dict[str, Any]) -> None:
    """Write weights and configuration of a checkpoint's content.

    Raises:
        UserError: the folder cannot be written.
    """
    rest = dict(content)
    weights = {name: value.contiguous().clone() for name, value in rest.pop("weights").items()}
    size = sum(value.numel() * value.element_size() for value in weights.values())
    with atomic_write(folder / WEIGHTS, needed_bytes=size) as file:
        file.write(save(weights, metadata={"format": "pt"}))
    write_json(folder / CONFIG, rest)


def read_folder(folder: Path) -> dict[str, Any]:
    """What `write_folder` wrote.

    Raises:
        UserError: a file is missing, foreign or damaged.
    """
    try:
        if (folder / CONFIG).stat().st_size > MAX_CONFIG:
            raise ValueError(f"{CONFIG} is too large")
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{CONFIG} holds no fields")
        content["weights"] = load_file(folder / WEIGHTS)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(
            f"{folder} cannot be read as a shared model ({reason}); it needs "
            f"{' and '.join(FILES)}, as `python -m utils.share` writes them"
        ) from None
    if content.get("score") is None:  # JSON has no NaN
        content["score"] = float("nan")
    for name in ("thresholds", "pos_weight"):
        if isinstance(content.get(name), list):
            content[name] = tuple(content[name])
    return content


def located(path: str | Path) -> Path:
    """The file or shared folder that --checkpoint names: of a run's folder its best.pt; a hub's
    USER/NAME is downloaded first.

    Raises:
        UserError: the hub does not give it.
    """
    best = Path(path) / "checkpoints" / "best.pt"
    if best.is_file():
        return best
    if Path(path).exists() or not HUB_NAME.fullmatch(str(path)) or Path(path).suffix == ".pt":
        return Path(path)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        weights, _ = (Path(hf_hub_download(str(path), name)) for name in FILES)
        return weights.parent
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"no checkpoint {path}: there is no such file or folder, and the Hugging Face hub does "
            f"not give it ({type(error).__name__}); on a machine with a network, download its "
            f"{' and '.join(FILES)} and name their folder"
        ) from error
