"""Contradictions in a configuration, found before anything is read.

Each complaint names the key, its value and the remedy.
"""

from __future__ import annotations

import math
from typing import Any

from utils.common.errors import UserError
from utils.tracking import check_tracking_uri

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

MAX_SEED = 2**32 - 1  # the range that every generator takes

# key: (lowest, highest, ends), ends as intervals are written: "[" and "]" belong to the range, "("
# and ")" do not. None: unbounded. Keys of `model` are checked where the variant has them.
RANGES: dict[str, tuple[float, float | None, str]] = {
    "dataset.test_fraction": (0, 1, "()"),
    "dataset.val_fraction": (0, 1, "()"),
    "dataset.batch_size": (1, None, "[]"),
    "dataset.val_seed": (0, MAX_SEED, "[]"),
    "dataset.split_seed": (0, MAX_SEED, "[]"),
    "training.seed": (0, MAX_SEED, "[]"),
    "dataset.h": (1, None, "[]"),
    "dataset.w": (1, None, "[]"),
    "dataset.store_workers": (0, 1024, "[]"),
    "audio.sample_rate": (1000, 384_000, "[]"),
    "audio.clip_seconds": (0, 600, "(]"),
    "audio.frame_length_ms": (0, 1000, "(]"),
    "audio.frame_shift_ms": (0, None, "(]"),
    "audio.low_freq": (0, None, "[]"),
    "audio.std": (0, None, "(]"),
    "augment.noise_probability": (0, 1, "[]"),
    "augment.noise_rms": (0, None, "[]"),
    "augment.speed_probability": (0, 1, "[]"),
    "augment.loudness_probability": (0, 1, "[]"),
    "augment.vtlp_probability": (0, 1, "[]"),
    "augment.vtlp_fhi": (0, None, "(]"),
    "augment.specaugment_probability": (0, 1, "[]"),
    "augment.freq_masks": (0, None, "[]"),
    "augment.freq_mask_width": (1, None, "[]"),
    "augment.time_masks": (0, None, "[]"),
    "augment.time_mask_width": (1, None, "[]"),
    "backbone.embed_dim": (1, None, "[]"),
    "backbone.depth": (1, None, "[]"),
    "backbone.num_heads": (1, None, "[]"),
    "backbone.mlp_ratio": (0, None, "(]"),
    "backbone.patch_size": (1, None, "[]"),
    "backbone.freq_stride": (1, None, "[]"),
    "backbone.time_stride": (1, None, "[]"),
    "backbone.trainable_blocks": (0, None, "[]"),
    "model.dropout": (0, 1, "[)"),
    "model.head_hidden_dim": (1, None, "[]"),
    "model.dev_embed_dim": (1, None, "[]"),
    "model.site_embed_dim": (1, None, "[]"),
    "model.film_hidden_dim": (1, None, "[]"),
    "model.mask_overlap_lambda": (0, None, "[]"),
    "model.mask_coverage_lambda": (0, None, "[]"),
    "model.mask_temperature": (0.1, None, "[]"),
    "model.mask_annealing_epochs": (1, None, "[]"),
    "model.mask_lr_multiplier": (0, None, "[]"),
    "training.epochs": (1, None, "[]"),
    "training.lr": (0, None, "(]"),
    "training.warmup_epochs": (0, None, "[]"),
    "training.weight_decay": (0, None, "[]"),
    "training.sensitivity_bias": (0, None, "(]"),
    "training.grad_clip": (0, None, "[]"),
    "training.accumulation_steps": (1, None, "[]"),
    "training.focal_gamma": (0, None, "[]"),
    "training.asymmetric_gamma_pos": (0, None, "[]"),
    "training.asymmetric_gamma_neg": (0, None, "[]"),
    "training.asymmetric_clip": (0, 1, "[)"),
    "training.label_smoothing": (0, 1, "[)"),
    "training.min_sensitivity": (0, 1, "[]"),
    "training.early_stopping_patience": (0, None, "[]"),
    "training.checkpoint_minutes": (0, None, "[]"),
}

INTERVALS = (
    "augment.noise_snr_db",
    "augment.speed_range",
    "augment.loudness_range",
    "augment.vtlp_range",
)


def validate(config: Any) -> None:
    """Raise `UserError` for the first contradiction in a `utils.config.schema.RunConfig`."""
    _check_leaves(config)
    for key, choices in CHOICES.items():
        if _value(config, key) not in choices:
            _refuse(config, key, f"it must be one of {', '.join(map(str, choices))}")
    for key, (low, high, ends) in RANGES.items():
        value = _value(config, key, default=low)  # not every variant has every key of `model`
        below = value < low or (value == low and ends[0] == "(")
        above = high is not None and (value > high or (value == high and ends[1] == ")"))
        if below or above:
            bounds = f"{'at least' if ends[0] == '[' else 'above'} {low}"
            if high is not None:
                bounds += f", {'at most' if ends[1] == ']' else 'below'} {high}"
            _refuse(config, key, f"it must be {bounds}")
    for key in INTERVALS:
        interval = _value(config, key)
        if interval is not None and (len(interval) != 2 or interval[0] > interval[1]):
            _refuse(config, key, "it must be [low, high] with low <= high")
    for key in ("augment.speed_range", "augment.vtlp_range"):
        low, high = _value(config, key)
        if low < 0.1 or high > 10:
            _refuse(config, key, "factors must be at least 0.1, at most 10")
    if config.augment.loudness_range[0] <= 0:
        _refuse(config, "augment.loudness_range", "factors must be above 0")
    if config.training.loss == "ce" and config.dataset.n_cls != 4:
        _refuse(config, "training.loss", "ce is over the four classes; set dataset.n_cls=4 or bce")
    check_tracking_uri(config.mlflow.tracking_uri)
    _check_shapes(config)
    _check_audio(config)
    _check_training(config)


def _check_leaves(config: Any) -> None:
    """No NaN (which passes every comparison), no infinity, no empty text."""
    for section in ("dataset", "audio", "augment", "backbone", "model", "training", "mlflow"):
        for leaf, value in vars(getattr(config, section)).items():
            numbers = value if isinstance(value, list) else [value]
            if any(isinstance(x, float) and not math.isfinite(x) for x in numbers):
                _refuse(config, f"{section}.{leaf}", "it must be finite")
            if value == "":
                _refuse(config, f"{section}.{leaf}", "it is empty; name one, or leave the key out")


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
    if int(backbone.embed_dim * backbone.mlp_ratio) < 1:
        _refuse(config, "backbone.mlp_ratio", f"of backbone.embed_dim={backbone.embed_dim} it "
                "leaves no hidden unit")  # fmt: skip
    if backbone.weights == "audioset" and not backbone.weights_path:
        _refuse(config, "backbone.weights_path", "name the AudioSet checkpoint (hub, folder, .pth)")


def _check_audio(config: Any) -> None:
    audio, augment = config.audio, config.augment
    nyquist = audio.sample_rate / 2
    if audio.high_freq <= audio.low_freq:
        _refuse(config, "audio.high_freq", f"audio.low_freq is {audio.low_freq}")
    if audio.high_freq > nyquist:
        _refuse(config, "audio.high_freq", "it must not exceed half of audio.sample_rate")
    if audio.frame_length_ms > 1000 * audio.clip_seconds:
        _refuse(config, "audio.frame_length_ms", f"a clip has {1000 * audio.clip_seconds:g} ms")
    for key, samples in (("frame_length_ms", 2), ("frame_shift_ms", 1)):
        if int(audio.sample_rate * getattr(audio, key) * 0.001) < samples:
            _refuse(config, f"audio.{key}", f"it is shorter than {samples} samples")
    if augment.enabled and augment.vtlp_probability and augment.vtlp_fhi >= nyquist:
        _refuse(config, "augment.vtlp_fhi", "it must be below half of audio.sample_rate")


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


def _value(config: Any, key: str, **default: Any) -> Any:
    section, _, leaf = key.partition(".")
    return getattr(getattr(config, section), leaf, *default.values())


def _refuse(config: Any, key: str, remedy: str) -> None:
    value = _value(config, key)
    shown = key.replace("model.", f"models.{config.variant}.", 1)
    raise UserError(f"{shown}={value} can not be: {remedy}")
