"""Keeping a run: the training state, the best weights, and exact continuation.

`last.pt` names the epoch of the best weights and `best-NNNN.pt` holds them; the latter is written
before the former and removed only after the next `last.pt` stands, so that the pair is consistent
whenever a run is killed.
"""

from __future__ import annotations

import logging
import math
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from utils.common.errors import UserError
from utils.config.schema import config_from_dict, config_hash
from utils.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_state,
    save_checkpoint,
    save_state,
)
from utils.training.device import Runtime
from utils.training.runfolder import RunFolder

logger = logging.getLogger(__name__)


class Checkpointer:
    """Writes and reads what a run needs to go on.

    Args:
        folder: the run folder.
        runtime: only its main process writes.
        describe: fields of a `Checkpoint` that do not depend on the epoch.
    """

    def __init__(self, folder: RunFolder, runtime: Runtime, describe: dict[str, Any]):
        self.folder, self.runtime, self.describe = folder, runtime, describe
        self.best: dict[str, torch.Tensor] | None = None
        self._written: int | None = None  # epoch of the best weights on disk

    # ---------------------------------------------------------------- best weights

    def remember_best(self, trainer: Any) -> None:
        """Copy the current weights; they reach the disk with the next checkpoint."""
        weights = trainer.model.state_dict()
        self.best = {name: value.detach().clone() for name, value in weights.items()}

    def restore_best(self, trainer: Any) -> None:
        """Put the best weights back into the model."""
        trainer.model.load_state_dict(self.best)

    def best_checkpoint(self, trainer: Any) -> Checkpoint:
        """The best weights so far with all that evaluation needs beside the data."""
        progress = trainer.progress
        bce = trainer.training.loss == "bce"
        return Checkpoint(
            weights={name: value.cpu() for name, value in self.best.items()},
            thresholds=progress.thresholds,
            epoch=progress.best_epoch,
            score=progress.best_score,
            layer_norm_eps=trainer.model.backbone.norm.eps,
            pos_weight=tuple(trainer.pos_weight.tolist()) if bce else (),
            **self.describe,
        )

    def finish(self, trainer: Any) -> Checkpoint:
        """Write best.pt; the training state stays until `clean`."""
        checkpoint = self.best_checkpoint(trainer)
        if self.runtime.is_main:
            save_checkpoint(self.folder.best, checkpoint)
        self.runtime.barrier()
        return checkpoint

    def clean(self) -> None:
        """Remove the training state of a finished run (optimiser: twice the weights)."""
        for path in [self.folder.last, *self._best_files()]:
            path.unlink(missing_ok=True)

    def _best_file(self, epoch: int) -> Path:
        return self.folder.checkpoints / f"best-{epoch:04d}.pt"

    def _best_files(self) -> list[Path]:
        return sorted(self.folder.checkpoints.glob("best-*.pt"))

    # ---------------------------------------------------------------- training state

    def save(self, trainer: Any) -> None:
        """Write the best weights (if new) and the training state; every process must call it."""
        progress = trainer.progress
        rows, record = trainer.gather(trainer.seen)
        generators = gather_object([_generator_states()])
        if not self.runtime.is_main:
            self.runtime.barrier()
            return
        if self.best is not None and self._written != progress.best_epoch:
            save_checkpoint(self._best_file(progress.best_epoch), self.best_checkpoint(trainer))
            self._written = progress.best_epoch
        save_state(
            self.folder.last,
            {
                "describe": self.describe,
                "progress": asdict(progress),
                "model": trainer.model.state_dict(),
                "optimizer": trainer.optimizer.state_dict(),
                "schedule": trainer.schedule.state_dict(),
                "scaler": trainer.runtime.scaler.state_dict(),
                "generators": generators,
                "seen": (torch.from_numpy(rows), torch.from_numpy(record)),
            },
        )
        for path in self._best_files():
            if path != self._best_file(progress.best_epoch):
                path.unlink(missing_ok=True)
        self.runtime.barrier()

    def resume(self, trainer: Any) -> bool:
        """Continue from last.pt if there is one; every process reads it.

        Raises:
            UserError: it belongs to another configuration, other data or other code.
        """
        if not self.folder.last.is_file():
            return False
        state = load_state(self.folder.last)
        try:
            self._check_origin(state["describe"])
            self._restore(trainer, state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{self.folder.last} does not fit this code ({reason}); use the revision that "
                "wrote it, or start anew with training.resume=never"
            ) from error
        progress = trainer.progress
        logger.info(
            "resuming after epoch %d, step %d (%s)",
            progress.epoch,
            progress.step,
            self.folder.last,
        )
        return True

    def _check_origin(self, describe: dict[str, Any]) -> None:
        """Only an equal configuration on equal data goes on."""
        now, then = (config_hash(config_from_dict(d["config"])) for d in (self.describe, describe))
        if now != then:
            raise UserError(
                f"{self.folder.last} belongs to another configuration ({then}, not {now}); "
                "start anew with training.resume=never"
            )
        for key in ("counts", "statistics"):
            if not _alike(self.describe[key], describe[key]):
                raise UserError(
                    f"the data has changed since {self.folder.last} was written ({key} of its "
                    "parts differ); restore it, or start anew with training.resume=never"
                )

    def _restore(self, trainer: Any, state: dict[str, Any]) -> None:
        progress = trainer.progress
        for key, value in state["progress"].items():
            setattr(progress, key, tuple(value) if key == "thresholds" else value)
        trainer.model.load_state_dict(state["model"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.schedule.load_state_dict(state["schedule"])
        trainer.runtime.scaler.load_state_dict(state["scaler"])
        if progress.best_epoch >= 0:
            self.best = load_checkpoint(self._best_file(progress.best_epoch)).weights
            self._written = progress.best_epoch
        if self.runtime.is_main:
            device = self.runtime.device
            rows, record = state["seen"]
            trainer.seen = [(rows.to(device), record.to(device))] if len(rows) else []
        generators = state["generators"]
        if len(generators) == self.runtime.world:
            _set_generator_states(generators[self.runtime.rank])
        else:
            logger.warning(
                "the run was saved by %d processes and goes on with %d: dropout will differ",
                len(generators),
                self.runtime.world,
            )


def _alike(a: Any, b: Any) -> bool:
    """Equal, but for the last digits of what was computed on another machine."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b


def _generator_states() -> dict[str, Any]:
    """States of every random generator a library might use, as tensors and plain numbers."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global one, whoever uses it
    version, internal, gauss = random.getstate()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_generator_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
