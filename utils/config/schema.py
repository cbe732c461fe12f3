"""Configuration: one schema, strict loading, one place for every default.

The dataclasses below and those of `data.config` and `models.config` hold every
key, its default, its unit and its meaning. YAML files show what a reader wants to change.
OmegaConf's structured configurations reject unknown keys and wrong types; `validate` rejects
contradictions before anything is read.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.config import AudioConfig, AugmentConfig, DatasetConfig
from data.task import FIELDS, Task
from models.config import BackboneConfig, FusionConfig
from models.registry import METHODS, VARIANTS
from utils.common.errors import UserError
from utils.common.settings import MAX_COUNT, MAX_SEED, MAX_SIZE, setting
from utils.config.merge import (
    first_line,
    merge,
    parse_override,
    plain_names,
    read_yaml,
    unknown_key,
    without_patterns,
)
from utils.config.validation import validate

WHICH = "; CUDA_VISIBLE_DEVICES=0 before the command chooses the GPU"


@dataclass
class TrainingConfig:
    """The loop."""

    epochs: int = setting(100, low=1, high=MAX_COUNT)  # passes over the training cycles
    lr: float = setting(3e-5, low=0, high=100, ends="(]")  # of AdamW, at the top of the schedule
    warmup_epochs: float = setting(10, low=0, high=MAX_COUNT)  # linear, per step; then cosine to 0
    weight_decay: float = setting(0.01, low=0, high=100)  # of AdamW
    # times negatives / positives is BCE's pos_weight
    sensitivity_bias: float = setting(1.5, low=0, ends="(]")
    grad_clip: float = setting(1.0, low=0)  # gradient norm; 0: off
    # sharpness-aware minimisation: length of the ascent step, at two passes a step; 0: off
    sam_rho: float = setting(0.0, low=0)
    # micro-batches per optimiser step; they share batch_size
    accumulation_steps: int = setting(1, low=1, high=MAX_SIZE)
    # bce | focal | asymmetric | ce (4 exclusive classes)
    loss: str = setting("bce", choices=("bce", "focal", "asymmetric", "ce"))
    focal_gamma: float = setting(2.0, low=0)  # focal: exponent
    asymmetric_gamma_pos: float = setting(1.0, low=0)  # asymmetric: exponent of positives
    asymmetric_gamma_neg: float = setting(4.0, low=0)  # asymmetric: exponent of negatives
    # asymmetric: probability margin of negatives
    asymmetric_clip: float = setting(0.05, low=0, high=1, ends="[)")
    # ce: share of the label spread over all classes
    label_smoothing: float = setting(0.0, low=0, high=1, ends="[)")
    # shuffle | balanced (classes equally often)
    sampler: str = setting("shuffle", choices=("shuffle", "balanced"))
    # metadata fields of which the loss makes the classes independent by weights
    # p(class) / p(class | fields); numbers in bins (data/fields.py); none: off
    balance: list[str] = setting([], choices=FIELDS)
    # [low, high] of these weights, whose mean is 1
    balance_bounds: list[float] = setting([0.2, 5.0], low=0, ends="(]", interval=True)
    # validation | fixed | test (marked everywhere)
    selection: str = setting("validation", choices=("validation", "fixed", "test"))
    # metadata fields by whose values the selection part is divided: epoch and thresholds are
    # chosen by the mean of the groups' Scores; none: by the Score of all
    selection_groups: list[str] = setting([], choices=FIELDS)
    # chosen (with the epoch) | default (0.5; with ce the largest probability)
    thresholds: str = setting("chosen", choices=("chosen", "default"))
    # thresholds must reach this Se on the selection part, in 0..1
    min_sensitivity: float = setting(0.0, low=0, high=1)
    # epochs without a better score; 0: off
    early_stopping_patience: int = setting(0, low=0, high=MAX_COUNT)
    seed: int = setting(0, low=0, high=MAX_SEED)  # of weights, order, dropout and augmentation
    device: str = setting("auto", choices=("auto", "cpu", "cuda"), hint=WHICH)  # auto | cpu | cuda
    # auto (bf16 where the hardware has it, else fp32) | fp32 (exact) | tf32 | bf16 | fp16
    precision: str = setting("auto", choices=("auto", "fp32", "tf32", "bf16", "fp16"))
    # auto (on CUDA) | true | false | blocks (each block by itself: one short compilation for all)
    compile: str = setting("auto", choices=("auto", "true", "false", "blocks"))
    # auto: continue an identical run | never: start from scratch
    resume: str = setting("auto", choices=("auto", "never"))
    checkpoint_minutes: float = setting(10.0, low=0)  # between checkpoints; 0: after every step
    frozen_cache: bool = True  # compute frozen, unconditioned layers once (augmentation off only)
    output_dir: str = setting("runs", path=True)  # receives a folder per run
    # receives <variant>_best.pt of the latest finished run
    checkpoint_dir: str = setting("checkpoints", path=True)


@dataclass
class MLflowConfig:
    """Tracking. Credentials come from the environment, never from here."""

    enabled: bool = True  # false: MLflow is not even imported
    tracking_uri: str = "sqlite:///mlflow.db"  # database file or server address
    experiment_name: str = "icbhi"  # groups runs in the UI
    run_name: str | None = None  # null: variant, task, protocol and seed
    tags: dict[str, str] = field(default_factory=dict)  # further tags to filter by
    log_checkpoint: bool = False  # upload the best checkpoint (about 350 MB at full size)


@dataclass
class RunConfig:
    """The whole of a run; `models` holds exactly one variant's section, `methods` any number."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    models: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, Any] = field(default_factory=dict)  # act in this order
    fusion: FusionConfig = field(default_factory=FusionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    mlflow: MLflowConfig = field(default_factory=MLflowConfig)

    @property
    def variant(self) -> str:
        """Name of the one configured variant, such as ast_film."""
        return next(iter(self.models))

    @property
    def model(self) -> Any:
        """The configured variant's own section, a `models.config.ModelConfig`."""
        return self.models[self.variant]

    @property
    def title(self) -> str:
        """Name in reports, figures and tables, such as FiLM-AST + Patch-Mix CL."""
        if self.fusion.members:
            return self.fusion.title or f"{self.fusion.kind} fusion"
        titles = [METHODS[name].title for name in self.methods]
        if self.audio.keep_bands:
            titles.append("frequency band selection (reconstruction)")
        if self.backbone.adapter == "lora":
            titles.append("LoRA")
        if self.training.sam_rho:
            titles.append("SAM")
        return " + ".join([VARIANTS[self.variant].title, *titles])

    @property
    def task(self) -> Task:
        """What is classified, from dataset.n_cls and training.loss."""
        return Task(self.dataset.n_cls, exclusive=self.training.loss == "ce")


# Keys that choose where files lie, how a run is watched or how it is spread over a machine, but
# not what comes out of it: a run may be resumed although they changed.
NOT_HASHED = {
    "dataset": {"cache_dir", "store_workers", "cycle_metadata_path"},
    "fusion": {"checkpoints"},
    "training": {"resume", "output_dir", "checkpoint_dir", "checkpoint_minutes"},
}

#: Keys that came after the first release, left out of the hash at their default.
LATER = {
    "dataset": {
        "allow_shared_patients": False,
        "allow_overlaps": False,
        "full_hash": False,
        "label_map": {},
        "parts": [],
        "test_device": None,
    },
    "audio": {"keep_bands": None, "n_mels": None, "buckets": None},
    "augment": {"mask_value": "zero"},
    "backbone": {
        **{"patch_init": None, "bucket_positions": "start", "adapter": "none"},
        **{"lora_rank": 8, "lora_targets": ["k", "v"], "lora_scale": 8 / 96},
    },
    "fusion": {"kind": "gated", "title": None, "members": []},
    "models": {  # of the variant's section
        **{"encoder_dropout": None, "metadata_dropout_joint": 0.0},
        "metadata_dropout_fields": {},
    },
    "training": {
        **{"thresholds": "chosen", "sam_rho": 0.0, "selection_groups": []},
        **{"balance": [], "balance_bounds": [0.2, 5.0]},
    },
}


def load_config(
    files: Sequence[str | Path],
    overrides: Sequence[str] = (),
    *,
    mlflow_file: str | Path | None = None,
    variant: str | None = None,
) -> RunConfig:
    """Merge YAML files in order, then `key=value` overrides, and check the result.

    Args:
        files: configuration files; later ones win.
        overrides: dotted `key=value` strings.
        mlflow_file: optional further file whose only section is `mlflow`.
        variant: the variant a script trains; a configuration of another one is refused.

    Raises:
        UserError: a missing file, an unknown key, a wrong type, a contradiction.
    """
    parts = [(read_yaml(file), f"in {file}") for file in files]
    if mlflow_file is not None:
        section = read_yaml(mlflow_file)
        foreign = sorted(set(section) - {"mlflow"})
        if foreign:
            raise UserError(
                f"{mlflow_file} may hold the section 'mlflow' only, but it has {foreign[0]!r}; "
                "give other sections with --config"
            )
        parts.append((section, f"in {mlflow_file}"))
    parts += [(parse_override(override), "on the command line") for override in overrides]
    names = [name for content, _ in parts for name in plain_names(content.get("models"))]
    name, merged = next(iter(names), variant), OmegaConf.create()
    for content, where in parts:
        models = OmegaConf.to_container(OmegaConf.create(content.get("models") or {}))
        if name in VARIANTS and all(isinstance(one, dict | None) for one in models.values()):
            content["models"] = without_patterns(models, name, _keys_of_variants())
        merged = merge(merged, content, where)
    return config_from_dict(OmegaConf.to_container(merged), variant=variant, interpolate=True)


def config_from_dict(
    values: dict[str, Any], *, variant: str | None = None, interpolate: bool = False
) -> RunConfig:
    """Plain nested dictionary (YAML or a checkpoint's copy) -> checked `RunConfig`.

    Args:
        values: sections, keys and values.
        variant: as in `load_config`.
        interpolate: resolve ${...}, which may name other keys and variables of the environment;
            in a stored configuration, which may be someone else's, it is refused.

    Raises:
        UserError: as `load_config`.
    """
    values = copy.deepcopy(values)
    if not interpolate:
        _refuse_interpolations(values)
    models, methods = (values.pop(key, None) or {} for key in ("models", "methods"))
    _check_sections(values, models, methods)
    name = _the_variant(plain_names(models), variant, VARIANTS)
    models = without_patterns(models, name, _keys_of_variants())
    schema = OmegaConf.structured(RunConfig)
    section = OmegaConf.structured(VARIANTS[name].config_class)
    section = merge(section, OmegaConf.create(models.get(name) or {}), "", prefix=f"models.{name}")
    schema = merge(schema, OmegaConf.create(values), "")
    schema.models = {name: section}
    schema.methods = {name: _method(name, given) for name, given in methods.items()}
    if schema.dataset.parts:
        schema.dataset.data_folder = ""
    config = _resolved(schema)
    if config.dataset.parts:  # in messages; nothing is read there
        config.dataset.data_folder = " + ".join(config.dataset.folders)
        config.dataset.cycle_metadata_path = None
    # YAML and the command line make a truth value of `true`, OmegaConf the text "True" of that
    config.training.compile = config.training.compile.lower()
    validate(config)
    return config


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain nested dictionary of every resolved key, for YAML files and checkpoints."""
    return asdict(config)


def config_to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML text, in the order of the schema."""
    return OmegaConf.to_yaml(OmegaConf.create(config_to_dict(config)))


def config_hash(config: RunConfig) -> str:
    """Eight hex digits over every key that can change a run's result."""
    values = config_to_dict(config)
    values.pop("mlflow")
    for section, keys in LATER.items():  # older runs keep their names
        place = values["models"][config.variant] if section == "models" else values[section]
        for key, default in keys.items():
            if place.get(key, default) == default:
                place.pop(key, None)
    if not values["methods"]:
        del values["methods"]
    elif len(values["methods"]) > 1:  # they act in this order
        values["methods"] = list(values["methods"].items())
    for section, keys in NOT_HASHED.items():
        for key in keys:
            values[section].pop(key)
    if not values["fusion"]:
        del values["fusion"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionary -> {dotted key: leaf}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _resolved(schema: DictConfig) -> RunConfig:
    """The object of a merged schema, every ${...} replaced by what it names."""
    try:
        for key in sorted(OmegaConf.missing_keys(schema)):
            raise UserError(
                f"{key} is not set; set it in the configuration file, or as {key}=... on the "
                "command line"
            )
        return OmegaConf.to_object(schema)
    except OmegaConfBaseException as error:
        raise UserError(
            f"{error.full_key} cannot be resolved: {first_line(error)}; name a key or variable "
            "that exists, or write the value itself"
        ) from None


def _refuse_interpolations(values: dict[str, Any]) -> None:
    for key, value in flatten(values).items():
        if "${" in str(value):
            raise UserError(
                f"{key}={value} cannot be: a stored configuration holds plain values; restore it"
            )


def _method(name: str, given: dict[str, Any] | None) -> DictConfig:
    """Section `methods.<name>`, of which an empty one stands for the defaults."""
    if name not in METHODS:
        raise UserError(unknown_key(f"methods.{name}", list(METHODS)))
    section = OmegaConf.structured(METHODS[name].config_class)
    return merge(section, OmegaConf.create(given or {}), "", prefix=f"methods.{name}")


def _check_sections(values: dict[str, Any], models: Any, methods: Any) -> None:
    """Sections must be sections before they can be merged."""
    if not isinstance(models, dict):
        raise UserError("models must be a section that holds one variant, such as models.ast_film")
    if not isinstance(methods, dict):
        raise UserError("methods must be a section of methods, such as methods.patchmix_cl")
    sections = {name: values[name] for name in RunConfig.__dataclass_fields__ if name in values}
    sections |= {f"models.{name}": section or {} for name, section in models.items()}
    sections |= {f"methods.{name}": section or {} for name, section in methods.items()}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(f"{name} must be a section of keys, not {section!r}")


def _keys_of_variants() -> dict[str, list[str]]:
    return {name: list(v.config_class.__dataclass_fields__) for name, v in VARIANTS.items()}


def _the_variant(models: Sequence[str], expected: str | None, variants: dict[str, Any]) -> str:
    for name in models:
        if name not in variants:
            raise UserError(unknown_key(f"models.{name}", list(variants)))
    if len(models) > 1:
        raise UserError(f"models holds {' and '.join(models)}; a run has exactly one variant")
    if not models and expected is None:
        raise UserError("models holds no variant; add a section such as models.ast_film")
    name = next(iter(models), expected)
    if expected is not None and name != expected:
        raise UserError(f"this script trains {expected}, but the configuration is for {name}")
    return name
