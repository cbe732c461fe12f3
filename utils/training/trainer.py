"""The training loop. It knows no variant by name.

B batch, C labels, K logits, N cycles. `fit` calls `train_epoch`, which calls `step`, which computes
the loss; after each epoch `close_epoch` evaluates. `fit` leaves the best weights in the model.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from data.batch import Batch
from data.fields import balancing_weights, field_values
from data.loader import Cycles, MicroBatch, derived_seed, epoch_order, epoch_plan
from data.task import EVENTS
from models.build import ConditionedAST
from models.method import TrainingCycles
from utils.common.errors import Preempted, UserError
from utils.config.schema import TrainingConfig
from utils.metrics.score import (
    choose_thresholds,
    group_score,
    sp_se_score,
    summarise,
    usable_groups,
)
from utils.tracking import Tracker, epoch_metrics
from utils.training.checkpoint import Checkpoint
from utils.training.checkpointer import Checkpointer
from utils.training.device import Runtime, generator_states, set_generator_states
from utils.training.inputs import Inputs
from utils.training.losses import build_loss, positive_weights
from utils.training.optim import build_optimizer, build_schedule, sharpened
from utils.training.pace import PaceMeter
from utils.training.predict import Predictor, gather_rows
from utils.training.signals import Flags, Signals

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands, without its tensors.

    Attributes:
        epoch: epochs finished.
        step: optimiser steps finished in the current epoch.
        best_epoch: epoch (from 0) of the best weights, -1 before the first.
        best_score: ICBHI Score (percent) on the selection part at that epoch, or the mean of its
            groups' Scores (training.selection_groups).
        thresholds: decision thresholds chosen at that epoch.
        stale: epochs since then.
        history: one row of figures per finished epoch.
        seconds: time spent training in the current epoch so far, s.
    """

    epoch: int = 0
    step: int = 0
    best_epoch: int = -1
    best_score: float = float("nan")
    thresholds: tuple[float, ...] = ()
    stale: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


class Trainer:
    """Trains one model on one split.

    Args:
        training: the section of the configuration.
        data: the run's cycles.
        model: a `models.build.ConditionedAST`; moved to the device and trained in place.
        inputs: what turns rows into batches and batches into model input, on the device.
        runtime: device, precision, processes.
        batch_size: cycles per optimiser step.
        checkpointer: keeps the run's folder up to date; None keeps nothing.
        tracker: receives one dictionary of metrics per epoch.

    Attributes:
        progress: where the run stands, without its tensors.
        best: weights of the best epoch, on the device; None before the first.
        seen: of the current epoch: rows [B], (loss, logits) [B, 1 + K] of each batch.
    """

    def __init__(
        self,
        training: TrainingConfig,
        data: Cycles,
        model: ConditionedAST,
        inputs: Inputs,
        runtime: Runtime,
        *,
        batch_size: int,
        checkpointer: Checkpointer | None = None,
        tracker: Tracker | None = None,
    ):
        self.training, self.data, self.runtime = training, data, runtime
        self.model, self.inputs, self.batch_size = model, inputs, batch_size
        self.checkpointer, self.tracker = checkpointer, tracker or Tracker()
        self.wrapped = runtime.prepare(model, len(data.clip_samples))
        self.predictor = Predictor(data, model, inputs, runtime, batch_size)
        self.signals = Signals(runtime.device, runtime.world, 60 * training.checkpoint_minutes)
        self.rows = data.split.train
        self.classes = data.classes(self.rows)
        self.selection_rows = {
            "validation": data.split.val,
            "fixed": np.empty(0, np.int64),
            "test": data.split.test,
        }[training.selection]
        labels = data.label[self.rows]
        _need_every_label(labels)
        index = torch.from_numpy(self.rows)
        known = data.metadata[index], labels, data.patient[index]
        model.methods.prepare(TrainingCycles(index, *known))
        _need_both_sides(data.classes(self.selection_rows), training.selection)
        self.groups = self._selection_groups()
        self.weight = self._balance()
        self.pos_weight = positive_weights(labels, training.sensitivity_bias)
        self.loss = build_loss(training, self.pos_weight.to(runtime.device))
        groups = model.parameter_groups()
        self.parameters = [p for group in groups for p in group.parameters]
        self.optimizer = build_optimizer(groups, training)
        self.steps_per_epoch = -(-len(self.rows) // batch_size)
        self.schedule = build_schedule(self.optimizer, training, self.steps_per_epoch)
        folder = checkpointer.folder if checkpointer and runtime.is_main else None
        self.pace = PaceMeter(folder, runtime.device, self.steps_per_epoch)
        self.progress = Progress()
        self.best: dict[str, Tensor] | None = None
        self.seen: list[tuple[Tensor, Tensor]] = []

    def _selection_groups(self) -> np.ndarray | None:
        """Group of each selection row [n]; None: there are none."""
        fields, rows = self.training.selection_groups, self.selection_rows
        if not fields:
            return None
        groups, classes = field_values(self.data.table.iloc[rows], fields), self.data.classes(rows)
        usable = usable_groups(classes, groups)
        left_out = sorted(set(groups.tolist()) - set(usable))
        if not usable:
            raise UserError(
                f"training.selection_groups={fields}: no group of the selection part has normal "
                "and abnormal cycles; name other fields, or another dataset.val_seed"
            )
        text = "epoch and thresholds are chosen by the mean Score of %s"
        text += "; left out, all normal or all abnormal: %s" if left_out else "%s"
        logger.info(text, "; ".join(usable), "; ".join(left_out))
        return groups

    def _balance(self) -> Tensor | None:
        """Weight of every row of the table in the task loss [N]; None: all equal."""
        if not self.training.balance:
            return None
        values = field_values(self.data.table.iloc[self.rows], self.training.balance)
        weights = balancing_weights(values, self.classes, self.training.balance_bounds)
        out = torch.ones(len(self.data.table))
        out[torch.from_numpy(self.rows)] = torch.from_numpy(weights).float()
        return out.to(self.runtime.device)

    # ---------------------------------------------------------------- the whole training

    def fit(self) -> Progress:
        """Train to the end (or to early stopping) and put the best weights into the model."""
        # every process has its own dropout masks; a resumed run restores the saved generators
        torch.manual_seed(derived_seed(self.training.seed, self.runtime.rank))
        if self.checkpointer:
            self.checkpointer.restore(self)
        self.inputs.prepare(self.rows)
        with self.signals:
            while not self._is_over():
                self.model.conditioner.on_epoch(self.progress.epoch)
                self.train_epoch()
                self._report(self.close_epoch())
                self.pace.end()
                flags = self.signals.now()
                # the last state is saved whatever happens to the test and the report
                self._handle_flags(flags._replace(save=flags.save or self._is_over()))
        self.model.load_state_dict(self.best)
        return self.progress

    @property
    def finished(self) -> float:
        """Share of the training's steps that are done, 0..1."""
        progress = self.progress
        done = progress.epoch * self.steps_per_epoch + progress.step
        return done / (self.training.epochs * self.steps_per_epoch)

    def _is_over(self) -> bool:
        """Whether every epoch is done, or early stopping was triggered."""
        patience = self.training.early_stopping_patience
        stale = patience > 0 and self.progress.stale >= patience
        return stale or self.progress.epoch >= self.training.epochs

    def controls(self) -> dict[str, float]:
        """What the best weights' diagnostics must be judged against; see `Conditioner.controls`."""
        return self.model.conditioner.controls(
            lr=self.training.lr,
            steps=(self.progress.best_epoch + 1) * self.steps_per_epoch,
            steps_per_epoch=self.steps_per_epoch,
            schedule=self.schedule.lr_lambdas[0],
        )

    # ---------------------------------------------------------------- state

    def checkpoint(self, description: dict[str, Any]) -> Checkpoint:
        """The best weights so far, with all that evaluation needs.

        description: the other fields (`utils.training.assemble.describe_run`).
        """
        progress = self.progress
        return Checkpoint(
            weights={name: value.cpu() for name, value in self.best.items()},
            thresholds=progress.thresholds,
            epoch=progress.best_epoch,
            score=progress.best_score,
            layer_norm_eps=self.model.layer_norm_eps,
            pos_weight=tuple(self.pos_weight.tolist()) if self.training.loss == "bce" else (),
            **description,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact continuation needs; every process must call it."""
        rows, record = self.gather(self.seen)
        return {
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.runtime.scaler.state_dict(),
            "generators": gather_object([generator_states()]),
            "seen": (torch.from_numpy(rows), torch.from_numpy(record)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of this run, of as many processes or of another number."""
        device, generators = self.runtime.device, state["generators"]
        self.progress = Progress(**state["progress"])
        self.progress.thresholds = tuple(self.progress.thresholds)
        self.model.load_state_dict(state["model"])
        self.best = state["best"] and {k: v.to(device) for k, v in state["best"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.runtime.scaler.load_state_dict(state["scaler"])
        if self.runtime.is_main:
            self.seen = [tuple(part.to(device) for part in state["seen"])]
        if len(generators) == self.runtime.world:
            set_generator_states(generators[self.runtime.rank])
        else:
            logger.warning(
                "the run was saved by %d processes and is resumed by %d: dropout will differ",
                len(generators),
                self.runtime.world,
            )

    def _save(self) -> None:
        state = self.state_dict()
        if self.runtime.is_main and self.checkpointer:
            self.checkpointer.save(state)
        self.runtime.barrier()
        self.signals.saved()

    # ---------------------------------------------------------------- one epoch

    def train_epoch(self) -> None:
        progress, training = self.progress, self.training
        order = epoch_order(
            self.rows,
            self.classes,
            epoch=progress.epoch,
            seed=training.seed,
            sampler=training.sampler,
        )
        plan = epoch_plan(
            order,
            batch_size=self.batch_size,
            bucket=self.data.bucket,
            accumulation_steps=training.accumulation_steps,
            rank=self.runtime.rank,
            world=self.runtime.world,
            epoch=progress.epoch,
            seed=training.seed,
        )[progress.step :]
        batches = self.inputs.batches(part.rows for step in plan for part in step)
        self.wrapped.train()
        bar = tqdm(
            plan,
            desc=f"epoch {progress.epoch + 1}/{training.epochs}",
            total=self.steps_per_epoch,
            initial=progress.step,
            disable=None if self.runtime.is_main else True,  # None: quiet when not a terminal
            leave=False,
            ncols=100,
        )
        started = time.monotonic() - progress.seconds
        self.pace.start()
        for parts in bar:
            nonfinite = self.step(parts, batches)
            progress.step += 1
            progress.seconds = time.monotonic() - started
            self.pace.step()
            rows = torch.from_numpy(np.concatenate([part.rows for part in parts]))
            self._handle_flags(self.signals.post(nonfinite, rows))
        self._handle_flags(self.signals.drain(), save=False)  # a due one waits for the evaluation

    def step(self, parts: list[MicroBatch], batches: Iterator[Batch]) -> Tensor:
        """One optimiser step; returns a scalar on the device, 1 if the gradient was not finite.

        With `sam_rho` the gradient is taken twice of the same micro-batches, under the same dropout
        and exchanged between the processes both times, so that all perturb the weights alike.
        """
        runtime, methods = self.runtime, self.model.methods
        methods.on_step(self.finished)
        given = ((part, next(batches)) for part in parts)
        total, passes = torch.zeros((), device=runtime.device), [nullcontext()]
        if self.training.sam_rho:
            given, generators = list(given), generator_states()
            passes.append(sharpened(self.parameters, self.training.sam_rho))
        for again, weights in enumerate(passes):
            with weights:
                if again:
                    set_generator_states(generators)
                for part, batch in given:
                    with runtime.exchange(self.wrapped, when=part is parts[-1]):
                        with runtime.autocast():
                            features = self.inputs.views(batch, part.seed, methods.views)
                            drawn = self.model.draw(batch, part.seed, features)
                            output = self.wrapped(features, batch.metadata, drawn)
                        if drawn is None or not part.weight:  # a filler is no clip of the step
                            losses = self.loss(output.logits, batch.label)  # [B]
                        else:
                            losses = methods.task_losses(
                                self.loss, output.logits, batch.label, drawn
                            )
                        if self.weight is not None:
                            losses = losses * self.weight[batch.cycle]
                        share = part.weight * len(batch)
                        loss = losses.sum() * part.weight + output.regularisation * share
                        runtime.backward(loss)
                    if again:
                        continue  # what is recorded is of the weights themselves
                    total += loss.detach()
                    if part.weight:
                        seen = torch.cat([losses.detach()[:, None], output.logits.detach()], dim=1)
                        self.seen.append((batch.cycle, seen))
        methods.after_step()
        nonfinite = runtime.update(self.optimizer, self.parameters, self.training.grad_clip, total)
        self.schedule.step()
        return nonfinite

    def _handle_flags(self, flags: Flags | None, save: bool = True) -> None:
        """Act on the flags of the step before."""
        if flags is None:
            return
        self._refuse_nonfinite(flags)
        if not flags.stop and not (flags.save and save):
            return
        # The step whose flags are under way is in the weights already; it must not be saved as
        # done before it is known to have been sound.
        later = self.signals.drain()
        if later is not None:
            self._refuse_nonfinite(later)
        self._save()
        if flags.stop or (later is not None and later.stop):
            raise Preempted

    def _refuse_nonfinite(self, flags: Flags) -> None:
        if not flags.nonfinite:
            return
        rows = dict.fromkeys(row for own in gather_object([flags.rows.tolist()]) for row in own)
        table = self.data.table
        names = [f"{table['Filename'][row]}#{table['CycleIndex'][row]}" for row in rows]
        raise UserError(
            f"the gradient of epoch {self.progress.epoch + 1} was not finite and the update was "
            f"skipped; the step's cycles were {', '.join(names)}. Lower training.lr, set "
            "training.precision=fp32 or look at these cycles"
        )

    # ---------------------------------------------------------------- the end of an epoch

    def close_epoch(self) -> dict[str, float]:
        """Evaluate, choose, and advance `progress`; returns the epoch's row of figures."""
        progress, task = self.progress, self.data.task
        rows, record = self.gather(self.seen)
        self.seen = []
        probability = task.probabilities(record[:, 1:])
        train = sp_se_score(
            self.data.classes(rows), task.predicted_classes(probability, task.default_thresholds)
        )
        row = {
            "epoch": progress.epoch,
            "lr": self.schedule.get_last_lr()[0],
            "train_loss": _mean(record[:, 0]),
            **{f"train_{key}": value for key, value in train._asdict().items()},
            "train_clips_per_s": len(rows) / max(progress.seconds, 1e-9),
        }
        self.model.conditioner.finalise()
        score, thresholds = float("nan"), task.default_thresholds
        if len(self.selection_rows):
            name = "val" if self.training.selection == "validation" else "test_selection"
            logits, loss = self.predict(self.selection_rows, with_loss=True)
            probability = task.probabilities(logits)
            label = self.data.label[self.selection_rows].numpy()
            if self.training.thresholds == "chosen":
                thresholds = choose_thresholds(
                    *(task, probability, label, self.training.min_sensitivity, self.groups)
                )
            figures = summarise(task, probability, label, thresholds)
            if self.groups is not None:
                pred = task.predicted_classes(probability, thresholds)
                figures["group_score"] = group_score(task.true_classes(label), pred, self.groups)
            score = figures.get("group_score", figures["score"])
            row[f"{name}_loss"] = loss
            row |= {f"{name}_{key}": value for key, value in figures.items()}
        row |= {
            f"model_{key}": value
            for part in (self.model.conditioner, self.model.methods)
            for key, value in part.diagnostics().items()
        }
        row = {key: float(value) for key, value in row.items()}
        progress.history.append(row)
        if self.training.selection == "fixed":
            better = progress.epoch == self.training.epochs - 1
        else:
            better = progress.best_epoch < 0 or score > progress.best_score
        progress.stale += 1
        if better:
            progress.best_epoch, progress.best_score = progress.epoch, score
            progress.thresholds, progress.stale = tuple(thresholds), 0
            self.best = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        progress.epoch, progress.step, progress.seconds = progress.epoch + 1, 0, 0.0
        return row

    def _report(self, row: dict[str, float]) -> None:
        if not self.runtime.is_main:
            return
        if self.checkpointer:
            self.checkpointer.folder.write_metrics(self.progress.history)
        self.tracker.metrics(*epoch_metrics(row))
        logger.info(epoch_line(row, self.training.epochs, self.progress.stale == 0))

    # ---------------------------------------------------------------- evaluation

    def predict(
        self, rows: np.ndarray, *, with_loss: bool = False
    ) -> np.ndarray | tuple[np.ndarray, float]:
        """Logits [n, K] float32 of the given rows, in their order, on every process.

        Args:
            rows: row numbers [n].
            with_loss: also return the mean task loss.

        Raises:
            UserError: a logit is not finite; no metric is computed from such.
        """
        logits = self.predictor(rows)
        diverged = int((~np.isfinite(logits)).any(axis=1).sum())
        if diverged:
            epoch = min(self.progress.epoch + 1, self.training.epochs)
            raise UserError(
                f"after epoch {epoch} the logits of {diverged} of {len(rows)} evaluated cycles are "
                "not finite; lower training.lr or set training.precision=fp32"
            )
        if not with_loss:
            return logits
        losses = self.loss(torch.from_numpy(logits).to(self.runtime.device),
                           self.data.label[rows].to(self.runtime.device))  # fmt: skip
        return logits, _mean(losses.cpu().numpy())

    def gather(self, parts: list[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
        """(rows [n], (loss, logits) [n, 1 + K]) of all processes, without padding."""
        return gather_rows(self.runtime, parts, 1 + len(self.data.task.outputs))


def _mean(values: np.ndarray) -> float:
    """Mean that does not depend on the order, which resuming several processes may change."""
    return math.fsum(values.tolist()) / len(values)


def epoch_line(row: dict[str, float], epochs: int, best: bool) -> str:
    """One line per epoch, at most 100 columns; * marks the best epoch so far."""
    part = next((p for p in ("val", "test_selection") if f"{p}_score" in row), "train")
    loss = _loss(row[f"{part}_loss"])
    chosen_by = {"val": f"val {loss}", "test_selection": "TEST-SELECTED", "train": "train"}[part]
    groups = row.get(f"{part}_group_score")
    chosen_by += "" if groups is None else f"  groups {groups:.1f}"
    return (
        f"epoch {int(row['epoch']) + 1:3d}/{epochs}  loss {_loss(row['train_loss'])}  "
        f"{chosen_by}  Sp {row[f'{part}_sp']:5.1f}  "
        f"Se {row[f'{part}_se']:5.1f}  Score {row[f'{part}_score']:5.1f}{'*' if best else ' '} "
        f"lr {row['lr']:.1e}  {row['train_clips_per_s']:.0f} clips/s"
    )


def _loss(value: float) -> str:
    """Six columns: four decimals, fewer from 10 on."""
    return f"{value:<6.4f}" if value < 10 else f"{value:<#6.5g}"


def _need_both_sides(classes: np.ndarray, selection: str) -> None:
    """Refuse a selection part [n] on which the Score is not defined (none at all is fine)."""
    if len(classes) and (classes > 0).mean() in (0.0, 1.0):
        raise UserError(
            f"the {len(classes)} cycles that training.selection={selection} chooses by are all "
            f"{'abnormal' if classes[0] else 'normal'}, so they have no ICBHI Score; add "
            "recordings, try another dataset.val_seed, or set training.selection=fixed"
        )


def _need_every_label(labels: Tensor) -> None:
    """Refuse training cycles [N, C] among which a label is always or never given."""
    names = EVENTS if labels.shape[1] == len(EVENTS) else ("abnormal",)
    for name, positives in zip(names, labels.sum(dim=0).tolist(), strict=True):
        if positives in (0, len(labels)):
            raise UserError(
                f"all {len(labels)} training cycles have the same {name!r} label; "
                "add recordings or choose another split (dataset.split_strategy)"
            )
