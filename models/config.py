"""Sections of the configuration that models/ reads, the variants and methods; without torch.

`BackboneConfig` is `backbone`, the others are `models.<variant>` and `methods.<name>`. Settings of
the shipped ones stand here so that a configuration can be read and refused at once; a new variant
or method keeps its own in its file (docs/adding_a_variant.md, docs/methods.md).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from data.task import FIELDS, SCALARS
from utils.common.settings import MAX_COUNT, MAX_SIZE, refuse, setting


@dataclass
class BackboneConfig:
    """The Audio Spectrogram Transformer all variants share."""

    # audioset | imagenet | none
    weights: str = setting("audioset", choices=("audioset", "imagenet", "none"))
    # audioset: hub name, local folder (transformers layout) or .pth file (original layout);
    # imagenet: a local timm file, or null for timm's hub
    weights_path: str | None = setting("MIT/ast-finetuned-audioset-10-10-0.4593", path=True)
    embed_dim: int = setting(768, low=1, high=MAX_SIZE)  # width D
    depth: int = setting(12, low=1, high=1000)  # blocks L
    num_heads: int = setting(12, low=1, high=MAX_SIZE)  # attention heads per block
    mlp_ratio: float = setting(4.0, low=0, high=64, ends="(]")  # hidden width of the MLP over D
    patch_size: Any = setting(16, low=1, high=4096)  # of a square patch, or [bands, frames]
    freq_stride: int = setting(10, low=1, high=4096)  # bands from one patch to the next
    time_stride: int = setting(10, low=1, high=4096)  # frames from one patch to the next
    # projection where patch_size is not the weights' own: random | resize (theirs, resampled) |
    # null (refused)
    patch_init: str | None = setting(None, choices=("random", "resize"))
    # the last n train; n >= depth freezes nothing
    trainable_blocks: int = setting(12, low=0, high=MAX_COUNT)
    # which of the positions along time a shorter clip gets (audio.buckets): the first | the middle
    bucket_positions: str = setting("start", choices=("start", "centre"))
    # none | lora (the blocks that train do so by low-rank adapters; embedding frozen)
    adapter: str = setting("none", choices=("none", "lora"))
    lora_rank: int = setting(8, low=1, high=MAX_SIZE)  # inner width of an adapter
    # projections of the attention that have one: of q, k, v
    lora_targets: list[str] = setting(["k", "v"])
    lora_scale: float = setting(8 / 96, low=0, ends="(]")  # factor on an adapter's product
    gradient_checkpointing: bool = False  # trades a third more compute for memory

    @property
    def patch(self) -> tuple[int, int]:
        """Bands and frames of a patch.

        Raises:
            UserError: `patch_size` is neither one number nor two.
        """
        size = self.patch_size
        sides = size if isinstance(size, list) else [size, size]
        if len(sides) != 2 or any(type(side) is not int for side in sides):
            refuse("backbone.patch_size", size, "give one whole number, or [bands, frames]")
        return tuple(sides)


@dataclass
class FusionConfig:
    """Finished runs fused into one model; `utils.runs.fuse` writes it."""

    kind: str = setting("gated", choices=("gated", "mean"))  # gated | mean (of the probabilities)
    title: str | None = None  # name in reports and tables
    members: list[str] = setting([])  # SHA-256 of the fused checkpoints; none: an ordinary run
    checkpoints: list[str] = setting([])  # where those lie


@dataclass
class ModelConfig:
    """Keys of `models.<variant>` that every variant has.

    label_dim, input_fdim and input_tdim follow from the dataset section; when they are given they
    are checked against it.
    """

    label_dim: int | None = None  # logits; follows from dataset.n_cls and training.loss
    input_fdim: int | None = None  # mel bands; follows from dataset.h
    input_tdim: int | None = None  # frames; follows from dataset.w
    # in the head; in the metadata encoders unless encoder_dropout is set
    dropout: float = setting(0.4, low=0, high=1, ends="[)")
    # relu | gelu, in the head and in the metadata encoders
    activation: str = setting("relu", choices=("relu", "gelu"))
    # width of the head's hidden layer; 0: no hidden layer
    head_hidden_dim: int = setting(64, low=0, high=MAX_SIZE)

    def check(self, prefix: str, depth: int) -> None:
        """Refuse what the ranges cannot say, for a backbone of `depth` blocks; prefix as in
        `models.ast_film`.

        Raises:
            UserError: names the key.
        """


@dataclass
class ConditionedConfig(ModelConfig):
    """Keys that every metadata-conditioned variant has."""

    # width of the device embedding (a LayerNorm over one feature would erase it)
    dev_embed_dim: int = setting(8, low=2, high=MAX_SIZE)
    # width of the auscultation-site embedding
    site_embed_dim: int = setting(8, low=2, high=MAX_SIZE)
    rest_dim: int = setting(3, choices=(len(SCALARS),))  # scalars: age, BMI, duration; checked
    # probability per field and clip of hiding it in training
    metadata_dropout: float = setting(0.0, low=0, high=1, ends="[)")
    # other probabilities of some fields, such as {device: 0.5}
    metadata_dropout_fields: dict[str, float] = setting({})
    # probability per clip of hiding all fields at once in training
    metadata_dropout_joint: float = setting(0.0, low=0, high=1, ends="[)")
    # fields that are conditioned on; a subset is a factor ablation
    metadata_fields: list[str] = setting(list(FIELDS))
    # in the metadata encoders; null: dropout
    encoder_dropout: float | None = setting(None, low=0, high=1, ends="[)")

    @property
    def dropout_in_encoders(self) -> float:
        """`encoder_dropout`, or `dropout` where it is not set."""
        return self.dropout if self.encoder_dropout is None else self.encoder_dropout

    def hidden(self, name: str) -> float:
        """Probability of hiding this field by itself in training."""
        return self.metadata_dropout_fields.get(name, self.metadata_dropout)

    @property
    def factors(self) -> tuple[str, ...]:
        """Enabled factors: device, site, rest (the scalars), in this order."""
        rest = set(SCALARS) & set(self.metadata_fields)
        names = [name for name in ("device", "site") if name in self.metadata_fields]
        return (*names, "rest") if rest else tuple(names)

    def check(self, prefix: str, depth: int) -> None:
        unknown = [name for name in self.metadata_fields if name not in FIELDS]
        if unknown or not self.metadata_fields:
            refuse(
                f"{prefix}.metadata_fields",
                self.metadata_fields,
                f"{', '.join(unknown)} is none; " * bool(unknown)
                + f"name at least one of {', '.join(FIELDS)}",
            )
        for name, share in self.metadata_dropout_fields.items():
            key = f"{prefix}.metadata_dropout_fields"
            if name not in self.metadata_fields:
                refuse(key, self.metadata_dropout_fields, f"{name} is not in metadata_fields")
            if not 0 <= share < 1:
                refuse(key, self.metadata_dropout_fields, "each must be at least 0, below 1")


@dataclass
class GRFConfig(ConditionedConfig):
    """Keys of `models.ast_grf`."""

    gate_init: float = 0.5  # start of the learned gate g


@dataclass
class FiLMConfig(ConditionedConfig):
    """Keys of `models.ast_film`."""

    film_hidden_dim: int = setting(64, low=1, high=MAX_SIZE)  # width of h_m
    conditioned_layers: Any = "all"  # list of block indices, or all | last_2 | last_6

    def check(self, prefix: str, depth: int) -> None:
        super().check(prefix, depth)
        resolve_layers(self.conditioned_layers, depth, prefix)


@dataclass
class TAFiLMConfig(FiLMConfig):
    """Keys of `models.ast_tafilm`."""


@dataclass
class SoftFiLMConfig(FiLMConfig):
    """Keys of `models.ast_softfilm`."""

    mask_init_scale: float = 2.0  # mask logits: + on a factor's own third of D, - elsewhere
    # weight of the mean pairwise overlap in the loss
    mask_overlap_lambda: float = setting(0.01, low=0)
    # weight of mean(1 - max_k w_k); the authors' code: 0.005
    mask_coverage_lambda: float = setting(0.0, low=0)
    per_layer_masks: bool = False  # separate masks for every conditioned block
    # sigmoid (factors independent) | softmax (over factors)
    mask_mode: str = setting("sigmoid", choices=("sigmoid", "softmax"))
    mask_temperature: float = setting(1.0, low=0.1)  # tau, at least 0.1
    mask_annealing: bool = False  # tau: constant for five epochs, then along a cosine to 0.2
    # epoch count of that schedule; set it to training.epochs
    mask_annealing_epochs: int = setting(100, low=1, high=MAX_COUNT)
    mask_lr_multiplier: float = setting(10.0, low=0)  # on training.lr; masks have no weight decay

    def check(self, prefix: str, depth: int) -> None:
        super().check(prefix, depth)
        if self.mask_mode == "softmax" and len(self.factors) == 1:
            refuse(
                f"{prefix}.mask_mode",
                self.mask_mode,
                "over one factor it is 1 whatever its mask, which then never trains; use sigmoid, "
                "or metadata_fields of more than one factor (device, site, and age, BMI and "
                "duration together)",
            )


@dataclass
class ADDRSCConfig:
    """Keys of `methods.add_rsc`; the defaults are the authors' code."""

    # of the bias-denoising loss; the task loss weighs the rest of 1
    weight: float = setting(0.5, low=0, high=1)
    # what the filter makes of the spectrum: added to the signal | multiplied with it (paper)
    spectrum: str = setting("added", choices=("added", "multiplied"))
    softshrink: float = setting(0.01, low=0)  # threshold in the filter; paper: 0.02
    second_filter: bool = False  # another one after the attention (paper)
    # frames whose mean the bias-denoising loss classifies: first (two) | all
    evidence: str = setting("first", choices=("first", "all"))


@dataclass
class PatchMixConfig:
    """Keys of `methods.patchmix_cl`."""

    loss: str = setting("contrast", choices=("contrast", "ce"))  # CL, or Patch-Mix CE
    temperature: float = setting(0.06, low=0, ends="()")  # of the contrast
    weight: float = setting(1.0, low=0)  # of the contrast in the loss
    beta: float = setting(1.0, low=0, ends="(]")  # share kept ~ Beta(beta, beta)


@dataclass
class SGSCLConfig:
    """Keys of `methods.sg_scl`."""

    temperature: float = setting(0.06, low=0, ends="()")  # of the contrast
    weight: float = setting(1.0, low=0)  # of the contrast in the loss


@dataclass
class DATConfig:
    """Keys of `methods.dat`."""

    weight: float = setting(1.0, low=0)  # of the device loss
    alpha: float = setting(1.0, low=0)  # factor of the reversed gradient (at the end of `ganin`)
    schedule: str = setting("constant", choices=("constant", "ganin"))  # of alpha


@dataclass
class PAFAConfig:
    """Keys of `methods.pafa`; the defaults are the authors' for the AST."""

    pcsl_weight: float = setting(5.0, low=0)  # patient cohesion and separation
    gpal_weight: float = setting(0.005, low=0)  # global patient alignment


@dataclass
class PriorProductConfig:
    """Keys of `methods.prior_product`."""

    strength: float = setting(1.0, low=0)  # factor on the prior's logits; 0: off
    # linear | trees (combinations of fields)
    learner: str = setting("linear", choices=("linear", "trees"))
    fields: list[str] = setting(list(FIELDS), choices=FIELDS)  # that the prior sees
    folds: int = setting(5, low=2, high=1000)  # of patients, of the cross-fitting


@dataclass
class GroupDROConfig:
    """Keys of `methods.group_dro`."""

    step_size: float = setting(0.01, low=0)  # eta of the groups' exponentiated gradient
    strength: float = setting(1.0, low=0, high=1)  # share of the groups' weights; 0: off
    adjustment: float = setting(0.0, low=0)  # C of C / sqrt(n_g), added to a group's loss


@dataclass
class StructuredPatchoutConfig:
    """Keys of `methods.structured_patchout`; on AudioSet the authors leave out 4 of 12 rows and 40
    of 99 columns."""

    freq_share: float = setting(0.34, low=0, high=1, ends="[)")  # of the rows of patches, left out
    time_share: float = setting(0.4, low=0, high=1, ends="[)")  # of the columns, left out


@dataclass
class TimeDomainConfig:
    """Keys of `methods.time_domain`; the sizes are wav2vec2-base's."""

    # hub name or local folder (transformers layout); null: random
    weights: str | None = setting(None, path=True)
    embed_dim: int = setting(768, low=1, high=MAX_SIZE)  # width of the tokens
    depth: int = setting(12, low=1, high=1000)  # blocks
    num_heads: int = setting(12, low=1, high=MAX_SIZE)  # attention heads per block
    conv_dim: int = setting(512, low=1, high=MAX_SIZE)  # channels of the seven convolutions


def resolve_layers(value: Any, depth: int, prefix: str = "models.*") -> tuple[int, ...]:
    """`conditioned_layers` -> ascending block indices.

    Args:
        value: a list of indices in 0..depth-1, or "all", "last_2", "last_6" (any last_<n>).
        depth: blocks of the backbone.
        prefix: of the key, such as models.ast_film.

    Raises:
        UserError: for anything else.
    """
    layers: list[Any] | None = None
    if value == "all":
        layers = list(range(depth))
    elif isinstance(value, str) and (match := re.fullmatch(r"last_(\d+)", value)):
        layers = list(range(depth - int(match[1]), depth))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        layers = list(value)
    valid = layers and all(type(i) is int and 0 <= i < depth for i in layers)
    if not valid:
        refuse(
            f"{prefix}.conditioned_layers",
            value,
            f"it does not name blocks of a backbone with {depth}; give a list of indices in "
            f"0..{depth - 1}, all, last_2 or last_6",
        )
    return tuple(sorted(set(layers)))


class Variant(NamedTuple):
    """One model variant.

    Attributes:
        name: key under `models` in a configuration, such as ast_film.
        short: name of its checkpoint and in tables, such as film.
        title: name in figures, such as FiLM-AST.
        config_class: dataclass of the keys of `models.<name>`, a subclass of `ModelConfig`.
        module: the module whose `build(config, *, embed_dim, depth, device_counts, site_counts)`
            gives the `Conditioner`. The counts (lists as long as the vocabularies with their
            unknown entry, or None) say how many training cycles have each value.
        script, config_file: the script that trains it and its configuration.
        order: place in lists and tables; the paper's variants are 0..4.
    """

    name: str
    short: str
    title: str
    config_class: type[ModelConfig]
    module: str
    script: str
    config_file: str
    order: int = 100

    @property
    def build(self) -> Callable[..., Any]:
        """The module's `build`; imports torch."""
        return importlib.import_module(self.module).build


class MethodType(NamedTuple):
    """One method; further modules in `models/methods/` that hold one as `METHOD` are discovered.

    Attributes:
        name: key under `methods` in a configuration, such as patchmix_cl.
        title: name in tables, such as Patch-Mix CL.
        config_class: dataclass of the keys of `methods.<name>`.
        build: build(config, *, embed_dim, n_devices, n_outputs, n_mels, patch_rows) ->
            `models.method.Method`.
        adds_rows: whether views or mixes make the batch longer; at most one method may.
        removes: metadata fields that the features are to know nothing of.
        bands_multiple: dataset.h must be a multiple of it.
        augmented_views: whether it compares views of a clip that only augmentation tells apart.
        hears: whether it needs waveforms, of 16 kHz.
    """

    name: str
    title: str
    config_class: type
    build: Callable[..., Any]
    adds_rows: bool = False
    removes: tuple[str, ...] = ()
    bands_multiple: int = 1
    augmented_views: bool = False
    hears: bool = False


_HOME = "models.conditioners"
SHIPPED: tuple[Variant, ...] = (
    Variant(
        *("ast", "ast", "AST", ModelConfig, f"{_HOME}.none"),
        *("ast_train.py", "configs/ast_config.yaml", 0),
    ),
    Variant(
        *("ast_grf", "grf", "GRF-AST", GRFConfig, f"{_HOME}.grf"),
        *("ast_meta_fus_train.py", "configs/ast_fus_config.yaml", 1),
    ),
    Variant(
        *("ast_film", "film", "FiLM-AST", FiLMConfig, f"{_HOME}.film"),
        *("ast_film_train.py", "configs/ast_film_config.yaml", 2),
    ),
    Variant(
        *("ast_tafilm", "tafilm", "TAFiLM-AST", TAFiLMConfig, f"{_HOME}.tafilm"),
        *("ast_tafilm_train.py", "configs/ast_tafilm_config.yaml", 3),
    ),
    Variant(
        *("ast_softfilm", "softfilm", "SoftFiLM-AST", SoftFiLMConfig, f"{_HOME}.softfilm"),
        *("ast_film_soft.py", "configs/ast_film_soft_config.yaml", 4),
    ),
)


def _shipped(name: str, *given: Any, **traits: Any) -> MethodType:
    """The method in models/methods/<name>.py, whose `build` imports torch when it is called."""

    def build(*arguments: Any, **sizes: int) -> Any:
        return importlib.import_module(f"models.methods.{name}").build(*arguments, **sizes)

    return MethodType(name, *given, build, **traits)


SHIPPED_METHODS: tuple[MethodType, ...] = (
    _shipped("add_rsc", "ADD-RSC", ADDRSCConfig, bands_multiple=8),
    _shipped("dat", "DAT", DATConfig, removes=("device",)),
    _shipped("group_dro", "group DRO", GroupDROConfig),
    _shipped("pafa", "PAFA", PAFAConfig),
    _shipped("patchmix_cl", "Patch-Mix CL", PatchMixConfig, adds_rows=True),
    _shipped("prior_product", "prior product", PriorProductConfig),
    _shipped("sg_scl", "SG-SCL", SGSCLConfig, adds_rows=True, augmented_views=True),
    _shipped("structured_patchout", "Structured patchout", StructuredPatchoutConfig),
    _shipped("time_domain", "time domain", TimeDomainConfig, hears=True),
)
