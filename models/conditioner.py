"""The conditioner contract: how metadata reaches the transformer.

The loop and the backbone call the methods below on every variant and know none of them by name;
the plain AST has the conditioner that does nothing. Shapes: B batch, D width, L blocks,
G token groups (1: one for all tokens; 2: group 0 is CLS and DIST, group 1 the patches).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.batch import Metadata


class Features(NamedTuple):
    """What the model computes from, in addition to the metadata.

    Attributes:
        values: spectrograms [B, 1, F, T], or tokens [B, N, D] from `ConditionedAST.frozen_prefix`.
        from_prefix: whether they are the latter.
        waveform: clips [B, S] of the spectrograms, for methods that hear; else None.
    """

    values: Tensor
    from_prefix: bool = False
    waveform: Tensor | None = None


class Modulation(NamedTuple):
    """u <- (1 + scale) * u + shift, applied to the tokens of one block after LN2.

    Attributes:
        scale: [B, G, D], delta gamma (0 means unchanged).
        shift: [B, G, D], beta.
    """

    scale: Tensor
    shift: Tensor


class ConditionState(NamedTuple):
    """What `Conditioner.encode` makes of a batch's metadata.

    Attributes:
        modulation: one entry per block of the backbone, None where a block is unconditioned;
            an empty tuple conditions no block.
        fusion: [B, D] vector for `fuse`, or None.
    """

    modulation: tuple[Modulation | None, ...] = ()
    fusion: Tensor | None = None


class ParameterGroup(NamedTuple):
    """Parameters that share optimiser settings.

    Attributes:
        name: shown in logs.
        parameters: the parameters themselves.
        lr_multiplier: factor on the run's learning rate.
        weight_decay: overrides the run's weight decay when not None.
    """

    name: str
    parameters: list[nn.Parameter]
    lr_multiplier: float = 1.0
    weight_decay: float | None = None


class ModelOutput(NamedTuple):
    """What a model returns for a batch.

    Attributes:
        logits: [B, K] float32, under autocast too.
        regularisation: scalar float32 to be added to the task loss (part of the output, so that
            it is differentiated in every process of a distributed run).
    """

    logits: Tensor
    regularisation: Tensor


class Conditioner(nn.Module):
    """Base class, and the plain AST's conditioner: it changes nothing.

    Attributes:
        conditioned_layers: indices of the blocks that `encode` may modulate, ascending. Blocks
            below the first of them do not depend on the metadata, so a frozen backbone computes
            them once per clip.
    """

    conditioned_layers: tuple[int, ...] = ()

    def __init__(self):
        super().__init__()
        # a buffer, so that `regularisation` is on the model's device without a copy per step
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def encode(self, metadata: Metadata) -> ConditionState:
        """Everything that depends on the metadata alone, computed once per batch."""
        return ConditionState()

    def fuse(self, pooled: Tensor, state: ConditionState) -> Tensor:
        """pooled [B, D] -> [B, D], after the transformer and before the head."""
        return pooled

    def regularisation(self) -> Tensor:
        """Scalar that is added to the task loss."""
        return self.zero

    def on_epoch(self, epoch: int) -> None:
        """Called before training epoch `epoch` (from 0), for schedules such as annealing."""

    def finalise(self) -> None:
        """Called before every evaluation and checkpoint, for what is derived from trained weights
        (the unknown rows of the embedding tables when metadata dropout is 0)."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """All trainable parameters of the conditioner, each in exactly one group."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [ParameterGroup("conditioner", parameters)] if parameters else []

    def diagnostics(self) -> dict[str, float]:
        """Scalars worth a curve, logged once per epoch."""
        return {}

    def controls(
        self, *, lr: float, steps: int, steps_per_epoch: int, schedule: Callable[[int], float]
    ) -> dict[str, float]:
        """What the trained conditioner's diagnostics must be judged against, computed once, after
        the training.

        Args:
            lr: learning rate of the run, before any multiplier.
            steps, steps_per_epoch: optimiser steps up to the weights at hand, and per epoch.
            schedule: step (from 0) -> factor on `lr`.
        """
        return {}
