"""The figures of one evaluation or finished run, from its report; all of them at a run's end."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from models.conditioners.softfilm import SoftFiLM
from utils.common.errors import UserError
from utils.common.readers import read_results
from utils.evaluation.report import Origin, Report, RunReport, read_report
from utils.evaluation.trained_model import TrainedModel
from utils.figures import evaluation as drawn
from utils.figures.compared import permutation_figure
from utils.figures.style import Notice, Output
from utils.metrics.protocol import caption

logger = logging.getLogger(__name__)


@dataclass
class Evaluation:
    """The report of one part, and where it comes from.

    Attributes:
        folder: the run's, or that of an evaluation of it.
        report: its origin is set.
    """

    folder: Path
    report: Report

    @classmethod
    def of_run(cls, folder: Path, run: RunReport, part: str) -> Evaluation:
        """A part of a finished run.

        Raises:
            UserError: the run has no such part.
        """
        report = getattr(run, part)
        if report is None:
            there = [p for p in ("test", "val") if getattr(run, p) is not None]
            raise UserError(
                f"{folder}/report.json has no evaluation of the {part} part "
                f"(there: {', '.join(there) or 'none'})"
            )
        report.origin = run.origin(folder.name)
        report.origin.part = part
        report.synthetic = report.synthetic or run.synthetic
        return cls(folder, report)

    @property
    def origin(self) -> Origin:
        return self.report.origin

    @property
    def part(self) -> str:
        return self.origin.part

    def notice(self) -> Notice:
        """What every figure of this evaluation carries."""
        return Notice(
            protocol=self.origin.selection,
            partial=self.report.partial_message,
            synthetic=self.report.synthetic,
            leaky=self.report.leaky,
            source=f"{self.origin.run}, {self.part} part",
        )

    def headline(self) -> str:
        """Task, protocol, data, epoch and date: which evaluation this is, at most 100 columns."""
        one, report = self.origin, self.report
        written = datetime.fromtimestamp((self.folder / "report.json").stat().st_mtime)
        text = caption(
            f"{one.title}, {one.n_cls}-class", one.selection, report.partial, report.synthetic,
            report.leaky,
        )  # fmt: skip
        text += (
            f"; {one.split_strategy} split, {self.part} part, seed {one.seed}, epoch "
            f"{one.epoch + 1}, written {written:%Y-%m-%d %H:%M}"
        )
        return textwrap.fill(text, 100, subsequent_indent="  ")


def read_evaluation(folder: str | Path, part: str = "test") -> Evaluation:
    """report.json of a run's folder or of an evaluation's output folder.

    Raises:
        UserError: no such file, it is damaged, or it has no such part.
    """
    folder = Path(folder)
    path = folder / "report.json"
    if not path.is_file():
        raise UserError(
            f"{path} is missing: give the folder of a finished run (runs/...) with --run, or "
            "finish it by starting the same training command again"
        )
    if "metrics" in read_results(path):
        return Evaluation(folder, read_report(path, Report))
    return Evaluation.of_run(folder, read_report(path), part)


def confusion(one: Evaluation, output: Output) -> list[Path]:
    """Confusion matrix at the thresholds in use."""
    matrix = one.report.confusion
    metrics = {name: metric.value for name, metric in one.report.metrics["chosen"].items()}
    figure = drawn.confusion_figure(np.array(matrix["chosen"]), matrix["classes"], metrics)
    text = f"Confusion matrix of {one.origin.title}, {one.part} part."
    return output.write(figure, "confusion", text, one.notice())


def operating_curve(one: Evaluation, output: Output) -> list[Path]:
    """Se against Sp, normal against anything abnormal, with the points in use."""
    report = one.report
    curve = {key: np.array(value) for key, value in report.operating_curve.items()}
    prefix = "collapsed_" if report.task["n_cls"] == 4 else ""
    points = {
        label: tuple(report.metrics[rule][f"{prefix}{name}"].value for name in ("sp", "se"))
        for rule, label in (("chosen", "thresholds in use"), ("default", "thresholds 0.5"))
    }
    points = {label: point for label, point in points.items() if not np.isnan(point).any()}
    figure = drawn.operating_figure({one.origin.title: curve}, points)
    text = (
        f"Normal against anything abnormal, {one.part} part; the curve ranks cycles by the "
        "largest probability of an abnormal output. Grey lines: equal ICBHI Score (%)."
    )
    return output.write(figure, "operating_curve", text, one.notice())


def reliability(one: Evaluation, output: Output) -> list[Path]:
    """Observed share against predicted probability."""
    if not one.report.calibration:
        raise UserError(f"{one.folder}: the {one.part} part has no cycles to judge")
    text = (
        f"Reliability of each output, {one.part} part; bins of equal mass. pos_weight in the "
        "loss shifts the probabilities as trained; dotted: prevalence; ECE: expected "
        "calibration error, in the order of the legend."
    )
    figure = drawn.reliability_figure(one.report.calibration)
    return output.write(figure, "reliability", text, one.notice())


def subgroups(one: Evaluation, output: Output) -> list[Path]:
    """Sp, Se and Score by device, site, sex, age and whether the BMI is known."""
    table = pd.DataFrame(one.report.subgroups)
    table[["sp", "se", "score"]] = table[["sp", "se", "score"]].astype(float)
    text = (
        f"Subgroups (cycles / patients), {one.part} part; dotted: Score of all cycles. A rate "
        "over fewer than ten cycles is left out."
    )
    figure = drawn.subgroup_figure(table, one.report.metrics["chosen"]["score"].value)
    return output.write(figure, "subgroups", text, one.notice())


def learning_curves(one: Evaluation, output: Output) -> list[Path]:
    """Loss, Score and learning rate against the epoch."""
    from utils.figures.training import learning_figure, measured_part, read_metrics

    table = read_metrics(one.folder)
    figure = learning_figure(table, measured_part(table), one.origin.epoch)
    text = f"Learning curves of {one.origin.title}."
    return output.write(figure, "learning_curves", text, one.notice())


def permutation(one: Evaluation, output: Output) -> list[Path]:
    """Score with real, shuffled and unknown metadata, as evaluate.py has measured it."""
    inside = one.folder / "evaluation" / one.part
    if not one.report.metadata_test and (inside / "report.json").is_file():
        one = read_evaluation(inside, one.part)
    if not one.report.metadata_test:
        raise UserError(
            f"{one.folder} has no metadata permutation test; run python evaluate.py --checkpoint "
            f"{one.folder}/checkpoints/best.pt first (a model without metadata has none)"
        )
    text = (
        f"Metadata permutation test of {one.origin.title}, {one.part} part: the same model and "
        "sounds with another patient's metadata (mean over shufflings), with none, and without "
        "each field. Right: paired differences with 95 % intervals over patients; dotted: Score "
        "with the real metadata."
    )
    figure = permutation_figure(one.report.metadata_test)
    return output.write(figure, "permutation", text, one.notice())


Draw = Callable[[Evaluation, Output], list[Path]]
#: What is drawn of every evaluation.
EVALUATION_FIGURES: tuple[Draw, ...] = (confusion, operating_curve, reliability, subgroups)


def evaluation_figures(one: Evaluation, folder: Path) -> list[Path]:
    """The figures of one evaluation, as PNG."""
    output = Output(folder, ("png",))
    return _drawn(partial(draw, one, output) for draw in EVALUATION_FIGURES)


def run_figures(one: Evaluation, test_cycles: pd.DataFrame | None = None) -> list[Path]:
    """The figures of one training run, as PNG in its `figures` folder.

    Args:
        one: the test part; its folder is the run's, with metrics.csv and checkpoints/best.pt.
        test_cycles: rows of the cycle table for the masks' effects; None: no mask figure.
    """
    output = Output(one.folder / "figures", ("png",))
    draw = [partial(draw, one, output) for draw in (*EVALUATION_FIGURES, learning_curves)]
    best = one.folder / "checkpoints" / "best.pt"
    if test_cycles is not None and one.origin.variant == "ast_softfilm" and best.is_file():
        draw.append(lambda: masks(TrainedModel.open(best, device="cpu"), test_cycles, output))
    return _drawn(draw)


def _drawn(figures: Iterable[Callable[[], list[Path]]]) -> list[Path]:
    """Draw one after the other; a picture must not cost a run its report."""
    paths = []
    for draw in figures:
        try:
            paths += draw()
        except Exception as error:
            logger.warning("a figure is missing: %s", error)
    return paths


def masks(model: TrainedModel, cycles: pd.DataFrame, output: Output) -> list[Path]:
    """The mask figure of a trained SoftFiLM model; effects are averaged over `cycles`."""
    from utils.figures.masks import analyse_masks, mask_caption, mask_figure
    from utils.training.optim import lr_factor

    checkpoint, training = model.checkpoint, model.config.training
    conditioner = checkpoint.build_model().conditioner
    assert isinstance(conditioner, SoftFiLM)
    per_epoch = -(-checkpoint.counts["train"]["cycles"] // model.config.dataset.batch_size)
    warmup, total = round(training.warmup_epochs * per_epoch), training.epochs * per_epoch
    analysis = analyse_masks(
        conditioner,
        model.statistics.transform(cycles),
        lr=training.lr * conditioner.mask_lr_multiplier,
        steps=(checkpoint.epoch + 1) * per_epoch,
        steps_per_epoch=per_epoch,
        schedule=partial(lr_factor, warmup_steps=warmup, total_steps=total),
    )
    figure, text = mask_figure(analysis), mask_caption(analysis)
    return output.write(figure, "mask_analysis", text, model_notice(model))


def model_notice(model: TrainedModel) -> Notice:
    """What every figure of a trained model carries."""
    return Notice(
        protocol=model.selection,
        partial=model.checkpoint.partial,
        synthetic=model.synthetic,
        leaky=model.leaky,
        source=f"{model.checkpoint.run}, epoch {model.checkpoint.epoch + 1}",
    )
