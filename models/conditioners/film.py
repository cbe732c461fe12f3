"""FiLM-AST: feature-wise linear modulation of the transformer's blocks by metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.batch import Metadata
from models.conditioner import ConditionState, Modulation, Variant
from models.encoders import (
    ConditionedConfig,
    FactorEncoder,
    MetadataEmbeddings,
    ScalarEncoder,
    build_embeddings,
)
from models.modulation import Generators, ModulatingConditioner, resolve_layers


@dataclass
class FiLMConfig(ConditionedConfig):
    """Keys of `models.ast_film`."""

    film_hidden_dim: int = 64  # width of h_m
    conditioned_layers: Any = "all"  # list of block indices, or all | last_2 | last_6


class FiLM(ModulatingConditioner):
    """u <- (1 + dg_l) * u + b_l, [dg_l; b_l] = G_l h_m (Perez et al., AAAI 2018, arXiv 1709.07871).

    h_m = act(W2 Drop(act(W1 LN(m)))), m = [e_dev; e_site; rest32], rest32 from `ScalarEncoder`.
    All tokens of a conditioned block l are modulated alike, after LN2 and before the MLP. The
    generators G_l start at zero, so training starts from the plain AST.
    """

    def __init__(
        self,
        embeddings: MetadataEmbeddings,
        *,
        embed_dim: int,
        depth: int,
        layers: Sequence[int],
        hidden_dim: int = 64,
        dropout: float = 0.4,
        act: str = "relu",
    ):
        super().__init__(embeddings, layers=layers, depth=depth)
        widths = dict(embeddings.widths)
        if embeddings.scalars:
            self.scalar_encoder = ScalarEncoder(len(embeddings.scalars), dropout=dropout, act=act)
            widths["rest"] = ScalarEncoder.WIDTH
        self.encoder = FactorEncoder(sum(widths.values()), hidden_dim, dropout=dropout, act=act)
        self.generators = Generators(len(layers), hidden_dim, embed_dim)

    def hidden(self, metadata: Metadata) -> Tensor:
        """h_m [B, H]."""
        parts = self.embeddings(metadata)
        if "rest" in parts:
            parts["rest"] = self.scalar_encoder(parts["rest"])
        return self.encoder(torch.cat(list(parts.values()), dim=1))

    def encode(self, metadata: Metadata) -> ConditionState:
        out = self.generators(self.hidden(metadata))  # [B, L, 2, D]
        scale, shift = out.unsqueeze(3).unbind(2)  # [B, L, 1, D] each
        return self.state(map(Modulation, scale.unbind(1), shift.unbind(1)))


def film_arguments(config: FiLMConfig, variant: str, *, embed_dim: int, depth: int) -> dict:
    """Arguments that FiLM, TAFiLM and SoftFiLM take from their section of the configuration."""
    return {
        "embed_dim": embed_dim,
        "depth": depth,
        "layers": resolve_layers(config.conditioned_layers, depth, variant),
        "hidden_dim": config.film_hidden_dim,
        "dropout": config.dropout,
        "act": config.activation,
    }


def _build(config: FiLMConfig, *, embed_dim, depth, device_counts, site_counts) -> FiLM:
    embeddings = build_embeddings(config, device_counts=device_counts, site_counts=site_counts)
    return FiLM(embeddings, **film_arguments(config, "ast_film", embed_dim=embed_dim, depth=depth))


VARIANT = Variant("ast_film", "film", "FiLM-AST", FiLMConfig, _build, order=2)
