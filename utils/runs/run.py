"""One run from its configuration to its report, in the steps of the five scripts."""

from __future__ import annotations

import filecmp
import logging
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from data.corpora.registry import read_corpus
from data.loader import Cycles
from models.build import ConditionedAST
from utils.common.cli import log_file, set_up_logging
from utils.common.errors import Busy, Preempted, UserError
from utils.common.files import TEMPORARY, atomic_write, write_text
from utils.common.lock import held
from utils.config.schema import RunConfig, flatten
from utils.config.validation import check_micro_batches, opposed
from utils.evaluation.report import RunReport
from utils.evaluation.trained_model import TrainedModel
from utils.metrics.predictions import make_predictions, write_predictions
from utils.metrics.protocol import is_leaky, warnings
from utils.runs import group
from utils.runs.end import banner, print_end, published_best, write_run_report
from utils.runs.model_summary import parameter_table
from utils.tracking import MAX_TAG, Tracker, start_tracking
from utils.training.assemble import (
    build_data,
    build_inputs,
    build_model,
    build_trainer,
    describe_run,
)
from utils.training.checkpoint import git_revision, load_checkpoint, save_checkpoint
from utils.training.checkpointer import Checkpointer
from utils.training.device import Runtime, describe
from utils.training.fingerprint import difference, fingerprint
from utils.training.inputs import Inputs
from utils.training.runfolder import RunFolder
from utils.training.trainer import Trainer

logger = logging.getLogger(__name__)


def runs_of(
    config: RunConfig,
    *,
    seeds: Sequence[int] | None = None,
    folds: Sequence[str] | None = None,
    member_of: Path | None = None,
    validate_only: bool = False,
) -> Iterator[Run]:
    """Yield the runs that a command asks for, each ready to be trained.

    A run that is finished already is shown and not yielded again.

    Args:
        seeds, folds, member_of, validate_only: as on the command line (`utils.runs.start`).
    """
    configs = group.expand(config, seeds, folds)
    runtime = Runtime(config.training.device, config.training.precision, config.training.compile)
    set_up_logging(quiet=not runtime.is_main)
    check_micro_batches(config, runtime.world)
    if len(configs) == 1:
        yield from _unfinished(Run(configs[0], runtime, member_of, validate_only))
        return
    if validate_only:
        raise UserError("--validate-only is for one run; leave --seeds and --folds out")
    if member_of:
        raise UserError("--member-of is for one run; leave --seeds and --folds out")
    family = group.Group(configs)
    if runtime.is_main:
        family.start()
    for number, member in enumerate(configs, start=1):
        logger.info("run %d of %d", number, len(configs))
        yield from _unfinished(Run(member, runtime, family.path))
    if runtime.is_main:
        family.finish()
    runtime.barrier()


def _unfinished(run: Run) -> Iterator[Run]:
    if not run.already_finished():
        yield run


class Run:
    """A run in progress: `data`, `model`, `fit`, `test`, in this order, inside `with`.

    Args:
        config: what is run.
        runtime: where.
        parent: folder of the grid (seeds, folds, ablations) this run belongs to; such a run does
            not replace checkpoints/<variant>_best.pt.
        validate_only: end with the validation Score in record.json; the test half stays closed.

    Raises:
        UserError: only to be validated, and not selected on validation patients.
    """

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        parent: Path | None = None,
        validate_only: bool = False,
    ):
        selection = config.training.selection
        if validate_only and selection != "validation":
            raise UserError(f"--validate-only needs training.selection=validation, not {selection}")
        self.validate_only = validate_only
        self.config, self.runtime = config, runtime
        self.folder = RunFolder.of(config)
        self.parent, self.is_member = parent, parent is not None
        self.tracker = Tracker()
        self._lost: threading.Event | None = None  # set when another process takes the folder over

    def already_finished(self) -> bool:
        """Show the result of an identical run that has been finished, if its data are the same."""
        if self.config.training.resume != "auto" or not self.folder.finished:
            return False
        if self.runtime.is_main:
            self.folder.check()
            self._check_unchanged()
            record, copy = self.folder.read_record(), published_best(self.config)
            lost = not copy.is_file() or (record and "published" not in record)
            unpublished = not self.is_member and lost
            if unpublished or self.folder.leftovers:  # a kill or a full disk came near the end
                with held(self.folder.path):
                    self.folder.tidy()
                    if unpublished:
                        self._publish()
            logger.info("finished already; training.resume=never starts from scratch")
            own = not self.is_member and filecmp.cmp(copy, self.folder.best, shallow=False)
            print_end(self.folder, self.config, published=own)
        return True

    def _check_unchanged(self) -> None:
        """Refuse to show a finished run as the result of data that have changed since."""
        then, dataset = load_checkpoint(self.folder.best).fingerprint, self.config.dataset
        try:
            now = fingerprint(read_corpus(dataset), dataset.full_hash)
        except UserError as error:
            logger.warning("the data of this finished run cannot be read now: %s", error)
            return
        differs = difference(then, now)
        if differs:
            raise UserError(
                f"{self.folder.path} was finished on other data than {dataset.data_folder} "
                f"holds now: {differs}; restore it, or start from scratch with "
                "training.resume=never"
            )

    def __enter__(self) -> Run:
        with ExitStack() as stack:
            self._log_to = stack.enter_context(log_file())  # warnings of the data, banners
            logger.info("%s: %s", self.config.title, self.folder.path)
            if self.runtime.is_main:
                self._lost = stack.enter_context(held(self.folder.path))
                if self.config.training.resume == "auto" and self.folder.finished:
                    raise Busy(f"{self.folder.path} was finished by another process just now")
            if self.config.training.selection == "test":
                logger.warning("%s", banner("SELECTED ON TEST: these metrics will be optimistic"))
            for line in opposed(self.config):
                logger.warning("%s", line)
            self._stack = stack.pop_all()
        return self

    def _open_folder(self) -> None:
        """Create the run's folder, once all that the user could have got wrong has been read."""
        if self.runtime.is_main:
            self.folder.prepare(self.config, fresh=self.config.training.resume == "never")
            self._log_to(self.folder.log)
        self.runtime.barrier()
        logger.info("%s on %s", self.config.title, describe(self.runtime))

    def __exit__(self, kind, *_) -> None:
        stopped = kind in (Preempted, SystemExit)
        status = "FINISHED" if kind is None else "KILLED" if stopped else "FAILED"
        message = self.tracker.finish(status)
        if message:
            logger.warning("%s", message)
        self._stack.close()
        if kind is None and self.runtime.is_main and not self.validate_only:
            print_end(self.folder, self.config, published=not self.is_member)

    # ---------------------------------------------------------------- the parts, in order

    def data(self) -> Cycles:
        """Cycle table, split, metadata and waveforms."""
        data = build_data(self.config)
        self.description = describe_run(self.config, data)
        marks = (self.description[name] for name in ("partial", "synthetic"))
        for warning in warnings(*marks, is_leaky(self.config.dataset.split_strategy)):
            logger.warning("%s", banner(warning))
        parts = ((part, self.description["counts"][part]) for part in ("train", "val", "test"))
        counts = ", ".join(f"{part} {n['cycles']} ({n['patients']})" for part, n in parts)
        logger.info("cycles (patients): %s", counts)
        return data

    def model(self, data: Cycles) -> ConditionedAST:
        """The variant, built from the run's seed alone."""
        torch.manual_seed(self.config.training.seed)
        model = build_model(self.config, data.statistics)
        logger.info("%s", parameter_table(model))
        return model

    def inputs(self, data: Cycles, model: ConditionedAST) -> Inputs:
        """What the model computes from."""
        return build_inputs(self.config, data, model, self.runtime)

    def fit(self, model: ConditionedAST, data: Cycles) -> Trainer:
        """Train or resume; the model then has the weights of the chosen epoch."""
        self._open_folder()
        origin = self.description["config"], self.description["fingerprint"]
        checkpointer = Checkpointer(self.folder, *origin, lost=self._lost)
        inputs = self.inputs(data, model)
        trainer = build_trainer(
            self.config, data, self.runtime, model=model, inputs=inputs, checkpointer=checkpointer
        )
        if self.runtime.is_main:
            self.tracker = trainer.tracker = self._start_tracking()
        trainer.fit()
        return trainer

    def test(self, trainer: Trainer) -> RunReport | None:
        """Open the test half, once; write predictions, report and checkpoint."""
        if self.validate_only:
            if self.runtime.is_main:
                progress = trainer.progress
                found = {"score": progress.best_score, "epoch": progress.best_epoch}
                self.folder.write_record(validation=found)
            return None
        data, task = trainer.data, trainer.data.task
        checkpoint = trainer.checkpoint(self.description)
        if self.runtime.is_main:
            save_checkpoint(self.folder.best, checkpoint)
        frames = {}
        for part, rows in (("val", data.split.val), ("test", data.split.test)):
            if len(rows):
                logits = trainer.predict(rows)
                frames[part] = make_predictions(
                    task, data.table, rows, logits, checkpoint.thresholds
                )
        report = None
        if self.runtime.is_main:
            for part, frame in frames.items():
                path = self.folder.predictions / f"{part}.csv"
                write_predictions(frame, path)
                self.tracker.artifact(path, "predictions")
            report = write_run_report(
                self.folder, checkpoint, data, frames, self.tracker, trainer.controls()
            )
            self._track_files()
            self._publish()
            self.folder.last.unlink(missing_ok=True)
        self.runtime.barrier()
        return report

    # ---------------------------------------------------------------- details

    def _start_tracking(self) -> Tracker:
        config, training = self.config, self.config.training
        counts = {k: v for k, v in self.description["counts"].items() if k != "data"}
        task = f"{config.dataset.n_cls}-class"
        tags = {
            "variant": config.variant,
            "methods": ", ".join(config.methods) or "none",
            "task": task,
            "selection": training.selection,
            "seed": training.seed,
            "partial_data": str(bool(self.description["partial"])).lower(),
            "synthetic": str(self.description["synthetic"]).lower(),
            "leaky_split": str(is_leaky(config.dataset.split_strategy)).lower(),
            "git_revision": git_revision() or "unknown",
            "run_folder": self.folder.path,
        }
        tracker = start_tracking(
            config.mlflow,
            self.folder.path,
            run_name=f"{config.title} {task} {training.selection} s{training.seed}",
            tags=tags,
            params=flatten(self.description["config"]) | flatten(counts, "data."),
            parent=self.parent,
        )
        tracker.artifact(self.folder.config)
        return tracker

    def _track_files(self) -> None:
        """Pictures, report, model card and (by key) the checkpoint; the report is the overview."""
        overview = (self.folder.path / "report.md").read_text(encoding="utf-8")
        if len(overview) > MAX_TAG:
            overview = overview[:MAX_TAG].rpartition("\n")[0]  # whole lines
        self.tracker.tags({"mlflow.note.content": overview})
        for path in sorted(self.folder.figures.glob("*.png")):
            self.tracker.artifact(path, "figures")
        for path in sorted(self.folder.path.glob("*.md")):
            self.tracker.artifact(path)
        self.tracker.artifact(self.folder.report)
        if self.config.mlflow.log_checkpoint:
            self.tracker.artifact(self.folder.best, "checkpoints")

    def _publish(self) -> None:
        """checkpoints/<variant>_best.pt: a copy of the latest finished plain run's best, and its
        model card next to it; the run's record comes last and names what was replaced."""
        if self.is_member:
            return
        target, replaced = published_best(self.config), ""
        if target.is_file():
            try:
                before = TrainedModel.open(target)
                if before.checkpoint.run != self.folder.path.name:
                    replaced = f"{' '.join(before.headline().split())}, {before.checkpoint.run}"
            except UserError:
                replaced = "a file that is no checkpoint"
        card = (self.folder.path / "model_card.md").read_text(encoding="utf-8")
        size = self.folder.best.stat().st_size
        with held(target, wait=60):  # from runs of the same variant that end at the same time
            for leftover in target.parent.glob(TEMPORARY.replace(".", f".{target.stem}.", 1)):
                leftover.unlink(missing_ok=True)
            write_text(target.with_suffix(".md"), card)
            with self.folder.best.open("rb") as best, atomic_write(target, needed_bytes=size) as to:
                shutil.copyfileobj(best, to)
        self.folder.write_record(published=str(target), replaced=replaced)
