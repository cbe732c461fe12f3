"""Domain-adversarial training on the device (Kim et al., ICASSP 2024, arXiv 2312.09603; gradient
reversal: Ganin et al., JMLR 2016, arXiv 1505.07818)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import DATConfig
from models.method import Method


class ReverseGradient(torch.autograd.Function):
    """Identity forward, -alpha times the gradient backward."""

    @staticmethod
    def forward(ctx, x: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(alpha)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (alpha,) = ctx.saved_tensors
        return -alpha * gradient, None


def ganin(progress: float) -> float:
    """2 / (1 + exp(-10 p)) - 1 for the finished share p of the training, 0..1."""
    return 2 / (1 + math.exp(-10 * progress)) - 1


class DAT(Method):
    """A device head on the gradient-reversed features: L = L_task + weight * CE(device).

    Clips of unknown device do not count. The authors' schedule is alpha = 1 from the first step
    (its division is misplaced), which is `constant`; `ganin` is what the text means.
    """

    def __init__(self, config: DATConfig, embed_dim: int, n_devices: int):
        super().__init__()
        self.config = config
        self.head = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, n_devices))
        start = config.alpha if config.schedule == "constant" else 0.0
        self.register_buffer("alpha", torch.tensor(start), persistent=False)

    def on_step(self, progress: float) -> None:
        if self.config.schedule == "ganin":
            self.alpha.fill_(self.config.alpha * ganin(progress))

    def loss(self, features, aside, plan, evidence):
        logits = self.head(ReverseGradient.apply(features[0], self.alpha))
        target = aside.device.clamp(max=logits.shape[1] - 1)
        losses = F.cross_entropy(logits, target, reduction="none") * aside.device_known
        return self.config.weight * losses.sum() / aside.device_known.sum().clamp(min=1)

    def diagnostics(self) -> dict[str, float]:
        return {"dat/alpha": float(self.alpha)}


def build(config: DATConfig, *, embed_dim: int, n_devices: int, **_: int) -> DAT:
    """The method for a backbone of width embed_dim and so many known devices."""
    return DAT(config, embed_dim, n_devices)
