"""From plain values to a model: `build_model`."""

from __future__ import annotations

from collections.abc import Sequence

from models.ast import AST
from models.conditioned_ast import ConditionedAST, Head
from models.conditioner import ModelConfig
from models.pretrained import load_into, read_weights
from models.registry import VARIANTS
from utils.common.errors import UserError


def build_model(
    variant: str,
    model_config: ModelConfig,
    *,
    embed_dim: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    patch_size: int,
    freq_stride: int,
    time_stride: int,
    n_mels: int,
    n_frames: int,
    n_outputs: int,
    weights: str,
    weights_path: str | None,
    trainable_blocks: int,
    gradient_checkpointing: bool = False,
    device_counts: Sequence[float] | None = None,
    site_counts: Sequence[float] | None = None,
    layer_norm_eps: float = 1e-6,
) -> ConditionedAST:
    """Build a variant with its pretrained backbone and its frozen part frozen.

    Backbone and head are built before the conditioner, so that under one seed they start alike in
    all variants.

    Args:
        variant: a key of `VARIANTS`.
        model_config: section `models.<variant>`, an instance of the variant's config class.
        embed_dim ... time_stride: as `models.ast.AST`.
        n_mels, n_frames: size F x T of the spectrogram.
        n_outputs: logits K.
        weights, weights_path: as `models.pretrained.read_weights`.
        trainable_blocks: the last n blocks train; n >= depth freezes nothing.
        device_counts, site_counts: training cycles per value, as long as the vocabularies with
            their unknown entry.
        layer_norm_eps: of the backbone where no pretrained weights decide it.

    Raises:
        UserError: for an unknown variant, or weights that can not be had or do not fit.
    """
    if variant not in VARIANTS:
        raise UserError(f"models.{variant}: no such variant; there are {', '.join(VARIANTS)}")
    if embed_dim % num_heads:
        raise UserError(
            f"backbone.embed_dim: {embed_dim} is not a multiple of backbone.num_heads: {num_heads}"
        )
    if min(n_mels, n_frames) < patch_size:
        raise UserError(
            f"dataset.h x dataset.w: {n_mels} x {n_frames} holds no patch of "
            f"backbone.patch_size: {patch_size}"
        )
    if trainable_blocks < 0:
        raise UserError(f"backbone.trainable_blocks: {trainable_blocks} is negative")
    pretrained = read_weights(weights, weights_path)
    backbone = AST(
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        patch_size=patch_size,
        freq_stride=freq_stride,
        time_stride=time_stride,
        n_mels=n_mels,
        n_frames=n_frames,
        layer_norm_eps=pretrained.layer_norm_eps if pretrained else layer_norm_eps,
        gradient_checkpointing=gradient_checkpointing,
    )
    if pretrained:
        load_into(backbone, pretrained)
    head = Head(
        embed_dim,
        n_outputs,
        hidden=model_config.head_hidden_dim,
        dropout=model_config.dropout,
        act=model_config.activation,
    )
    conditioner = VARIANTS[variant].build(
        model_config,
        embed_dim=embed_dim,
        depth=depth,
        device_counts=device_counts,
        site_counts=site_counts,
    )
    return ConditionedAST(backbone, conditioner, head, trainable_blocks)
