"""Checkpoints: written whole or not at all, read without executing anything.

A model checkpoint (`Checkpoint`) is all that evaluation, figures and prediction need beside the
data. The training state is what resuming needs; it never leaves its run folder.
"""

from __future__ import annotations

import math
import platform
import subprocess
import zipfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from data.statistics import MetadataStatistics
from models.build import ConditionedAST
from utils.common.errors import UserError
from utils.common.files import atomic_write
from utils.config.schema import RunConfig, config_from_dict

FORMAT = "metadata-conditioned-ast"
VERSION = 1


#: Types of a checkpoint's fields as they come from a file.
KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("weights", "config", "statistics", "counts", "versions"), dict),
    **dict.fromkeys(("thresholds", "pos_weight"), (tuple, list)),
    **dict.fromkeys(("selection", "partial", "run", "revision"), str),
    "epoch": int,
    "synthetic": bool,
    **dict.fromkeys(("score", "layer_norm_eps"), (float, int)),
}
#: What is counted of each part of the data, beside its classes.
COUNTED = {"cycles", "recordings", "patients"}


@dataclass
class Checkpoint:
    """A trained model and where it comes from.

    Attributes:
        weights: state dict of the `ConditionedAST`.
        config: the run's resolved configuration as a plain dictionary.
        statistics: `MetadataStatistics.to_dict()` of the training cycles.
        thresholds: decision thresholds chosen by the selection rule.
        selection: validation | fixed | test.
        epoch: epoch of the weights, from 0.
        score: ICBHI Score (percent) on the selection part at that epoch; NaN for `fixed`.
        layer_norm_eps: of the backbone; it came with the pretrained weights.
        pos_weight: weight of each output's positives in the loss; () when the loss has none.
        counts: cycles, recordings and patients of each part; "data": of the whole data, as
            `data.corpora.icbhi.Completeness.counts`.
        partial: empty, or what is missing from the full ICBHI set.
        run: name of the run folder.
        synthetic: the recordings of the training were generated (`data.synthetic.corpus`).
        versions: of Python, torch and the libraries that shape the numbers.
        revision: git revision of the code, "+" appended when files were changed.
    """

    weights: dict[str, torch.Tensor]
    config: dict[str, Any]
    statistics: dict[str, Any]
    thresholds: tuple[float, ...]
    selection: str
    epoch: int
    score: float
    layer_norm_eps: float
    pos_weight: tuple[float, ...]
    counts: dict[str, Any]
    partial: str
    run: str
    synthetic: bool = False  # the first checkpoints did not say
    versions: dict[str, str] = field(default_factory=lambda: versions())
    revision: str = field(default_factory=lambda: git_revision())

    def run_config(self) -> RunConfig:
        """The configuration, checked against today's schema."""
        return config_from_dict(self.config)

    def config_to_read(self, data_folder: str | None = None) -> RunConfig:
        """The configuration to read data with; it makes no file where the checkpoint's author says.

        A checkpoint may come from anyone: its metadata file and its cache are taken where they
        are; otherwise no metadata file is written, and the cache is the default one.

        Args:
            data_folder: read instead of the configured one, to which the metadata file belongs.
        """
        config = self.run_config()
        dataset = config.dataset
        if data_folder is not None:
            dataset.data_folder = data_folder
        metadata = dataset.cycle_metadata_path
        if data_folder is not None or not (metadata and Path(metadata).is_file()):
            dataset.cycle_metadata_path = None
        if not Path(dataset.cache_dir).is_dir():
            dataset.cache_dir = RunConfig().dataset.cache_dir
        return config

    def metadata_statistics(self) -> MetadataStatistics:
        """The training cycles' statistics, for encoding any other cycles alike."""
        return MetadataStatistics.from_dict(self.statistics)

    def build_model(self) -> ConditionedAST:
        """The trained model, in eval mode, on the CPU."""
        from utils.training.assemble import build_model  # it imports the loader; this need not

        config = self.run_config()
        config.backbone.weights = "none"  # they come from here
        model = build_model(config, self.metadata_statistics(), layer_norm_eps=self.layer_norm_eps)
        try:
            model.load_state_dict(self.weights)
        except RuntimeError as error:  # names and shapes
            lines = [line.strip() for line in str(error).splitlines()]
            raise UserError(
                f"the weights of {self.run} do not fit its configuration: {' '.join(lines[1:2])}"
            ) from None
        return model.eval()


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write atomically; `load_checkpoint` gives an equal object back."""
    _save(path, {"format": FORMAT, "version": VERSION, **vars(checkpoint)})


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a model checkpoint with `weights_only=True`.

    Raises:
        UserError: no such file, another kind of file, a damaged or foreign one.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"no checkpoint {path}; a finished training run writes it (the scripts copy their "
            "latest best one to checkpoints/<variant>_best.pt)"
        )
    content = _content(
        path,
        FORMAT,
        "a model checkpoint of this repository; give checkpoints/<variant>_best.pt or the "
        "checkpoints/best.pt of a run",
    )
    try:
        checkpoint = Checkpoint(**content)
    except TypeError as error:
        problem = str(error)
    else:
        problem = _problem(checkpoint)
    if problem:
        raise UserError(f"{path} is damaged: {problem}; use another copy")
    return checkpoint


def _problem(checkpoint: Checkpoint) -> str:
    """What would end in a traceback, or in wrong figures, long after loading; empty: nothing."""
    for name, kind in KINDS.items():
        value = getattr(checkpoint, name)
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            return f"{name} is a {type(value).__name__}"
    if not all(isinstance(value, torch.Tensor) for value in checkpoint.weights.values()):
        return "its weights are not all tensors"
    config = checkpoint.run_config()
    task, number = config.task, (int, float)
    if checkpoint.selection != config.training.selection:
        return f"selection is not the {config.training.selection} of its configuration"
    allowed = {task.n_thresholds, len(task.default_thresholds)}
    if len(checkpoint.thresholds) not in allowed or not all(
        isinstance(value, number) and 0 <= value <= 1 for value in checkpoint.thresholds
    ):
        return f"thresholds are not {task.n_thresholds} numbers in 0..1"
    allowed = {0, len(task.outputs)}
    if len(checkpoint.pos_weight) not in allowed or not all(
        isinstance(value, number) and 0 < value < math.inf for value in checkpoint.pos_weight
    ):
        return f"pos_weight is not {len(task.outputs)} positive numbers"
    for part in ("train", "val", "test"):
        counts = checkpoint.counts.get(part)
        if not isinstance(counts, dict) or not counts.keys() >= COUNTED:
            return f"counts of {part} lack {', '.join(sorted(COUNTED))}"
        if not all(isinstance(value, int) and value >= 0 for value in counts.values()):
            return f"counts of {part} are not whole numbers"
    return ""


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state atomically."""
    _save(path, {"format": FORMAT + "-state", "version": VERSION, **state})


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state written by `save_state`."""
    return _content(path, FORMAT + "-state", "a training state; remove it to start anew")


def _content(path: Path, form: str, what: str) -> dict[str, Any]:
    """What was saved under a format name in this version."""
    content = _load(path)
    if not isinstance(content, dict) or content.pop("format", None) != form:
        raise UserError(f"{path} is not {what}")
    version = content.pop("version", None)
    if version != VERSION:
        raise UserError(
            f"{path} has checkpoint version {version}, this code reads {VERSION}; use the "
            "revision that wrote it"
        )
    return content


def _save(path: Path, content: dict[str, Any]) -> None:
    size = sum(t.numel() * t.element_size() for t in _tensors(content))
    with atomic_write(path, needed_bytes=size) as file:
        torch.save(content, file)


def _load(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch itself does not look at the checksums
        if damaged:
            raise ValueError(f"wrong checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can break the reader in any way
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} can not be read as a checkpoint (foreign, damaged or tampered with): "
            f"{reason}; copy it again from where it was made"
        ) from None


def _tensors(value: Any):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def versions() -> dict[str, str]:
    """Versions of what shapes the numbers."""
    from importlib.metadata import version

    names = ("torchaudio", "timm", "numpy", "pandas", "scikit-learn", "soxr")
    own = {"python": platform.python_version(), "torch": str(torch.__version__)}  # with its CUDA
    return own | {name: version(name) for name in names}


@cache
def git_revision() -> str:
    """Short revision of the checkout, "+" appended when its code differs; "" without git.

    Configurations and pictures may differ: the resolved configuration is kept with every run.
    """
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
