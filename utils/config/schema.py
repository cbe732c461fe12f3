"""Configuration: one schema, strict loading, one place for every default.

The dataclasses below (and the variants' own, beside their conditioners in `models/`) hold every
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

import torch
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.task import Task
from utils.common.errors import UserError
from utils.config.merge import (
    ANY_VARIANT,
    first_line,
    merge,
    parse_override,
    read_yaml,
    unknown_key,
    without_overruled,
)
from utils.config.validation import validate


@dataclass
class DatasetConfig:
    """What is read, how it is split, what a batch is."""

    name: str = "icbhi"  # the one dataset there is
    data_folder: str = MISSING  # folder that holds wavs, annotations and tables
    cycle_metadata_path: str | None = None  # icbhi_metadata.csv: written if absent, else checked
    class_split: str = "lungsound"  # the one label set there is
    split_strategy: str = "official"  # official | official_disjoint | foldwise | random
    test_fold: int = 0  # foldwise: which of the 5 folds is the test part (0..4)
    split_seed: int = 0  # random: seed of the patient-wise split
    test_fraction: float = 0.4  # random: share of the patients' cycles that is tested
    val_fraction: float = 0.2  # share of the training cycles held out for validation
    val_seed: int = 0  # fixes the validation patients, apart from training.seed
    n_cls: int = 4  # 4: crackle and wheeze logits; 2: normal against abnormal
    batch_size: int = 16  # cycles per optimiser step, over all processes and accumulation steps
    h: int = 128  # mel bands
    w: int = 1024  # frames the spectrogram is fitted to
    cache_dir: str = "cache"  # waveform stores and frozen-backbone features
    on_bad_recording: str = "error"  # error | skip (counted and reported)
    store_workers: int = 0  # processes that build the waveform store; 0: one per core


@dataclass
class AudioConfig:
    """Recording -> log-mel spectrogram (SI units unless the key says otherwise)."""

    sample_rate: int = 16000  # Hz, of the waveform store
    resampler: str = "torchaudio"  # torchaudio (sinc_interp_hann) | soxr_hq (librosa's)
    clip_seconds: float = 10.0  # s; longer cycles are cut, shorter ones padded
    pad_type: str = "repeat"  # repeat (with faded junctions) | zero (centred)
    frame_length_ms: float = 40.0  # of the analysis frames
    frame_shift_ms: float = 10.0  # from one frame to the next
    low_freq: float = 100.0  # Hz, lower edge of the mel bank
    high_freq: float = 8000.0  # Hz, upper edge of the mel bank
    mean: float = -4.2677393  # AudioSet statistics: (x - mean) / (2 * std)
    std: float = 4.5689974  # see mean
    fit: str = "stretch"  # stretch (bilinear) | pad, to dataset.w frames


@dataclass
class AugmentConfig:
    """Each probability is per clip; 1 means always. Ranges are uniform."""

    enabled: bool = True  # the one switch for all of it
    noise_probability: float = 0.1  # of white noise
    noise_rms: float = 3.2e-3  # of the white noise, full scale = 1
    noise_snr_db: list[float] | None = None  # [low, high]: noise by SNR instead of by rms
    speed_probability: float = 0.1  # of time-stretching
    speed_range: list[float] = field(default_factory=lambda: [0.9, 1.1])  # tempo factor
    loudness_probability: float = 0.1  # of another loudness
    loudness_range: list[float] = field(default_factory=lambda: [0.5, 2.0])  # amplitude factor
    vtlp_probability: float = 0.1  # of vocal-tract-length perturbation
    vtlp_range: list[float] = field(default_factory=lambda: [0.9, 1.1])  # warp factor
    vtlp_fhi: float = 4800.0  # Hz, boundary of the warp
    specaugment_probability: float = 0.3  # of masking the spectrogram
    freq_masks: int = 2  # per masked clip
    freq_mask_width: int = 48  # bands, exclusive upper bound
    time_masks: int = 2  # per masked clip
    time_mask_width: int = 160  # frames, exclusive upper bound


@dataclass
class BackboneConfig:
    """The Audio Spectrogram Transformer all variants share."""

    weights: str = "audioset"  # audioset | imagenet | none
    # audioset: hub name, local folder (transformers layout) or .pth file (original layout);
    # imagenet: a local timm file, or null for timm's hub
    weights_path: str | None = "MIT/ast-finetuned-audioset-10-10-0.4593"
    embed_dim: int = 768  # width D
    depth: int = 12  # blocks L
    num_heads: int = 12  # attention heads per block
    mlp_ratio: float = 4.0  # hidden width of the MLP over D
    patch_size: int = 16  # bands and frames
    freq_stride: int = 10  # bands from one patch to the next
    time_stride: int = 10  # frames from one patch to the next
    trainable_blocks: int = 12  # the last n train; n >= depth freezes nothing
    gradient_checkpointing: bool = False  # trades a third more compute for memory


@dataclass
class TrainingConfig:
    """The loop."""

    epochs: int = 100  # passes over the training cycles
    lr: float = 3e-5  # of AdamW, at the top of the schedule
    warmup_epochs: float = 10  # linear, per step; then cosine to 0
    weight_decay: float = 0.01  # of AdamW
    sensitivity_bias: float = 1.5  # times negatives / positives is BCE's pos_weight
    grad_clip: float = 1.0  # gradient norm; 0: off
    accumulation_steps: int = 1  # micro-batches per optimiser step; they share batch_size
    loss: str = "bce"  # bce | focal | asymmetric | ce (4 exclusive classes)
    focal_gamma: float = 2.0  # focal: exponent
    asymmetric_gamma_pos: float = 1.0  # asymmetric: exponent of positives
    asymmetric_gamma_neg: float = 4.0  # asymmetric: exponent of negatives
    asymmetric_clip: float = 0.05  # asymmetric: probability margin of negatives
    label_smoothing: float = 0.0  # ce: share of the label spread over all classes
    sampler: str = "shuffle"  # shuffle | balanced (classes drawn alike)
    selection: str = "validation"  # validation | fixed | test (marked everywhere)
    min_sensitivity: float = 0.0  # thresholds must reach this Se on the selection part, in 0..1
    early_stopping_patience: int = 0  # epochs without a better score; 0: off
    seed: int = 0  # of weights, order, dropout and augmentation
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "auto"  # auto (bf16 where the hardware has it, else fp32) | fp32 | bf16 | fp16
    compile: str = "auto"  # auto (on CUDA) | true | false
    resume: str = "auto"  # auto: go on where an equal run stopped | never: start anew
    checkpoint_minutes: float = 10.0  # between checkpoints; 0: after every step
    frozen_cache: bool = True  # compute frozen, unconditioned layers once (augmentation off only)
    output_dir: str = "runs"  # receives a folder per run
    checkpoint_dir: str = "checkpoints"  # receives <variant>_best.pt of the latest finished run


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
    """The whole of a run; `models` holds exactly one variant's section."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    models: dict[str, Any] = field(default_factory=dict)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    mlflow: MLflowConfig = field(default_factory=MLflowConfig)

    @property
    def variant(self) -> str:
        """Name of the one configured variant, such as ast_film."""
        return next(iter(self.models))

    @property
    def model(self) -> Any:
        """The configured variant's own section, a `models.conditioner.ModelConfig`."""
        return self.models[self.variant]

    @property
    def task(self) -> Task:
        """What is classified, from dataset.n_cls and training.loss."""
        return Task(self.dataset.n_cls, exclusive=self.training.loss == "ce")


# Keys that choose where files lie, how a run is watched or how it is spread over a machine, but
# not what comes out of it: a run may be resumed although they changed.
NOT_HASHED = {
    "dataset": {"cache_dir", "store_workers", "cycle_metadata_path"},
    "training": {"resume", "output_dir", "checkpoint_dir", "checkpoint_minutes"},
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
    merged = OmegaConf.create()
    for file in files:
        content = read_yaml(file)
        merged = merge(without_overruled(merged, content), content, f"in {file}")
    if mlflow_file is not None:
        section = read_yaml(mlflow_file)
        foreign = sorted(set(section) - {"mlflow"})
        if foreign:
            raise UserError(
                f"{mlflow_file} may hold the section 'mlflow' only, but it has {foreign[0]!r}; "
                "give other sections with --config"
            )
        merged = merge(merged, section, f"in {mlflow_file}")
    for override in overrides:
        given = parse_override(override)
        merged = merge(without_overruled(merged, given), given, "on the command line")
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
    from models.registry import VARIANTS  # a variant's module may import this one

    values = copy.deepcopy(values)
    if not interpolate:
        _refuse_interpolations(values)
    models = values.pop("models", None) or {}
    _check_sections(values, models)
    wildcard = models.pop(ANY_VARIANT, None) or {}
    name = _the_variant(models, variant, VARIANTS)
    schema = OmegaConf.structured(RunConfig)
    section = OmegaConf.structured(VARIANTS[name].config_class)
    known_somewhere = {k for v in VARIANTS.values() for k in v.config_class.__dataclass_fields__}
    for key, value in wildcard.items():
        if key in section:
            models[name] = {**(models.get(name) or {}), key: value}
        elif key not in known_somewhere:
            raise UserError(unknown_key(f"models.{ANY_VARIANT}.{key}", known_somewhere))
    section = merge(section, OmegaConf.create(models.get(name) or {}), "", prefix=f"models.{name}")
    schema = merge(schema, OmegaConf.create(values), "")
    schema.models = {name: section}
    config = _resolved(schema)
    # YAML and the command line make a truth value of `true`, OmegaConf the text "True" of that
    config.training.compile = config.training.compile.lower()
    validate(config)
    with torch.device("meta"):  # takes no memory; a variant refuses what it can not be built from
        VARIANTS[name].build(
            config.model,
            embed_dim=config.backbone.embed_dim,
            depth=config.backbone.depth,
            device_counts=None,
            site_counts=None,
        )
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
    for section, keys in NOT_HASHED.items():
        for key in keys:
            values[section].pop(key)
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
    """The object behind a merged schema, every ${...} replaced by what it names."""
    try:
        for key in sorted(OmegaConf.missing_keys(schema)):
            raise UserError(
                f"{key} is not set; set it in the configuration file, or as {key}=... on the "
                "command line"
            )
        return OmegaConf.to_object(schema)
    except OmegaConfBaseException as error:
        raise UserError(
            f"{error.full_key} can not be resolved: {first_line(error)}; name a key or variable "
            "that exists, or write the value itself"
        ) from None


def _refuse_interpolations(values: dict[str, Any]) -> None:
    for key, value in flatten(values).items():
        if "${" in str(value):
            raise UserError(
                f"{key}={value} can not be: a stored configuration holds plain values; restore it"
            )


def _check_sections(values: dict[str, Any], models: Any) -> None:
    """Sections must be sections before they can be merged."""
    if not isinstance(models, dict):
        raise UserError("models must be a section that holds one variant, such as models.ast_film")
    sections = {name: values[name] for name in RunConfig.__dataclass_fields__ if name in values}
    sections |= {f"models.{name}": section or {} for name, section in models.items()}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(f"{name} must be a section of keys, not {section!r}")


def _the_variant(models: dict[str, Any], wanted: str | None, variants: dict[str, Any]) -> str:
    for name in models:
        if name not in variants:
            raise UserError(unknown_key(f"models.{name}", list(variants)))
    if len(models) > 1:
        raise UserError(f"models holds {' and '.join(models)}; a run has exactly one variant")
    if not models and wanted is None:
        raise UserError("models holds no variant; add a section such as models.ast_film")
    name = next(iter(models), wanted)
    if wanted is not None and name != wanted:
        raise UserError(f"this script trains {wanted}, but the configuration is for {name}")
    return name
