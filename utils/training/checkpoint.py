"""Checkpoints: written atomically, read without executing anything.

A model checkpoint (`Checkpoint`) is all that evaluation, figures and prediction need in addition
to the data. The training state is what resuming needs; it never leaves its run folder.
"""

from __future__ import annotations

import pickle
import platform
import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import torch
from omegaconf import OmegaConf

from data.config import DatasetConfig
from data.statistics import MetadataStatistics
from models.build import ConditionedAST
from utils.common.archives import check_archive
from utils.common.errors import UserError
from utils.common.files import atomic_write
from utils.config.merge import read_yaml
from utils.config.schema import RunConfig, config_from_dict
from utils.training.build import build_model
from utils.training.shared_folder import located, read_folder

#: Keys of `dataset` that belong to a model, whatever corpus it is judged on.
OF_MODEL = ("class_split", "split_strategy", "n_cls", "batch_size", "h", "w")
FORMAT = "metadata-conditioned-ast"
VERSION = 1


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
        fingerprint: of the data (`utils.training.fingerprint`).
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
    fingerprint: dict[str, Any] = field(default_factory=dict)  # nor this
    versions: dict[str, str] = field(default_factory=lambda: versions())
    revision: str = field(default_factory=lambda: git_revision())

    def run_config(self) -> RunConfig:
        """The configuration, checked against today's schema."""
        return config_from_dict(self.config)

    def config_to_read(
        self, data_folder: str | None = None, corpus_file: str | Path | None = None
    ) -> RunConfig:
        """The configuration to read data with; it makes no file where the checkpoint's author says.

        A checkpoint may come from anyone: its metadata file and its cache are taken where they
        are; otherwise no metadata file is written, and the cache is the default one.

        Args:
            data_folder: read instead of the configured one, to which the metadata file belongs.
            corpus_file: YAML whose section `dataset` names another corpus. What the model takes
                and gives (audio settings, spectrogram size, classes) stays the checkpoint's.

        Raises:
            UserError: corpus_file is faulty, or gives audio to a model of ready-made spectrograms
                or the other way round.
        """
        config = self.run_config()
        if corpus_file is not None:
            config.dataset = self._dataset_of(corpus_file, config.dataset)
        dataset = config.dataset
        if data_folder is not None:
            if dataset.parts:
                raise UserError(
                    f"{self.run} was trained on several corpora, so --data-folder cannot say which "
                    "is meant; name a corpus with evaluate.py --corpus FILE.yaml"
                )
            dataset.data_folder = data_folder
        metadata = dataset.cycle_metadata_path
        if data_folder is not None or not (metadata and Path(metadata).is_file()):
            dataset.cycle_metadata_path = None
        if corpus_file is None and not Path(dataset.cache_dir).is_dir():
            dataset.cache_dir = RunConfig().dataset.cache_dir
        return config

    def _dataset_of(self, file: str | Path, own: DatasetConfig) -> DatasetConfig:
        """Section `dataset` of a YAML file with what the model takes and gives."""
        content = OmegaConf.to_container(read_yaml(file))
        sections = {k: v for k, v in content.items() if k not in ("models", "methods")}
        variant = next(iter(self.config["models"]))
        given = config_from_dict(sections, variant=variant, interpolate=True).dataset
        if own.ready_made != given.ready_made:
            kinds = (one.ready_made for one in (own, given))
            takes, has = ("ready-made spectrograms" if kind else "audio" for kind in kinds)
            raise UserError(f"the model of {self.run} takes {takes}, and {file} holds {has}")
        return replace(given, **{k: getattr(own, k) for k in OF_MODEL})

    def metadata_statistics(self) -> MetadataStatistics:
        """The training cycles' statistics, for encoding any other cycles in the same way."""
        return MetadataStatistics.from_dict(self.statistics)

    def build_model(self) -> ConditionedAST:
        """The trained model, in eval mode, on the CPU; adapters are merged into the weights."""
        config = self.run_config()
        config.backbone.weights = "none"  # they come from here
        for section in config.methods.values():
            if hasattr(section, "weights"):
                section.weights = None
        statistics, blocks = self.metadata_statistics(), "backbone.blocks."
        depth = len({name.split(".")[2] for name in self.weights if name.startswith(blocks)})
        found = {"backbone.depth": depth or config.backbone.depth} | _shapes(self.weights)
        expected = {"backbone.depth": config.backbone.depth}
        if depth in (0, config.backbone.depth):  # anyone may have written the configuration:
            with torch.device("meta"):  # nothing is allocated that is not in the file
                expected |= _shapes(build_model(config, statistics).state_dict())
        for name in [n for n in {**expected, **found} if found.get(n) != expected.get(n)][:1]:
            raise UserError(
                f"the weights of {self.run} do not fit its configuration: {name} is "
                f"{found.get(name, 'missing')}, {expected.get(name, 'nothing')} is expected; use "
                "another copy"
            )
        model = build_model(config, statistics, layer_norm_eps=self.layer_norm_eps)
        model.load_state_dict(self.weights)
        model.merge()
        return model.eval()


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write atomically; `load_checkpoint` gives an equal object back."""
    _save(path, content_of(checkpoint))


def content_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is written of a checkpoint."""
    return {"format": FORMAT, "version": VERSION, **vars(checkpoint)}


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a model checkpoint: a file with `weights_only=True`, a shared folder, a hub's USER/NAME.

    Raises:
        UserError: no such file, another kind of file, a damaged or foreign one.
    """
    path = located(path)
    if not path.exists():
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
        for name, hint in get_type_hints(Checkpoint).items():
            value, kind = getattr(checkpoint, name), get_origin(hint) or hint
            if not isinstance(value, {tuple: tuple | list, float: float | int}.get(kind, kind)):
                raise TypeError(f"{name} is a {type(value).__name__}")
    except TypeError as error:
        raise UserError(f"{path} is damaged: {error}; use another copy") from None
    return checkpoint


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state atomically."""
    _save(path, {"format": FORMAT + "-state", "version": VERSION, **state})


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state written by `save_state`."""
    return _content(path, FORMAT + "-state", "a training state; remove it to start from scratch")


def _content(path: Path, form: str, what: str) -> dict[str, Any]:
    """What was saved under a format name in this version."""
    content = _printable(read_folder(path)) if path.is_dir() else _load(path)
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
    size = sum(t.numel() * t.element_size() for t in _leaves(content) if torch.is_tensor(t))
    with atomic_write(path, needed_bytes=size) as file:
        torch.save(content, file)


def _load(path: Path) -> Any:
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no archive of torch.save")
        check_archive(path)
        return _printable(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # damaged bytes can break the reader in any way
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds more than tensors, numbers and text"
        else:
            reason = _printable(str(error).strip().partition("\n")[0]) or type(error).__name__
        raise UserError(
            f"{path} cannot be read as a checkpoint (foreign, damaged or tampered with): "
            f"{reason}; copy it again from where it was made"
        ) from None


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _printable(value: Any) -> Any:
    """The same content with all text free of control characters: it may be anyone's, and text is
    printed."""
    if isinstance(value, str):
        return "".join(c for c in value if c.isprintable() or c == "\n")
    if isinstance(value, dict):
        return type(value)((_printable(key), _printable(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(map(_printable, value))
    return value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


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
