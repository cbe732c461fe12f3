"""GRF-AST: gated residual fusion of metadata after the transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from data.batch import Metadata
from models.conditioner import ConditionState
from models.config import GRFConfig
from models.encoders import MetadataConditioner, MetadataEmbeddings, activation


class GRF(MetadataConditioner):
    """h~ = h + g m', m' = LN(W2 Drop(act(LN(W1 m)))), m = [e_dev; e_site; rest].

    The plainest way to use metadata: one learned scalar gate g weighs a projected metadata vector
    (D wide, as is the hidden layer) that is added to the pooled representation, after the
    transformer only. With g = 0 it is the plain AST.
    """

    def __init__(
        self,
        embeddings: MetadataEmbeddings,
        config: GRFConfig,
        *,
        embed_dim: int,
    ):
        super().__init__(embeddings)
        width = sum(embeddings.widths.values())
        self.project = nn.Sequential(
            nn.Linear(width, embed_dim),
            nn.LayerNorm(embed_dim),
            activation(config.activation),
            nn.Dropout(config.dropout_in_encoders),
            nn.Linear(embed_dim, embed_dim),
            nn.LayerNorm(embed_dim),
        )
        self.gate = nn.Parameter(torch.tensor(float(config.gate_init)))

    def encode(self, metadata: Metadata) -> ConditionState:
        m = torch.cat(list(self.embeddings(metadata).values()), dim=1)
        return ConditionState(fusion=self.project(m))

    def fuse(self, pooled: Tensor, state: ConditionState) -> Tensor:
        return pooled + self.gate * state.fusion

    def diagnostics(self) -> dict[str, float]:
        return {"grf/gate": float(self.gate.detach())}


def build(config: GRFConfig, *, embed_dim, depth, device_counts, site_counts) -> GRF:
    embeddings = MetadataEmbeddings(config, device_counts, site_counts)
    return GRF(embeddings, config, embed_dim=embed_dim)
