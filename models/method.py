"""The method contract: what a training method adds to backbone and conditioner.

The loop and the model call the hooks below on every configured method and know none by name; the
base class does nothing. A method and a conditioner combine freely. Several methods act in the
order of the configuration; at most one of them adds rows (views or mixes).

Shapes: B clips of a micro-batch, R rows that a method adds, N patch tokens, D width, C labels,
K logits, V views and mixes (V B rows go through the backbone as one batch).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.conditioner import ParameterGroup

Plan = Mapping[str, Tensor]  # what `Method.draw` gave: small tensors, fixed names and shapes


class Aside(NamedTuple):
    """What a method may know of the clips besides their sound.

    Attributes:
        label: [B, C] float32, as `Batch.label`.
        device: [B] int64, as `Metadata.device`.
        device_known: [B] bool.
        patient: [B] int64, equal for clips of one patient.
    """

    label: Tensor
    device: Tensor
    device_known: Tensor
    patient: Tensor


@dataclass
class MethodConfig:
    """Base of the keys of `methods.<name>`."""


class Method(nn.Module):
    """Base class: a method that changes nothing.

    Attributes:
        views: augmentation draws per clip and step; more than one adds (views - 1) B rows.
        filters: whether `filter` changes the spectrogram (the frozen prefix is not cached then).
        mixes: whether `mix` adds B rows.
    """

    views: int = 1
    filters: bool = False
    mixes: bool = False

    @property
    def rows(self) -> int:
        """Rows per clip that go through the backbone in training."""
        return self.views + self.mixes

    def draw(self, clips: int, tokens: int, seed: int) -> dict[str, Tensor]:
        """All randomness of a step, on the CPU: a pure function of its arguments."""
        return {}

    def filter(self, spectrogram: Tensor) -> tuple[Tensor, Tensor | None]:
        """Learned input filter, in training and prediction: [B, 1, F, T] -> the same shape, and
        evidence [B, K] for `loss`, or None."""
        return spectrogram, None

    def mix(self, patches: Tensor, plan: Plan) -> Tensor | None:
        """Patch tokens [B, N, D] before positions -> B further rows [B, N, D], or None."""
        return None

    def keep(self, tokens: Tensor, plan: Plan) -> Tensor:
        """Tokens with positions [R, N, D] -> those that the blocks see, in training."""
        return tokens

    def loss(
        self, features: Tensor, aside: Aside, plan: Plan, evidence: Tensor | None
    ) -> Tensor | None:
        """Scalar added to the task loss; pooled features [V, B, D] float32 before `fuse`."""
        return None

    def logits(self, logits: Tensor, aside: Aside) -> Tensor:
        """Logits [B, K] -> those that the task loss sees, in training."""
        return logits

    def targets(self, label: Tensor, plan: Plan) -> list[tuple[Tensor | float, Tensor]]:
        """Label [B, C] -> (weight, label) pairs; the task loss is their weighted sum."""
        return [(1.0, label)]

    def weigh(self, losses: Tensor, aside: Aside) -> Tensor:
        """Task losses [B] -> weighted [B], in training."""
        return losses

    def on_step(self, progress: float) -> None:
        """Called before every step with the finished share of the training, 0..1."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """All trainable parameters of the method, each in exactly one group."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [ParameterGroup("method", parameters)] if parameters else []

    def diagnostics(self) -> dict[str, float]:
        """Scalars worth a curve, logged once per epoch."""
        return {}


class Projector(nn.Sequential):
    """Linear, batch norm, ReLU, Linear, all D wide. Without running statistics: a projection is
    never used for prediction, and there is no buffer to keep."""

    def __init__(self, dim: int):
        super().__init__(
            nn.Linear(dim, dim),
            nn.BatchNorm1d(dim, track_running_stats=False),
            nn.ReLU(),
            nn.Linear(dim, dim),
        )


def no_loss(module: nn.Module, features: Tensor) -> Tensor:
    """Zero that still depends on every parameter, as data parallelism needs it: the loss of a
    micro-batch of fewer than two clips, on which batch norm and contrasts are not defined."""
    return features.sum() * 0.0 + sum((p.sum() * 0.0 for p in module.parameters()), start=0.0)


class MethodType(NamedTuple):
    """One method; a module in `models/methods/` that holds one as `METHOD` is discovered.

    Attributes:
        name: key under `methods` in a configuration, such as patchmix_cl.
        title: name in tables, such as Patch-Mix CL.
        config_class: dataclass of the keys of `methods.<name>`.
        build: build(config, *, embed_dim, n_devices, n_outputs) -> Method.
    """

    name: str
    title: str
    config_class: type[Any]
    build: Callable[..., Method]


def generator(seed: int) -> torch.Generator:
    """CPU generator of a step's draws."""
    return torch.Generator().manual_seed(seed)
