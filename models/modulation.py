"""What the FiLM family shares: which blocks are conditioned, and the per-block generators.

B batch, L conditioned blocks, D width, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.conditioner import ConditionState, Modulation
from models.config import FiLMConfig, resolve_layers
from models.encoders import MetadataConditioner, MetadataEmbeddings


class Generators(nn.Module):
    """[dg_l; b_l] = G_l h for `n` blocks at once: one affine map H -> 2 D per block.

    Args:
        gain: Xavier-uniform gain of every block's weights; 0 starts at zero. Biases start at zero.
    """

    def __init__(self, n: int, hidden: int, dim: int, gain: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n, 2 * dim, hidden))
        self.bias = nn.Parameter(torch.zeros(n, 2 * dim))
        if gain > 0:
            for weight in self.weight.data:
                nn.init.xavier_uniform_(weight, gain=gain)

    def forward(self, h: Tensor) -> Tensor:
        """h [B, H] -> [B, L, 2, D]; axis 2 is (dg, b)."""
        out = F.linear(h, self.weight.flatten(0, 1), self.bias.flatten())
        return out.view(h.shape[0], self.weight.shape[0], 2, -1)


def per_block(
    entries: Iterable[Modulation], layers: Sequence[int], depth: int
) -> tuple[Modulation | None, ...]:
    """Modulations of the conditioned blocks -> one entry per block, None for the others."""
    by_layer = dict(zip(layers, entries, strict=True))
    return tuple(by_layer.get(index) for index in range(depth))


class ModulatingConditioner(MetadataConditioner):
    """A conditioner that modulates some blocks of a backbone with `depth` of them."""

    def __init__(self, embeddings: MetadataEmbeddings, config: FiLMConfig, depth: int):
        super().__init__(embeddings)
        self.conditioned_layers = resolve_layers(config.conditioned_layers, depth)
        self.depth = depth

    def state(self, entries: Iterable[Modulation]) -> ConditionState:
        """`ConditionState` from the modulations of the conditioned blocks."""
        return ConditionState(modulation=per_block(entries, self.conditioned_layers, self.depth))

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """Mean |dg| and mean |b| over the conditioned blocks, for every device with every site at
        the mean age, BMI and duration."""
        mode = self.training
        self.eval()
        try:
            modulation = [m for m in self.encode(self.probe()).modulation if m is not None]
        finally:
            self.train(mode)
        scale = torch.stack([m.scale.abs().mean() for m in modulation]).mean()
        shift = torch.stack([m.shift.abs().mean() for m in modulation]).mean()
        return {"film/mean_abs_scale": float(scale), "film/mean_abs_shift": float(shift)}
