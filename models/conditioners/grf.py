"""GRF-AST: gated residual fusion of metadata behind the transformer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.batch import Metadata
from models.conditioner import ConditionState, Variant
from models.encoders import (
    ConditionedConfig,
    MetadataConditioner,
    MetadataEmbeddings,
    activation,
    build_embeddings,
)


@dataclass
class GRFConfig(ConditionedConfig):
    """Keys of `models.ast_grf`."""

    gate_init: float = 0.5  # start of the learned gate g


class GRF(MetadataConditioner):
    """h~ = h + g m', m' = LN(W2 Drop(act(LN(W1 m)))), m = [e_dev; e_site; rest].

    The plainest way to use metadata: one learned scalar gate g weighs a projected metadata vector
    (D wide, as is the hidden layer) that is added to the pooled representation, after the
    transformer only. With g = 0 it is the plain AST.
    """

    def __init__(
        self,
        embeddings: MetadataEmbeddings,
        *,
        embed_dim: int,
        dropout: float = 0.4,
        act: str = "relu",
        gate_init: float = 0.5,
    ):
        super().__init__(embeddings)
        width = sum(embeddings.widths.values())
        self.project = nn.Sequential(
            nn.Linear(width, embed_dim),
            nn.LayerNorm(embed_dim),
            activation(act),
            nn.Dropout(dropout),
            nn.Linear(embed_dim, embed_dim),
            nn.LayerNorm(embed_dim),
        )
        self.gate = nn.Parameter(torch.tensor(float(gate_init)))

    def encode(self, metadata: Metadata) -> ConditionState:
        m = torch.cat(list(self.embeddings(metadata).values()), dim=1)
        return ConditionState(fusion=self.project(m))

    def fuse(self, pooled: Tensor, state: ConditionState) -> Tensor:
        return pooled + self.gate * state.fusion

    def diagnostics(self) -> dict[str, float]:
        return {"grf/gate": float(self.gate.detach())}


def _build(config: GRFConfig, *, embed_dim, depth, device_counts, site_counts) -> GRF:
    return GRF(
        build_embeddings(config, device_counts=device_counts, site_counts=site_counts),
        embed_dim=embed_dim,
        dropout=config.dropout,
        act=config.activation,
        gate_init=config.gate_init,
    )


VARIANT = Variant("ast_grf", "grf", "GRF-AST", GRFConfig, _build, order=1)
