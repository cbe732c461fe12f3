"""TAFiLM-AST: token-aware FiLM, with separate modulation of the special and the patch tokens."""

from __future__ import annotations

import torch

from data.batch import Metadata
from models.conditioner import ConditionState, Modulation
from models.conditioners.film import FiLM
from models.config import TAFiLMConfig
from models.encoders import MetadataEmbeddings
from models.modulation import Generators


class TAFiLM(FiLM):
    """FiLM with two generators per conditioned block: one for CLS and DIST, one for the patches.

    Token i: u_i <- (1 + dg_l^g) * u_i + b_l^g, g = special for CLS and DIST, g = patch else. Both
    start at zero.

    The last block has no patch generator: what its MLP does to the patches reaches no output (the
    pooled vector is the mean of CLS and DIST), so such a generator could never get a gradient.
    With all 12 blocks of the full-size model that leaves out 64 * 1,536 + 1,536 = 99,840
    parameters.
    """

    def __init__(
        self, embeddings: MetadataEmbeddings, config: TAFiLMConfig, *, embed_dim: int, depth: int
    ):
        super().__init__(embeddings, config, embed_dim=embed_dim, depth=depth)
        n_patch = sum(layer < self.depth - 1 for layer in self.conditioned_layers)
        self.patch_generators = (
            Generators(n_patch, config.film_hidden_dim, embed_dim) if n_patch else None
        )

    def encode(self, metadata: Metadata) -> ConditionState:
        h = self.hidden(metadata)
        special = self.generators(h).unbind(1)  # [B, 2, D] per block
        patch = self.patch_generators(h).unbind(1) if self.patch_generators is not None else ()
        entries = []
        for index, one in enumerate(special):
            if index < len(patch):
                groups = torch.stack([one, patch[index]], dim=2)  # [B, 2, G, D]
            else:
                groups = one.unsqueeze(2)
            entries.append(Modulation(*groups.unbind(1)))
        return self.state(entries)


def build(config: TAFiLMConfig, *, embed_dim, depth, device_counts, site_counts) -> TAFiLM:
    embeddings = MetadataEmbeddings(config, device_counts, site_counts)
    return TAFiLM(embeddings, config, embed_dim=embed_dim, depth=depth)
