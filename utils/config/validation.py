"""Contradictions in a configuration, found before anything is read.

Each message names the key, its value and the remedy.
"""

from __future__ import annotations

from typing import Any

from models.registry import METHODS
from utils.common.errors import UserError
from utils.common.settings import check_section, refuse
from utils.tracking import check_tracking_uri


def validate(config: Any) -> None:
    """Raise `UserError` for the first fault in a `utils.config.schema.RunConfig`."""
    for name in ("dataset", "audio", "augment", "backbone", "fusion", "training", "mlflow"):
        check_section(getattr(config, name), name)
    prefix = f"models.{config.variant}"
    check_section(config.model, prefix)
    config.model.check(prefix, config.backbone.depth)
    for name, section in config.methods.items():
        check_section(section, f"methods.{name}")
    _check_methods(config)
    if (config.dataset.split_strategy == "leave_device_out") != bool(config.dataset.test_device):
        remedy = "it goes with dataset.split_strategy=leave_device_out, which needs it"
        _refuse(config, "dataset.test_device", remedy)
    if config.training.loss == "ce" and config.dataset.n_cls != 4:
        _refuse(config, "training.loss", "ce is over the four classes; set dataset.n_cls=4 or bce")
    check_tracking_uri(config.mlflow.tracking_uri)
    _check_parts(config)
    _check_shapes(config)
    _check_audio(config)
    _check_training(config)


def _check_methods(config: Any) -> None:
    adding = [name for name in config.methods if METHODS[name].adds_rows]
    if len(adding) > 1:
        raise UserError(
            f"methods.{' and methods.'.join(adding)} cannot run together: each adds rows to the "
            "batch; name one of them"
        )
    for name in config.methods:
        multiple = METHODS[name].bands_multiple
        if config.dataset.h % multiple:
            remedy = f"methods.{name} divides the bands by {multiple}; give a multiple of it"
            _refuse(config, "dataset.h", remedy)
        if getattr(config.methods[name], "fields", None) == []:
            refuse(f"methods.{name}.fields", "[]", "name at least one metadata field")
        if METHODS[name].hears:
            _check_hearing(config, name)
    check_micro_batches(config)


def _check_hearing(config: Any, name: str) -> None:
    dataset, training = config.dataset, config.training
    if dataset.ready_made:
        _refuse(config, "dataset.name", f"methods.{name} hears waveforms, and it has none")
    if config.audio.sample_rate != 16000:
        _refuse(config, "audio.sample_rate", f"methods.{name} hears 16000 Hz")
    frozen = config.backbone.trainable_blocks < config.backbone.depth
    if frozen and training.frozen_cache and not config.augment.enabled:
        remedy = f"the cache holds no waveforms, which methods.{name} hears; use false"
        _refuse(config, "training.frozen_cache", remedy)


def check_micro_batches(config: Any, processes: int = 1) -> None:
    """Refuse a `RunConfig` that deals too few clips to each process for a contrast among them."""
    adding = [name for name in config.methods if METHODS[name].adds_rows]
    steps = config.training.accumulation_steps
    clips = config.dataset.batch_size // (steps * processes)
    if adding and clips < 4:
        raise UserError(
            f"methods.{adding[0]} contrasts the clips of a micro-batch, of which "
            f"dataset.batch_size={config.dataset.batch_size}, training.accumulation_steps={steps} "
            f"and {processes} process{'es' * (processes > 1)} leave {clips}; leave at least 4"
        )


def _check_parts(config: Any) -> None:
    dataset = config.dataset
    parts = dataset.parts
    if (dataset.name == "parts") != bool(parts):
        _refuse(config, "dataset.name", "parts, and only parts, goes with a list dataset.parts")
    for number, part in enumerate(parts):
        check_section(part, f"dataset.parts[{number}]")
    if len({part.name == "spectrograms" for part in parts}) > 1:
        raise UserError(
            "dataset.parts mixes ready-made spectrograms with audio, which have no common scale; "
            "use one kind"
        )
    for name in ("manifest", "spectrograms"):
        labels = [part.label for part in parts if part.name == name]
        if len(labels) > 1 and None in labels:
            raise UserError(
                f"dataset.parts has {len(labels)} of the name {name}; give each a label, which "
                "keeps their patients apart (the same label: the same patients)"
            )
    if parts and not dataset.split_strategy.startswith("official"):
        _refuse(
            config, "dataset.split_strategy", "the roles of the parts divide them; use official"
        )
    if config.training.selection != "validation" and any(part.role == "val" for part in parts):
        _refuse(config, "training.selection", "a part with the role val needs validation")


def opposed(config: Any) -> list[str]:
    """One line for each method of a `RunConfig` that works against the conditioner, or is idle."""
    given = getattr(config.model, "metadata_fields", ())
    idle = [
        f"methods.{name} compares augmentations of a clip; augment.enabled=false makes them equal"
        for name in config.methods
        if METHODS[name].augmented_views and not config.augment.enabled
    ]
    return idle + [
        f"methods.{name} removes the {field} from the features and models.{config.variant}"
        f".metadata_fields adds it: the two pull in opposite directions"
        for name in config.methods
        for field in METHODS[name].removes
        if field in given
    ]


def _check_shapes(config: Any) -> None:
    outputs = len(config.task.outputs)
    for key, derived, source in (
        ("label_dim", outputs, f"dataset.n_cls={config.dataset.n_cls} with this loss"),
        ("input_fdim", config.dataset.h, f"dataset.h={config.dataset.h}"),
        ("input_tdim", config.dataset.w, f"dataset.w={config.dataset.w}"),
    ):
        if getattr(config.model, key) not in (None, derived):
            remedy = f"{source} makes it {derived}; leave it out, or make them agree"
            _refuse(config, f"model.{key}", remedy)
    backbone = config.backbone
    if backbone.embed_dim % backbone.num_heads:
        _refuse(config, "backbone.embed_dim", f"{backbone.num_heads} heads do not divide it")
    for key, side in zip(("h", "w"), backbone.patch, strict=True):
        if getattr(config.dataset, key) < side:
            _refuse(config, f"dataset.{key}", f"a patch is {side} wide")
    if bands := config.audio.keep_bands:
        first, stop = bands
        if first % backbone.freq_stride:
            remedy = f"the first must be a multiple of backbone.freq_stride={backbone.freq_stride}"
            _refuse(config, "audio.keep_bands", remedy)
        if stop > config.dataset.h or stop - first < backbone.patch[0]:
            _refuse(
                config,
                "audio.keep_bands",
                f"it must leave at least one patch ({backbone.patch[0]} bands) of "
                f"dataset.h={config.dataset.h}",
            )
    targets = backbone.lora_targets
    if not targets or len(set(targets)) < len(targets) or set(targets) - set("qkv"):
        _refuse(config, "backbone.lora_targets", "name some of q, k and v, each once")
    if backbone.adapter == "lora" and not backbone.trainable_blocks:
        _refuse(config, "backbone.trainable_blocks", "backbone.adapter=lora needs a block to adapt")
    if int(backbone.embed_dim * backbone.mlp_ratio) < 1:
        remedy = f"of backbone.embed_dim={backbone.embed_dim} it leaves no hidden unit"
        _refuse(config, "backbone.mlp_ratio", remedy)
    if backbone.weights == "audioset" and not backbone.weights_path:
        _refuse(config, "backbone.weights_path", "name the AudioSet checkpoint (hub, folder, .pth)")


def _check_audio(config: Any) -> None:
    audio, augment = config.audio, config.augment
    nyquist = audio.sample_rate / 2
    if audio.high_freq <= audio.low_freq:
        _refuse(config, "audio.high_freq", f"audio.low_freq is {audio.low_freq}")
    if audio.high_freq > nyquist:
        _refuse(config, "audio.high_freq", "it must not exceed half of audio.sample_rate")
    shortest = (audio.buckets or [audio.clip_seconds])[0]
    if audio.frame_length_ms > 1000 * shortest:
        _refuse(config, "audio.frame_length_ms", f"a clip has {1000 * shortest:g} ms")
    if audio.buckets is not None:
        _check_buckets(config)
    for key, samples in (("frame_length_ms", 2), ("frame_shift_ms", 1)):
        if int(audio.sample_rate * getattr(audio, key) * 0.001) < samples:
            _refuse(config, f"audio.{key}", f"it is shorter than {samples} samples")
    if augment.enabled and augment.vtlp_probability and augment.vtlp_fhi >= nyquist:
        _refuse(config, "augment.vtlp_fhi", "it must be below half of audio.sample_rate")


def _check_buckets(config: Any) -> None:
    audio, buckets = config.audio, config.audio.buckets
    if config.dataset.ready_made:
        _refuse(config, "audio.buckets", "ready-made spectrograms have one width; leave it null")
    if not buckets or buckets != sorted(set(buckets)) or buckets[-1] != audio.clip_seconds:
        remedy = f"list lengths in s, ascending, up to audio.clip_seconds={audio.clip_seconds:g}"
        _refuse(config, "audio.buckets", remedy)
    frames = round(config.dataset.w * buckets[0] / buckets[-1])
    if frames < config.backbone.patch[1]:
        remedy = f"the first leaves {frames} frames, and a patch is {config.backbone.patch[1]} wide"
        _refuse(config, "audio.buckets", remedy)


def _check_training(config: Any) -> None:
    training = config.training
    if training.warmup_epochs > training.epochs:
        _refuse(
            config,
            "training.warmup_epochs",
            f"warm-up is longer than the training (training.epochs={training.epochs}); lower it",
        )
    if training.label_smoothing and training.loss != "ce":
        _refuse(config, "training.label_smoothing", "it applies to training.loss=ce only")
    low, high = training.balance_bounds
    if not low <= 1 <= high:
        _refuse(config, "training.balance_bounds", "weights have mean 1; give low <= 1 <= high")
    if training.selection_groups and training.selection == "fixed":
        _refuse(config, "training.selection_groups", "selection 'fixed' chooses nothing; use []")
    if training.early_stopping_patience and training.selection == "fixed":
        _refuse(
            config,
            "training.early_stopping_patience",
            "selection 'fixed' has no score to stop by; use validation, or 0",
        )
    for key, value in (("selection", "fixed"), ("thresholds", "default")):
        if training.min_sensitivity and getattr(training, key) == value:
            _refuse(
                config, "training.min_sensitivity", f"{key} '{value}' chooses no thresholds; use 0"
            )
    if training.sam_rho and training.precision == "fp16":
        _refuse(config, "training.precision", "training.sam_rho has no loss scale; use bf16")
    if training.accumulation_steps > config.dataset.batch_size:
        _refuse(config, "training.accumulation_steps", "dataset.batch_size is smaller than that")
    if training.device == "cuda" or training.precision == "fp16":
        import torch

        if training.device == "cuda" and not torch.cuda.is_available():
            _refuse(config, "training.device", "torch sees no CUDA device; use cpu or auto")
        if training.precision == "fp16" and (
            training.device == "cpu" or not torch.cuda.is_available()
        ):
            _refuse(config, "training.precision", "fp16 needs a CUDA device; use bf16 or fp32")


def _refuse(config: Any, key: str, remedy: str) -> None:
    section, _, leaf = key.partition(".")
    shown = key.replace("model.", f"models.{config.variant}.", 1)
    refuse(shown, getattr(getattr(config, section), leaf), remedy)
