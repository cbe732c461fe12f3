"""AdamW over named parameter groups, sharpness-aware minimisation, the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from models.conditioner import ParameterGroup
from utils.config.schema import TrainingConfig


def lr_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up to 1 over warmup_steps, then half a cosine down to 0 at total_steps."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if total_steps <= warmup_steps:
        return 1.0
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def build_optimizer(
    groups: Iterable[ParameterGroup], training: TrainingConfig
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, ICLR 2019), fused: one kernel per group, and an update that the
    device itself can skip (`found_inf`)."""
    lr, decay = training.lr, training.weight_decay
    return torch.optim.AdamW(
        [
            {
                "params": group.parameters,
                "name": group.name,
                "lr": lr * group.lr_multiplier,
                "weight_decay": decay if group.weight_decay is None else group.weight_decay,
            }
            for group in groups
        ],
        lr=lr,
        weight_decay=decay,
        fused=True,
    )


def build_schedule(
    optimizer: torch.optim.Optimizer, training: TrainingConfig, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """`lr_factor` per optimiser step, on top of every group's own rate."""
    warmup = round(training.warmup_epochs * steps_per_epoch)
    total = training.epochs * steps_per_epoch
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, warmup, total))


@contextmanager
def sharpened(parameters: Iterable[Tensor], rho: float) -> Iterator[None]:
    """Inside, the weights are w + rho g / |g| and the gradient g of w is cleared; afterwards they
    are w again, to the last bit, and the gradient is what was computed inside.

    Sharpness-aware minimisation (Foret et al., ICLR 2021, arXiv 2010.01412), one norm over all
    parameters, without a host sync.
    """
    parameters = [p for p in parameters if p.grad is not None]
    gradients = [p.grad for p in parameters]
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        length = rho / (norm + 1e-12)
        torch._foreach_add_(parameters, torch._foreach_mul(gradients, length))
    for parameter in parameters:
        parameter.grad = None
    yield
    with torch.no_grad():
        torch._foreach_copy_(parameters, kept)
