"""FiLM-AST: feature-wise linear modulation of the transformer's blocks by metadata."""

from __future__ import annotations

import torch
from torch import Tensor

from data.batch import Metadata
from models.conditioner import ConditionState, Modulation
from models.config import FiLMConfig
from models.encoders import FactorEncoder, MetadataEmbeddings, ScalarEncoder
from models.modulation import Generators, ModulatingConditioner


class FiLM(ModulatingConditioner):
    """u <- (1 + dg_l) * u + b_l, [dg_l; b_l] = G_l h_m (Perez et al., AAAI 2018, arXiv 1709.07871).

    h_m = act(W2 Drop(act(W1 LN(m)))), m = [e_dev; e_site; rest32], rest32 from `ScalarEncoder`.
    All tokens of a conditioned block l get the same modulation, after LN2 and before the MLP. The
    generators G_l start at zero, so training starts from the plain AST.
    """

    def __init__(
        self,
        embeddings: MetadataEmbeddings,
        config: FiLMConfig,
        *,
        embed_dim: int,
        depth: int,
    ):
        super().__init__(embeddings, config, depth)
        hidden, act = config.film_hidden_dim, config.activation
        dropout = config.dropout_in_encoders
        widths = dict(embeddings.widths)
        if embeddings.scalars:
            self.scalar_encoder = ScalarEncoder(len(embeddings.scalars), dropout=dropout, act=act)
            widths["rest"] = ScalarEncoder.WIDTH
        self.encoder = FactorEncoder(sum(widths.values()), hidden, dropout=dropout, act=act)
        self.generators = Generators(len(self.conditioned_layers), hidden, embed_dim)

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


def build(config: FiLMConfig, *, embed_dim, depth, device_counts, site_counts) -> FiLM:
    embeddings = MetadataEmbeddings(config, device_counts, site_counts)
    return FiLM(embeddings, config, embed_dim=embed_dim, depth=depth)
