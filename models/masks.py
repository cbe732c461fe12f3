"""Soft factor masks of SoftFiLM: weights, temperature, regularisers, and their two controls.

K factors, L conditioned blocks (1 when all share one set of masks), D width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from models.config import SoftFiLMConfig
from models.encoders import FACTORS

MIN_TEMPERATURE = 0.1
ANNEALING_START, ANNEALING_END = 5, 0.2  # epochs at the first temperature; last temperature


class SoftMasks(nn.Module):
    """w_k = sigmoid(a_k / max(tau, 0.1)), independent of each other, or a softmax over factors.

    a_k starts at +init_scale on the factor's own third of the D dimensions and at -init_scale
    elsewhere; thirds belong to (device, site, rest) also when a factor is switched off.

    Args:
        factors: the enabled ones of `FACTORS`.
        config: temperature, annealing (tau stays for five epochs, then falls along a cosine to
            0.2 in the last of mask_annealing_epochs) and weights of the regularisers.
        n_sets: 1, or the number of conditioned blocks with per_layer_masks.
    """

    def __init__(
        self,
        factors: Sequence[str],
        dim: int,
        config: SoftFiLMConfig,
        *,
        n_sets: int = 1,
    ):
        super().__init__()
        self.factors, self.config = tuple(factors), config
        scale = config.mask_init_scale
        third = torch.arange(dim) * len(FACTORS) // dim
        own = torch.stack([third == FACTORS.index(name) for name in self.factors])  # [K, D]
        logits = torch.where(own, scale, -scale)
        self.logits = nn.Parameter(logits[:, None].repeat(1, n_sets, 1))  # [K, L, D]
        self.register_buffer("initial_logits", self.logits.detach().clone())
        self.register_buffer("temperature", torch.tensor(float(config.mask_temperature)))

    def forward(self) -> Tensor:
        """Weights [K, L, D] in 0..1."""
        scaled = self.logits / self.temperature.clamp(min=MIN_TEMPERATURE)
        return scaled.softmax(dim=0) if self.config.mask_mode == "softmax" else scaled.sigmoid()

    def set_epoch(self, epoch: int) -> None:
        """Set tau for training epoch `epoch` (from 0)."""
        if not self.config.mask_annealing:
            return
        span = max(self.config.mask_annealing_epochs - 1 - ANNEALING_START, 1)
        progress = min(max((epoch - ANNEALING_START) / span, 0.0), 1.0)
        weight = 0.5 * (1 + math.cos(math.pi * progress))
        first, last = self.config.mask_temperature, ANNEALING_END
        self.temperature.fill_(last + (first - last) * weight)

    def pair_overlaps(self, weights: Tensor | None = None) -> dict[tuple[str, str], Tensor]:
        """mean over D (and L) of w_i w_j, for every pair of factors."""
        w = self() if weights is None else weights
        indices = combinations(range(len(self.factors)), 2)
        return {(self.factors[i], self.factors[j]): (w[i] * w[j]).mean() for i, j in indices}

    def overlap(self, weights: Tensor | None = None) -> Tensor:
        """Mean of the pairwise overlaps; 0 for a single factor."""
        pairs = list(self.pair_overlaps(weights).values())
        return torch.stack(pairs).mean() if pairs else self.logits.new_zeros(())

    def coverage_penalty(self, weights: Tensor | None = None) -> Tensor:
        """mean(1 - max_k w_k): dimensions that no factor claims."""
        w = self() if weights is None else weights
        return (1 - w.amax(dim=0)).mean()

    def regularisation(self) -> Tensor:
        """mask_overlap_lambda * overlap + mask_coverage_lambda * coverage penalty."""
        w = self()
        loss = self.config.mask_overlap_lambda * self.overlap(w)
        if self.config.mask_coverage_lambda:
            loss = loss + self.config.mask_coverage_lambda * self.coverage_penalty(w)
        return loss

    def changed_owners(self) -> Tensor:
        """How many (block, dimension) pairs have another strongest factor than at the start."""
        return (self.logits.argmax(dim=0) != self.initial_logits.argmax(dim=0)).sum()

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """Overlaps, coverage, owner changes and tau."""
        w = self()
        out = {f"masks/overlap_{i}_{j}": float(v) for (i, j), v in self.pair_overlaps(w).items()}
        out["masks/overlap"] = float(self.overlap(w))
        out["masks/coverage"] = 1 - float(self.coverage_penalty(w))
        out["masks/changed_owners"] = float(self.changed_owners())
        out["masks/temperature"] = float(self.temperature)
        return out


def mask_controls(
    masks: SoftMasks,
    *,
    lr: float,
    steps: int,
    steps_per_epoch: int,
    schedule: Callable[[int], float] = lambda step: 1.0,
    weight_decay: float = 0.0,
) -> dict[str, float]:
    """The overlaps that trained masks must be judged against; `masks` stay as they are.

    A small overlap after training means something only against (1) the overlap of the initial
    masks at the same temperature and (2) the overlap after training on the regularisers alone,
    without data, with the same optimiser settings.

    Args:
        masks: the trained masks, at the temperature they are judged at.
        lr: learning rate of the masks, the multiplier included.
        steps, steps_per_epoch: optimiser steps in all and per epoch (for annealing).
        schedule: step (from 0) -> factor on `lr`.

    Returns:
        overlap_trained, overlap_initial_same_temperature, overlap_regularisers_only, temperature.
    """
    control = copy.deepcopy(masks).train()
    with torch.no_grad():
        trained = control.overlap()
        control.logits.copy_(control.initial_logits)
        initial = control.overlap()
    optimiser = torch.optim.AdamW([control.logits], lr=lr, weight_decay=weight_decay)
    has_gradient = len(masks.factors) > 1 or control.config.mask_coverage_lambda > 0
    with torch.enable_grad():
        for step in range(steps if has_gradient else 0):
            if step % steps_per_epoch == 0:
                control.set_epoch(step // steps_per_epoch)
            optimiser.param_groups[0]["lr"] = lr * schedule(step)
            optimiser.zero_grad()
            control.regularisation().backward()
            optimiser.step()
    with torch.no_grad():
        control.temperature.copy_(masks.temperature)
        return {
            "overlap_trained": float(trained),
            "overlap_initial_same_temperature": float(initial),
            "overlap_regularisers_only": float(control.overlap()),
            "temperature": float(masks.temperature),
        }
