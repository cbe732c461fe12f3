"""From sections of the configuration to a model: `build_model`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from models.ast import AST
from models.conditioned_ast import ConditionedAST, Head
from models.config import BackboneConfig, ModelConfig
from models.method import Methods
from models.pretrained import load_into, read_weights
from models.registry import METHODS, VARIANTS


def build_model(
    variant: str,
    model: ModelConfig,
    backbone: BackboneConfig,
    *,
    n_mels: int,
    n_frames: int,
    n_outputs: int,
    device_counts: Sequence[float],
    site_counts: Sequence[float],
    keep_bands: Sequence[int] | None = None,
    methods: Mapping[str, Any] | None = None,
    layer_norm_eps: float = 1e-6,
) -> ConditionedAST:
    """Build a variant with its pretrained backbone and its frozen part frozen.

    Backbone and head are built before the conditioner, so that under one seed they start equal in
    all variants.

    Args:
        variant: a key of `VARIANTS`.
        model: section `models.<variant>`, an instance of the variant's config class.
        backbone: section `backbone`.
        n_mels, n_frames: size F x T of the spectrogram.
        n_outputs: logits K.
        device_counts, site_counts: training cycles per value, as long as the vocabularies with
            their unknown entry.
        keep_bands: [first, stop] of the F bands that the transformer sees; None: all.
        methods: name -> section `methods.<name>`, in the order in which they act.
        layer_norm_eps: of the backbone where no pretrained weights decide it.

    Raises:
        UserError: the weights cannot be had or do not fit.
    """
    pretrained = read_weights(backbone.weights, backbone.weights_path)
    eps = pretrained.layer_norm_eps if pretrained else layer_norm_eps
    ast = AST(backbone, n_mels=n_mels, n_frames=n_frames, layer_norm_eps=eps)
    if pretrained:
        load_into(ast, pretrained, backbone.patch_init)
    if keep_bands:
        ast.keep_bands(*keep_bands)
    head = Head(model, backbone.embed_dim, n_outputs)
    conditioner = VARIANTS[variant].build(
        model,
        embed_dim=backbone.embed_dim,
        depth=backbone.depth,
        device_counts=device_counts,
        site_counts=site_counts,
    )
    n_devices = max(len(device_counts) - 1, 1)
    sizes = {"embed_dim": backbone.embed_dim, "n_devices": n_devices, "n_outputs": n_outputs}
    sizes |= {"n_mels": n_mels, "patch_rows": ast.grid[0]}
    added = Methods(METHODS[name].build(keys, **sizes) for name, keys in (methods or {}).items())
    if backbone.adapter == "lora":  # last, so that everything else starts as without
        ast.adapt(backbone)
    return ConditionedAST(ast, conditioner, head, backbone.trainable_blocks, added)
