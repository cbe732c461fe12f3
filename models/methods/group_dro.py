"""Group DRO, distributionally robust optimisation over groups (Sagawa et al., "Distributionally
robust neural networks for group shifts", ICLR 2020, arXiv 1911.08731, algorithm 1)."""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor
from torch.nn import functional as F

from models.config import GroupDROConfig
from models.method import Method, TrainingCycles


class GroupDRO(Method):
    """Groups g are device x class (an unknown device is one of its own). With the share p_g of the
    training cycles in g and weights q on the simplex, the task loss of a clip of g becomes

        l * (1 - strength + strength * q_g / p_g)

    whose mean over the data is (for strength 1) sum_g q_g L_g, as in the paper, which draws groups
    equally often where we weigh rows that are drawn as they come. After each step q_g is multiplied
    by exp(step_size * (L_g + adjustment / sqrt(n_g))) for the groups with clips in it, L_g the mean
    loss of these clips, and q is normalised. q starts uniform over the groups that have cycles.

    L_g is over all micro-batches and processes of a step, so accumulation and data parallelism
    change nothing but rounding; with SAM both passes of a step count. q and p are buffers: a
    resumed run restores them.
    """

    def __init__(self, config: GroupDROConfig, n_devices: int, n_classes: int):
        super().__init__()
        self.config, self.n_devices, self.n_classes = config, n_devices, n_classes
        groups = (n_devices + 1) * n_classes
        self.register_buffer("q", torch.zeros(groups))
        self.register_buffer("cycles", torch.zeros(groups))  # n_g
        self.sums: Tensor | None = None  # [2, G] losses and clips of the step so far; no buffer:
        # data parallelism would overwrite it with the first process's in every forward pass

    def group(self, label: Tensor, device: Tensor, known: Tensor) -> Tensor:
        """[B] number of each clip's group."""
        device = torch.where(known, device, self.n_devices).clamp(max=self.n_devices)
        bits = 2 ** torch.arange(label.shape[1], device=label.device)
        return device * self.n_classes + ((label > 0.5) * bits).sum(dim=1)

    def prepare(self, cycles: TrainingCycles) -> None:
        metadata = cycles.metadata
        group = self.group(cycles.label, metadata.device, metadata.known[:, 0])
        self.cycles.copy_(torch.bincount(group, minlength=len(self.q)))
        self.q.copy_((self.cycles > 0) / (self.cycles > 0).sum())

    def weigh(self, losses: Tensor, aside) -> Tensor:
        group = self.group(aside.label, aside.device, aside.device_known)
        if self.sums is None:
            self.sums = torch.zeros(2, len(self.q), device=losses.device)
        found = losses.detach().float()
        inside = F.one_hot(group, len(self.q)).float()
        self.sums += torch.stack([found, torch.ones_like(found)]) @ inside
        share = self.cycles / self.cycles.sum()
        ratio = (self.q / share.clamp(min=1e-12))[group]
        strength = self.config.strength
        return losses * (1 - strength + strength * ratio)

    def after_step(self) -> None:
        sums = torch.zeros(2, len(self.q), device=self.q.device) if self.sums is None else self.sums
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        losses, clips = sums
        adjusted = losses / clips.clamp(min=1)
        adjusted = adjusted + self.config.adjustment / self.cycles.clamp(min=1).sqrt()
        factor = torch.where(clips > 0, self.config.step_size * adjusted, 0.0).exp()
        self.q.copy_(self.q * factor / (self.q * factor).sum())
        self.sums = None

    def diagnostics(self) -> dict[str, float]:
        """Effective number of groups, exp of the entropy of q; and the largest weight."""
        entropy = -(self.q * self.q.clamp(min=1e-12).log()).sum()
        return {"group_dro/groups": float(entropy.exp()), "group_dro/largest": float(self.q.max())}


def build(config: GroupDROConfig, *, n_devices: int, n_outputs: int, **_: int) -> GroupDRO:
    """The method for so many known devices."""
    return GroupDRO(config, n_devices, n_classes=2 if n_outputs == 1 else 4)
