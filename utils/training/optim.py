"""AdamW over named parameter groups, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

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
