"""Contradictions in a configuration, found before anything is read.

Each complaint names the key, its value and the remedy.
"""

from __future__ import annotations

from typing import Any

from utils.errors import UserError
from utils.mlflow_store import check_tracking_uri

CHOICES = {
    "dataset.name": ("icbhi",),
    "dataset.class_split": ("lungsound",),
    "dataset.split_strategy": ("official", "official_disjoint", "foldwise", "random"),
    "dataset.n_cls": (4, 2),
    "dataset.test_fold": (0, 1, 2, 3, 4),
    "dataset.on_bad_recording": ("error", "skip"),
    "audio.resampler": ("torchaudio", "soxr_hq"),
    "audio.pad_type": ("repeat", "zero"),
    "audio.fit": ("stretch", "pad"),
    "backbone.weights": ("audioset", "imagenet", "none"),
    "training.loss": ("bce", "focal", "asymmetric", "ce"),
    "training.sampler": ("shuffle", "balanced"),
    "training.selection": ("validation", "fixed", "test"),
    "training.device": ("auto", "cpu", "cuda"),
    "training.precision": ("auto", "fp32", "bf16", "fp16"),
    "training.compile": ("auto", "true", "false"),
    "training.resume": ("auto", "never"),
    "model.activation": ("relu", "gelu"),
}

# key: (lowest, highest, is the lowest itself allowed); None: unbounded
RANGES = {
    "dataset.test_fraction": (0, 1, False),
    "dataset.val_fraction": (0, 1, False),
    "dataset.batch_size": (1, None, True),
    "dataset.val_seed": (0, None, True),
    "dataset.split_seed": (0, None, True),
    "training.seed": (0, None, True),
    "dataset.h": (1, None, True),
    "dataset.w": (1, None, True),
    "dataset.store_workers": (0, None, True),
    "audio.sample_rate": (1000, None, True),
    "audio.clip_seconds": (0, None, False),
    "audio.frame_length_ms": (0, None, False),
    "audio.frame_shift_ms": (0, None, False),
    "audio.low_freq": (0, None, True),
    "audio.std": (0, None, False),
    "augment.noise_probability": (0, 1, True),
    "augment.noise_rms": (0, None, True),
    "augment.speed_probability": (0, 1, True),
    "augment.loudness_probability": (0, 1, True),
    "augment.vtlp_probability": (0, 1, True),
    "augment.vtlp_fhi": (0, None, False),
    "augment.specaugment_probability": (0, 1, True),
    "augment.freq_masks": (0, None, True),
    "augment.freq_mask_width": (1, None, True),
    "augment.time_masks": (0, None, True),
    "augment.time_mask_width": (1, None, True),
    "backbone.embed_dim": (1, None, True),
    "backbone.depth": (1, None, True),
    "backbone.num_heads": (1, None, True),
    "backbone.mlp_ratio": (0, None, False),
    "backbone.patch_size": (1, None, True),
    "backbone.freq_stride": (1, None, True),
    "backbone.time_stride": (1, None, True),
    "backbone.trainable_blocks": (0, None, True),
    "model.dropout": (0, 1, True),
    "model.head_hidden_dim": (1, None, True),
    "training.epochs": (1, None, True),
    "training.lr": (0, None, False),
    "training.warmup_epochs": (0, None, True),
    "training.weight_decay": (0, None, True),
    "training.sensitivity_bias": (0, None, False),
    "training.grad_clip": (0, None, True),
    "training.accumulation_steps": (1, None, True),
    "training.focal_gamma": (0, None, True),
    "training.asymmetric_gamma_pos": (0, None, True),
    "training.asymmetric_gamma_neg": (0, None, True),
    "training.asymmetric_clip": (0, 1, True),
    "training.label_smoothing": (0, 1, True),
    "training.min_sensitivity": (0, 1, True),
    "training.early_stopping_patience": (0, None, True),
    "training.checkpoint_minutes": (0, None, True),
}

INTERVALS = (
    "augment.noise_snr_db",
    "augment.speed_range",
    "augment.loudness_range",
    "augment.vtlp_range",
)


def validate(config: Any) -> None:
    """Raise `UserError` for the first contradiction in a `utils.config.RunConfig`."""
    for key, choices in CHOICES.items():
        if _value(config, key) not in choices:
            _refuse(config, key, f"it must be one of {', '.join(map(str, choices))}")
    for key, (low, high, closed) in RANGES.items():
        value = _value(config, key)
        below = value < low or (value == low and not closed)
        if below or (high is not None and value > high):
            bounds = f"at least {low}" if closed else f"above {low}"
            _refuse(config, key, f"it must be {bounds}" + (f", at most {high}" if high else ""))
    for key in INTERVALS:
        interval = _value(config, key)
        if interval is not None and (len(interval) != 2 or interval[0] > interval[1]):
            _refuse(config, key, "it must be [low, high] with low <= high")
    for key in ("augment.speed_range", "augment.loudness_range", "augment.vtlp_range"):
        if _value(config, key)[0] <= 0:
            _refuse(config, key, "factors must be above 0")
    if config.training.loss == "ce" and config.dataset.n_cls != 4:
        _refuse(config, "training.loss", "ce is over the four classes; set dataset.n_cls=4 or bce")
    check_tracking_uri(config.mlflow.tracking_uri)
    _check_shapes(config)
    _check_training(config)


def _check_shapes(config: Any) -> None:
    outputs = len(config.task.outputs)
    for key, derived, source in (
        ("label_dim", outputs, f"dataset.n_cls={config.dataset.n_cls} with this loss"),
        ("input_fdim", config.dataset.h, f"dataset.h={config.dataset.h}"),
        ("input_tdim", config.dataset.w, f"dataset.w={config.dataset.w}"),
    ):
        given = getattr(config.model, key)
        if given is not None and given != derived:
            _refuse(
                config,
                f"model.{key}",
                f"{source} makes it {derived}; leave it out, or make them agree",
            )
    backbone = config.backbone
    if backbone.embed_dim % backbone.num_heads:
        _refuse(config, "backbone.embed_dim", f"{backbone.num_heads} heads do not divide it")
    for key in ("h", "w"):
        if getattr(config.dataset, key) < backbone.patch_size:
            _refuse(config, f"dataset.{key}", f"a patch is {backbone.patch_size} wide")
    if config.audio.high_freq <= config.audio.low_freq:
        _refuse(config, "audio.high_freq", f"audio.low_freq is {config.audio.low_freq}")
    if config.audio.high_freq > config.audio.sample_rate / 2:
        _refuse(config, "audio.high_freq", "it must not exceed half of audio.sample_rate")
    if backbone.weights == "audioset" and not backbone.weights_path:
        _refuse(config, "backbone.weights_path", "name the AudioSet checkpoint (hub, folder, .pth)")


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
    if training.early_stopping_patience and training.selection == "fixed":
        _refuse(
            config,
            "training.early_stopping_patience",
            "selection 'fixed' has no score to stop by; use validation, or 0",
        )
    if training.min_sensitivity and training.selection == "fixed":
        _refuse(
            config, "training.min_sensitivity", "selection 'fixed' chooses no thresholds; use 0"
        )
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


def _value(config: Any, key: str) -> Any:
    section, _, leaf = key.partition(".")
    return getattr(getattr(config, section), leaf)


def _refuse(config: Any, key: str, remedy: str) -> None:
    value = _value(config, key)
    shown = key.replace("model.", f"models.{config.variant}.", 1)
    raise UserError(f"{shown}={value} can not be: {remedy}")
