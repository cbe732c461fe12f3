"""The method contract: what a training method adds to backbone and conditioner.

The loop and the model call the hooks below on every configured method and know none by name; the
base class does nothing. A method and a conditioner combine freely. Several methods act in the
order of the configuration; at most one of them adds rows (views or mixes).

Shapes: B clips of a micro-batch, R rows that a method adds, N patch tokens, D width, C labels,
K logits, V views and mixes (V B rows go through the backbone as one batch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.batch import Batch, Metadata
from models.conditioner import ParameterGroup

Plan = Mapping[str, Tensor]  # what `Method.draw` gave: small tensors, fixed names and shapes


class Aside(NamedTuple):
    """What a method may know of the clips in addition to their sound.

    Attributes:
        label: [B, C] float32, as `Batch.label`.
        device: [B] int64, as `Metadata.device`.
        device_known: [B] bool.
        patient: [B] int64, equal for clips of one patient.
        cycle: [B] int64, row number in the run's cycle table, as `TrainingCycles.cycle`.
    """

    label: Tensor
    device: Tensor
    device_known: Tensor
    patient: Tensor
    cycle: Tensor


class TrainingCycles(NamedTuple):
    """The N training cycles without their sound, in ascending order of the row number.

    Attributes:
        cycle: [N] int64, row number in the run's cycle table.
        metadata: of the N cycles.
        label: [N, C] float32.
        patient: [N] int64.
    """

    cycle: Tensor
    metadata: Metadata
    label: Tensor
    patient: Tensor


class Method(nn.Module):
    """Base class: a method that changes nothing.

    Attributes:
        views: augmentation draws per clip and step; more than one adds (views - 1) B rows.
        filters: whether `filter` changes the spectrogram (the frozen prefix is not cached then).
        mixes: whether `mix` does anything.
        adds_mix: whether the mixed rows are added to the clean ones, not put in their place.
        drops: whether `keep` drops tokens.
        hears: whether `wave` and `attend` do anything.
    """

    views: int = 1
    filters: bool = False
    mixes: bool = False
    adds_mix: bool = False
    drops: bool = False
    hears: bool = False

    def prepare(self, cycles: TrainingCycles) -> None:
        """Called once before the training, on every process with the same cycles (on the CPU): a
        pure function of them. What it finds belongs into buffers, which a resumed run restores."""

    def draw(self, clips: int, tokens: int, seed: int) -> dict[str, Tensor]:
        """All randomness of a step, on the CPU: a pure function of its arguments."""
        return {}

    def filter(self, spectrogram: Tensor) -> tuple[Tensor, Tensor | None]:
        """Learned input filter, in training and prediction (under autocast, as the backbone):
        [B, 1, F, T] -> the same shape, and evidence [B, K] for `loss`, or None."""
        return spectrogram, None

    def mix(self, patches: Tensor, plan: Plan) -> Tensor:
        """Patch tokens [B, N, D] before positions -> mixed ones [B, N, D], where `mixes`."""
        return patches

    def keep(self, tokens: Tensor, plan: Plan) -> Tensor:
        """CLS, DIST and patches with positions [R, 2 + N, D] -> those that the blocks see, in
        training; CLS and DIST stay first."""
        return tokens

    def wave(self, waveform: Tensor) -> Tensor:
        """Clips [B, S], where `hears` -> further tokens [B, M, D], in training and prediction."""
        raise NotImplementedError

    def attend(self, special: Tensor, wave: Tensor) -> Tensor:
        """CLS and DIST after the blocks [B, 2, D] and `wave`'s tokens -> [B, 2, D]."""
        return special

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

    def after_step(self) -> None:
        """Called after a step's backward passes on every process: what has to be summed over the
        micro-batches and processes of a step is summed here."""

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


def generator(seed: int) -> torch.Generator:
    """CPU generator of a step's draws."""
    return torch.Generator().manual_seed(seed)


class Step(NamedTuple):
    """What the configured methods need of one training step.

    Attributes:
        aside: labels, devices and patients of the clips.
        plans: one per method, in their order.
    """

    aside: Aside
    plans: tuple[dict[str, Tensor], ...]


class Methods(nn.ModuleList):
    """The configured methods as one; empty, it changes nothing."""

    def __init__(self, methods: Iterable[Method] = ()):
        super().__init__(methods)
        self.views = max((m.views for m in self), default=1)
        self.adds_mix = any(m.adds_mix for m in self)
        self.hears = any(m.hears for m in self)
        self.whole_input = any(m.filters or m.mixes or m.drops for m in self) or self.views > 1

    def prepare(self, cycles: TrainingCycles) -> None:
        for method in self:
            method.prepare(cycles)

    def draw(self, batch: Batch, tokens: int, seed: int) -> Step | None:
        """The randomness of a step and the batch's side information, on the batch's device."""
        if not len(self):
            return None
        device = batch.label.device
        plans = (m.draw(len(batch), tokens, seed + n) for n, m in enumerate(self))
        metadata = batch.metadata
        return Step(
            Aside(
                *(batch.label, metadata.device, metadata.known[:, 0]), batch.patient, batch.cycle
            ),
            tuple({k: v.to(device, non_blocking=True) for k, v in plan.items()} for plan in plans),
        )

    def filter(self, spectrogram: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Every method's input filter in turn, and their evidence."""
        evidence = []
        for method in self:
            spectrogram, found = method.filter(spectrogram)
            evidence.append(found)
        return spectrogram, evidence

    def mix(self, patches: Tensor, clips: int, step: Step) -> Tensor:
        """Patches [V B, N, D] of all views -> with the mixed rows added or put in place."""
        for method, plan in zip(self, step.plans, strict=True):
            if method.mixes:
                mixed = method.mix(patches[:clips], plan)
                patches = torch.cat([patches, mixed]) if method.adds_mix else mixed
        return patches

    def keep(self, tokens: Tensor, step: Step) -> Tensor:
        """Tokens with positions -> those that the blocks see."""
        for method, plan in zip(self, step.plans, strict=True):
            tokens = method.keep(tokens, plan)
        return tokens

    def listen(self, special: Tensor, waveform: Tensor | None) -> Tensor:
        """CLS and DIST [R, 2, D] -> with what `hears` found in the clips [B, S]; mixed rows hear
        the clip whose metadata they keep."""
        if waveform is None:
            raise ValueError("a method hears the waveform, and the model was given none")
        for method in self:
            if method.hears:
                wave = method.wave(waveform)
                wave = wave.repeat(len(special) // len(wave), 1, 1)
                special = method.attend(special, wave)
        return special

    def loss(self, features: Tensor, step: Step, evidence: list[Tensor | None]) -> Tensor:
        """Sum of the methods' losses; features [V, B, D]."""
        total = features.new_zeros(())
        for method, plan, found in zip(self, step.plans, evidence, strict=True):
            loss = method.loss(features, step.aside, plan, found)
            total = total if loss is None else total + loss
        return total

    def task_losses(
        self, loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, label: Tensor, step: Step
    ) -> Tensor:
        """Task losses [B] of logits [B, K]: `loss(logits, label)` as the methods change it."""
        for method in self:
            logits = method.logits(logits, step.aside)
        targets = [(1.0, label)]
        for method, plan in zip(self, step.plans, strict=True):
            targets = [(w * v, y) for w, t in targets for v, y in method.targets(t, plan)]
        losses = sum(weight * loss(logits, target) for weight, target in targets)
        for method in self:
            losses = method.weigh(losses, step.aside)
        return losses

    def on_step(self, progress: float) -> None:
        for method in self:
            method.on_step(progress)

    def after_step(self) -> None:
        for method in self:
            method.after_step()

    def parameter_groups(self) -> list[ParameterGroup]:
        return [group for method in self for group in method.parameter_groups()]

    def diagnostics(self) -> dict[str, float]:
        return {key: value for method in self for key, value in method.diagnostics().items()}
