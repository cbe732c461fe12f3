"""The figures of a finished run, from its report: one function each, and all of them at its end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from models.conditioners.softfilm import SoftFiLM
from utils.common.errors import UserError
from utils.figures import evaluation as drawn
from utils.figures import sources
from utils.figures.options import Options
from utils.figures.sources import Evaluation, Trained

logger = logging.getLogger(__name__)


def _each_run(options: Options, flag: str) -> Iterator[tuple[Evaluation, Options]]:
    """Every run with the options that write its figures; several runs get a folder each."""
    if options.evaluation is not None:
        yield options.evaluation, options
        return
    folders = list(options.runs)
    if not folders and options.checkpoint:
        trained = sources.open_trained(options.checkpoint, flag, "ast_softfilm")
        folders = [str(Path(trained.config.training.output_dir) / trained.checkpoint.run)]
    if not folders:
        raise UserError(
            f"{flag} draws a finished run: name its folder with --run DIR (runs/...), or give its "
            "checkpoint with --checkpoint FILE"
        )
    for folder in folders:
        target = options.output_dir / Path(folder).name if len(folders) > 1 else options.output_dir
        own = Options(**{**vars(options), "output_dir": target})
        yield sources.read_evaluation(folder, options.part), own


def confusion(options: Options) -> list[Path]:
    """Confusion matrix at the thresholds in use."""
    paths = []
    for one, own in _each_run(options, "--confusion"):
        matrix = one.report["confusion"]
        figures = {k: v["value"] for k, v in one.report["metrics"]["chosen"].items()}
        figure = drawn.confusion_figure(np.array(matrix["chosen"]), matrix["classes"], figures)
        text = f"Confusion matrix of {one.run.get('title', one.folder.name)}, {one.part} part."
        paths += own.write(figure, "confusion", text, one.notice())
    return paths


def operating_curve(options: Options) -> list[Path]:
    """Se against Sp, normal against anything abnormal, with the points in use."""
    paths = []
    for one, own in _each_run(options, "--operating-curve"):
        curve = {key: np.array(value) for key, value in one.report["operating_curve"].items()}
        prefix = "collapsed_" if one.report["task"]["n_cls"] == 4 else ""
        points = {
            label: tuple(one.report["metrics"][rule][f"{prefix}{f}"]["value"] for f in ("sp", "se"))
            for rule, label in (("chosen", "thresholds in use"), ("default", "thresholds 0.5"))
        }
        points = {label: point for label, point in points.items() if None not in point}
        name = one.run.get("title", one.folder.name)
        figure = drawn.operating_figure({name: curve}, points)
        text = (
            f"Normal against anything abnormal, {one.part} part; the curve ranks cycles by the "
            "largest probability of an abnormal output. Grey lines: equal ICBHI Score (%)."
        )
        paths += own.write(figure, "operating_curve", text, one.notice())
    return paths


def reliability(options: Options) -> list[Path]:
    """Observed share against predicted probability."""
    paths = []
    for one, own in _each_run(options, "--reliability"):
        if not one.report["calibration"]:
            raise UserError(f"{one.folder}: the {one.part} part has no cycles to judge")
        figure = drawn.reliability_figure(one.report["calibration"])
        text = (
            f"Reliability of each output, {one.part} part; bins of equal mass. pos_weight in the "
            "loss shifts the probabilities as trained; dotted: prevalence; ECE: expected "
            "calibration error, in the order of the legend."
        )
        paths += own.write(figure, "reliability", text, one.notice())
    return paths


def subgroups(options: Options) -> list[Path]:
    """Sp, Se and Score by device, site, sex, age and whether the BMI is known."""
    paths = []
    for one, own in _each_run(options, "--subgroups"):
        table = pd.DataFrame(one.report["subgroups"])
        table[["sp", "se", "score"]] = table[["sp", "se", "score"]].astype(float)
        overall = one.report["metrics"]["chosen"]["score"]["value"]
        text = (
            f"Subgroups (cycles / patients), {one.part} part; dotted: Score of all cycles. A rate "
            "over fewer than ten cycles is left out."
        )
        paths += own.write(drawn.subgroup_figure(table, overall), "subgroups", text, one.notice())
    return paths


def learning_curves(options: Options) -> list[Path]:
    """Loss, Score and learning rate against the epoch."""
    from utils.figures.training import learning_figure, measured_part, read_metrics

    paths = []
    for one, own in _each_run(options, "--learning-curves"):
        table = read_metrics(one.folder)
        figure = learning_figure(table, measured_part(table), one.run.get("epoch"))
        text = f"Learning curves of {one.run.get('title', one.folder.name)}."
        notice = replace(one.notice(), source=one.folder.name)
        paths += own.write(figure, "learning_curves", text, notice)
    return paths


#: What is drawn of every evaluation.
EVALUATION_FIGURES = (confusion, operating_curve, reliability, subgroups)


def evaluation_figures(one: Evaluation, output_dir: str | Path) -> list[Path]:
    """The figures of one evaluation, as PNG in `output_dir`."""
    options = Options(output_dir=Path(output_dir), formats=("png",), evaluation=one)
    return _drawn([partial(draw, options) for draw in EVALUATION_FIGURES])


def run_figures(one: Evaluation, test_cycles: pd.DataFrame | None = None) -> list[Path]:
    """The figures of one training run, as PNG in its `figures` folder.

    Args:
        one: the test part; its folder is the run's, with metrics.csv and checkpoints/best.pt.
        test_cycles: rows of the cycle table for the masks' effects; None: no mask figure.
    """
    options = Options(output_dir=one.folder / "figures", formats=("png",), evaluation=one)
    draw = [partial(draw, options) for draw in (*EVALUATION_FIGURES, learning_curves)]
    best = one.folder / "checkpoints" / "best.pt"
    if test_cycles is not None and one.run.get("variant") == "ast_softfilm" and best.is_file():
        draw.append(partial(_masks, options, best, test_cycles))
    return _drawn(draw)


def _masks(options: Options, checkpoint: Path, cycles: pd.DataFrame) -> list[Path]:
    trained = sources.open_trained(checkpoint, "", "ast_softfilm")
    return write_masks(options, trained, cycles)


def _drawn(figures: Iterable[Callable[[], list[Path]]]) -> list[Path]:
    """Draw one after the other; a picture must not cost a run its report."""
    paths = []
    for draw in figures:
        try:
            paths += draw()
        except Exception as error:
            logger.warning("a figure is missing: %s", error)
    return paths


def write_masks(options: Options, trained: Trained, cycles: pd.DataFrame) -> list[Path]:
    """The mask figure of a trained SoftFiLM model; effects are averaged over `cycles`."""
    from utils.figures.masks import analyse_masks, mask_caption, mask_figure
    from utils.training.optim import lr_factor

    checkpoint, training = trained.checkpoint, trained.config.training
    conditioner = checkpoint.build_model().conditioner
    assert isinstance(conditioner, SoftFiLM)
    per_epoch = -(-checkpoint.counts["train"]["cycles"] // trained.config.dataset.batch_size)
    warmup, total = round(training.warmup_epochs * per_epoch), training.epochs * per_epoch
    analysis = analyse_masks(
        conditioner,
        checkpoint.metadata_statistics().transform(cycles),
        lr=training.lr * conditioner.mask_lr_multiplier,
        steps=(checkpoint.epoch + 1) * per_epoch,
        steps_per_epoch=per_epoch,
        schedule=partial(lr_factor, warmup_steps=warmup, total_steps=total),
    )
    return options.write(
        mask_figure(analysis), "mask_analysis", mask_caption(analysis), trained.notice()
    )
