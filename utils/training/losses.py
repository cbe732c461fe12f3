"""Task losses. Each maps logits [B, K] and label [B, C] to one loss per clip [B]."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.config.schema import TrainingConfig

Loss = Callable[[Tensor, Tensor], Tensor]

TINY = 1e-8  # floor below a power: the slope of x^gamma at 0 is infinite for gamma < 1


def positive_weights(label: Tensor, sensitivity_bias: float) -> Tensor:
    """sensitivity_bias * negatives / positives of each output, from the training labels [N, C]."""
    positives = label.sum(dim=0)
    return sensitivity_bias * (len(label) - positives) / positives


def bce(logits: Tensor, label: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, mean over the outputs; positives weigh pos_weight [C]."""
    return F.binary_cross_entropy_with_logits(
        logits, label, pos_weight=pos_weight, reduction="none"
    ).mean(dim=1)


def focal(logits: Tensor, label: Tensor, gamma: float) -> Tensor:
    """(1 - p_t)^gamma * BCE (Lin et al., ICCV 2017, eq. 4), mean over the outputs."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, label, reduction="none")
    probability = torch.sigmoid(logits)
    missed = torch.where(label > 0.5, 1 - probability, probability).clamp(min=TINY)
    return (missed**gamma * cross_entropy).mean(dim=1)


def asymmetric(
    logits: Tensor, label: Tensor, gamma_pos: float, gamma_neg: float, clip: float
) -> Tensor:
    """Asymmetric loss (Ridnik et al., ICCV 2021, eq. 7), mean over the outputs.

    Negatives use p_m = max(p - clip, 0): those below the margin `clip` do not count at all.
    """
    probability = torch.sigmoid(logits)
    shifted = (probability - clip).clamp(min=TINY)
    positive = -((1 - probability).clamp(min=TINY) ** gamma_pos) * F.logsigmoid(logits)
    # log(1 - p_m) without cancellation: p_m is at most 1 - clip unless clip is 0.
    negative_log = torch.log1p(-shifted) if clip > 0 else F.logsigmoid(-logits)
    negative = -(shifted**gamma_neg) * negative_log
    return (label * positive + (1 - label) * negative).mean(dim=1)


def cross_entropy(logits: Tensor, label: Tensor, label_smoothing: float) -> Tensor:
    """Softmax over the four exclusive classes; label [B, 2] holds crackle and wheeze."""
    target = (label[:, 0] + 2 * label[:, 1]).long()
    return F.cross_entropy(logits, target, label_smoothing=label_smoothing, reduction="none")


def build_loss(training: TrainingConfig, pos_weight: Tensor) -> Loss:
    """The loss that `training.loss` names; pos_weight [C] enters bce only."""
    if training.loss == "bce":
        return partial(bce, pos_weight=pos_weight)
    if training.loss == "focal":
        return partial(focal, gamma=training.focal_gamma)
    if training.loss == "asymmetric":
        return partial(
            asymmetric,
            gamma_pos=training.asymmetric_gamma_pos,
            gamma_neg=training.asymmetric_gamma_neg,
            clip=training.asymmetric_clip,
        )
    return partial(cross_entropy, label_smoothing=training.label_smoothing)
