"""What the FiLM family shares: which blocks are conditioned, and the per-block generators.

B batch, L conditioned blocks, D width, H hidden width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.conditioner import ConditionState, Modulation
from models.encoders import MetadataConditioner, MetadataEmbeddings
from utils.common.errors import UserError


def resolve_layers(value: Any, depth: int, variant: str) -> tuple[int, ...]:
    """`conditioned_layers` -> ascending block indices.

    Args:
        value: a list of indices in 0..depth-1, or "all", "last_2", "last_6" (any last_<n>).
        depth: blocks of the backbone.
        variant: named in the error message.

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
        raise UserError(
            f"models.{variant}.conditioned_layers: {value!r} does not name blocks of a backbone "
            f"with {depth}; give a list of indices in 0..{depth - 1}, all, last_2 or last_6"
        )
    return tuple(sorted(set(layers)))


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
    """A conditioner that modulates the blocks `layers` of a backbone with `depth` of them."""

    def __init__(self, embeddings: MetadataEmbeddings, *, layers: Sequence[int], depth: int):
        super().__init__(embeddings)
        self.conditioned_layers = tuple(sorted(layers))
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
