"""A checkpoint and data -> predictions and the full report, without a configuration file.

The checkpoint holds the configuration, the fitted statistics and the thresholds; nothing is fitted
or chosen again. On the data it was trained with, the figures of the test part are those of the
run's own report.
"""

from __future__ import annotations

import filecmp
import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data.loader import Cycles
from data.synthetic.corpus import is_synthetic
from models.build import ConditionedAST
from models.conditioner import Conditioner
from models.registry import VARIANTS
from utils.common.errors import UserError
from utils.evaluation.baselines import floor_reports
from utils.evaluation.metadata_test import metadata_test
from utils.evaluation.report import evaluate_predictions
from utils.metrics.predictions import make_predictions, read_predictions
from utils.training.assemble import build_data, build_inputs, count_parts
from utils.training.checkpoint import git_revision, load_checkpoint
from utils.training.device import Runtime, describe
from utils.training.predict import Predictor
from utils.training.runfolder import RunFolder

logger = logging.getLogger(__name__)

SPLITS = ("test", "val", "train", "all")


class Evaluator:
    """A trained model on data.

    Args:
        path: the checkpoint.
        data_folder: read instead of the folder that the checkpoint names.
        device: auto | cpu | cuda; None: as configured.
        batch_size: cycles per forward pass; None: as configured. Another one, like another device,
            changes the logits by rounding.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        data_folder: str | None = None,
        device: str | None = None,
        batch_size: int | None = None,
    ):
        self.path = Path(path)
        self.checkpoint = load_checkpoint(path)
        self.config = self.checkpoint.config_to_read(data_folder)
        self.variant = VARIANTS[self.config.variant]
        self.task = self.config.task
        self.other_folder = data_folder is not None
        self.device = device or self.config.training.device
        self.batch_size = batch_size or self.config.dataset.batch_size

    # ---------------------------------------------------------------- parts, built when needed

    @cached_property
    def run_folder(self) -> RunFolder | None:
        """The folder of the run that wrote the checkpoint, where it is still there.

        Evaluation writes into it, so the folder that the checkpoint names counts only if its best
        is this very file; anyone may have written the name.
        """
        beside = RunFolder(self.path.resolve().parent.parent)
        if beside.config.is_file() and beside.path.name == self.checkpoint.run:
            return beside
        named = RunFolder(Path(self.config.training.output_dir) / self.checkpoint.run)
        there = named.config.is_file() and named.best.is_file()
        return named if there and filecmp.cmp(named.best, self.path, shallow=False) else None

    @cached_property
    def data(self) -> Cycles:
        """The cycles, encoded with the checkpoint's statistics."""
        return build_data(self.config, self.checkpoint.metadata_statistics())

    @cached_property
    def runtime(self) -> Runtime:
        runtime = Runtime(self.device, self.config.training.precision, "false")
        logger.info("%s on %s", self.checkpoint.run, describe(runtime))
        return runtime

    @cached_property
    def model(self) -> ConditionedAST:
        return self.checkpoint.build_model().to(self.runtime.device)

    @cached_property
    def predictor(self) -> Predictor:
        inputs = build_inputs(self.config, self.data, self.model, self.runtime)
        return Predictor(self.data, self.model, inputs, self.runtime, self.batch_size)

    # ---------------------------------------------------------------- what is evaluated

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of a part; `all` is every cycle that is in one.

        Raises:
            UserError: the run has no such part.
        """
        parts = self.data.split
        if split == "all":
            return np.sort(np.concatenate([parts.train, parts.val, parts.test]))
        rows = getattr(parts, split)
        if not len(rows):
            raise UserError(
                f"{self.path} was trained with training.selection={self.checkpoint.selection}, "
                f"which has no {split} part; evaluate another --split"
            )
        return rows

    def other_data(self) -> str:
        """How the data differ from what the run saw, by their counts; empty: not at all."""
        then, now = self.checkpoint.counts, count_parts(self.data)
        parts = [
            f"{part} {then[part]['cycles']:,} cycles of {then[part]['patients']} patients then, "
            f"{now[part]['cycles']:,} of {now[part]['patients']} now"
            for part in now
            if now[part] != then[part]
        ]
        if not parts:
            return ""
        return (
            f"OTHER DATA: {self.config.dataset.data_folder} is not what the run was made with "
            f"({'; '.join(parts)}). A patient of this test part may have been in training."
        )

    def partial_message(self) -> str:
        """Everything that makes the figures incomparable with those on the whole database."""
        partial = self.data.completeness.message
        if self.checkpoint.partial and not partial:
            partial = f"TRAINED ON {self.checkpoint.partial}"
        return " ".join(filter(None, (self.other_data(), partial)))

    @property
    def synthetic(self) -> bool:
        """Whether the recordings were generated, those of the training or those evaluated."""
        return self.checkpoint.synthetic or is_synthetic(self.config.dataset.data_folder)

    def notes(self, split: str) -> list[str]:
        """What must be said before figures of this part are read."""
        notes = []
        if split in ("train", "all"):
            seen = len(self.data.split.train)
            notes.append(
                f"SEEN IN TRAINING: the model was fitted on {seen:,} of these "
                f"{len(self.rows(split)):,} cycles; the figures say nothing about new patients."
            )
        if split in ("val", "all") and len(self.data.split.val):
            notes.append("SELECTED HERE: epoch and thresholds were chosen on the validation part.")
        return notes

    def predictions(self, split: str) -> pd.DataFrame:
        """Predictions table of a part, decided by the checkpoint's thresholds."""
        rows = self.rows(split)
        logits = self.predictor(rows)
        thresholds = self.checkpoint.thresholds
        return make_predictions(self.task, self.data.table, rows, logits, thresholds)

    def floors(self) -> dict[str, Any]:
        """The floors on the test part, from the model's own training rows and by its own rule."""
        return floor_reports(
            self.task,
            self.data.table,
            self.data.split,
            selection=self.checkpoint.selection,
            pos_weight=self.checkpoint.pos_weight or None,
            min_sensitivity=self.config.training.min_sensitivity,
        )

    def stored(self) -> tuple[pd.DataFrame, dict[str, Any]] | None:
        """The run's own predictions of the test part and its floors, if they belong to this
        checkpoint for sure."""
        folder = self.run_folder
        if self.other_folder or folder is None or not folder.finished:
            return None
        report, checkpoint = folder.read_report(), self.checkpoint
        same = (
            report["epoch"] == checkpoint.epoch
            and tuple(report["thresholds"]) == tuple(checkpoint.thresholds)
            and report["revision"] == checkpoint.revision
            and report["counts"] == checkpoint.counts
        )
        path = folder.predictions / "test.csv"
        if not same or not path.is_file():
            return None
        return read_predictions(path, self.task), report["test"]["floors"]

    # ---------------------------------------------------------------- the report

    def report(
        self, split: str = "test", *, with_metadata_test: bool = True
    ) -> tuple[dict[str, Any], pd.DataFrame]:
        """Everything that is said about a part, and the predictions it rests on.

        The test part also gets the floors, a model that sees metadata the metadata test.
        """
        checkpoint, data = self.checkpoint, self.data
        frame = self.predictions(split)
        fit = split == "test" and len(data.split.val) > 0
        report = self._origin(split) | evaluate_predictions(
            frame,
            self.task,
            checkpoint.thresholds,
            selection=checkpoint.selection,
            val_predictions=self.predictions("val") if fit else None,
            pos_weight=checkpoint.pos_weight or None,
            partial_message=self.partial_message(),
            synthetic=self.synthetic,
        )
        if split == "test":
            report["floors"] = self.floors()
        if with_metadata_test and self.is_conditioned:
            report["metadata_test"] = self._metadata_test(self.rows(split))
        return report, frame

    @property
    def is_conditioned(self) -> bool:
        """Whether the metadata can change a prediction: all variants but the plain AST."""
        return type(self.model.conditioner) is not Conditioner

    def _origin(self, split: str) -> dict[str, Any]:
        config, checkpoint = self.config, self.checkpoint
        return {
            "run": checkpoint.run,
            "variant": config.variant,
            "title": self.variant.title,
            "n_cls": config.dataset.n_cls,
            "split_strategy": config.dataset.split_strategy,
            "selection": checkpoint.selection,
            "seed": config.training.seed,
            "epoch": checkpoint.epoch,
            "part": split,
            "notes": self.notes(split),
            "data_folder": config.dataset.data_folder,
            "revision": checkpoint.revision,
            "evaluated_with": {"revision": git_revision(), "machine": describe(self.runtime)},
        }

    def _metadata_test(self, rows: np.ndarray) -> list[dict]:
        def predict(metadata):
            return map(self.task.probabilities, self.predictor.under(rows, metadata))

        return metadata_test(
            predict,
            self.data.table.iloc[rows],
            self.data.statistics.transform,
            self.task,
            self.checkpoint.thresholds,
        )
