"""Structured patchout (Koutini et al., "Efficient training of audio transformers with patchout",
Interspeech 2022, arXiv 2110.05069)."""

from __future__ import annotations

import torch
from torch import Tensor

from models.ast import N_SPECIAL
from models.config import StructuredPatchoutConfig
from models.method import Method, Plan, generator


class StructuredPatchout(Method):
    """The blocks see CLS, DIST and the patches of some rows and columns of the grid alone, the same
    for all clips of a step; cheaper steps, and a regulariser.

    Rows of bands and columns of frames are left out at random, floor(share) of each, so that the
    number of tokens is fixed. Patches keep their positions. Prediction sees all of them.
    """

    drops = True

    def __init__(self, config: StructuredPatchoutConfig, rows: int):
        super().__init__()
        self.config, self.rows = config, rows

    def draw(self, clips: int, tokens: int, seed: int) -> dict[str, Tensor]:
        rng, config = generator(seed), self.config
        grid = torch.arange(N_SPECIAL, N_SPECIAL + tokens).view(self.rows, -1)  # [f, t]
        rows, columns = (
            torch.randperm(size, generator=rng)[: size - int(size * share)].sort().values
            for size, share in zip(grid.shape, (config.freq_share, config.time_share), strict=True)
        )
        kept = grid[rows[:, None], columns].flatten()
        return {"kept": torch.cat([torch.arange(N_SPECIAL), kept])}

    def keep(self, tokens: Tensor, plan: Plan) -> Tensor:
        return tokens[:, plan["kept"]]


def build(config: StructuredPatchoutConfig, *, patch_rows: int, **_: int) -> StructuredPatchout:
    """The method for a grid of so many rows of patches."""
    return StructuredPatchout(config, patch_rows)
