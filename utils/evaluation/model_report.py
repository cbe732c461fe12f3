"""A trained model and its data -> the report of a part.

On the data it was trained with, the metrics of the test part are those of the run's own report.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch

from utils.evaluation.baselines import baseline_reports
from utils.evaluation.carry import carried
from utils.evaluation.metadata_test import metadata_test, shuffle_metadata
from utils.evaluation.report import Baseline, Report, evaluate_predictions, read_report
from utils.evaluation.trained_model import TrainedModel
from utils.metrics.predictions import read_predictions


def report_on(
    model: TrainedModel, split: str = "test", *, with_metadata_test: bool = True
) -> tuple[Report, pd.DataFrame]:
    """Everything that is reported about a part, and the predictions it rests on.

    The test part has the metadata-only baselines, a model that sees metadata the metadata test.
    """
    frame = model.predictions(split)
    fit = split == "test" and len(model.data.split.val) > 0
    report = evaluate_predictions(
        frame,
        model.task,
        model.thresholds,
        selection=model.selection,
        val_predictions=model.predictions("val") if fit else None,
        pos_weight=model.checkpoint.pos_weight or None,
        partial_message=model.partial_message(),
        synthetic=model.synthetic,
    )
    report.origin, report.notes = model.origin(split), notes(model, split)
    if split == "test" and not model.corpus_file:
        report.baselines = baselines_of(model)
        if with_metadata_test:
            own = model.data.table, model.data.split
            report.metadata_carry = carried(model.task, *own, **_rules(model))
    rows = model.rows(split)
    table = model.data.table.iloc[rows]
    if with_metadata_test and model.is_conditioned and not shuffling_matters(model, table):
        report.notes.append("NO PERMUTATION TEST: another patient's metadata look the same here.")
    elif with_metadata_test and model.is_conditioned:
        report.metadata_test = metadata_test(
            lambda metadata: map(model.task.probabilities, model.predictor.under(rows, metadata)),
            table,
            model.statistics.transform,
            model.task,
            model.thresholds,
        )
    return report, frame


def shuffling_matters(model: TrainedModel, table: pd.DataFrame) -> bool:
    """Whether metadata of another patient differ for the model in any of these cycles."""
    real, other = map(model.statistics.transform, (table, shuffle_metadata(table, 0)))
    return any(not torch.equal(getattr(real, name), getattr(other, name)) for name in vars(real))


def notes(model: TrainedModel, split: str) -> list[str]:
    """What must be said before metrics of this part are read."""
    out = []
    if model.corpus_file:
        unknown = model.unknown_metadata(model.rows(split)) if model.is_conditioned else ""
        return [unknown] if unknown else []
    if split in ("train", "all"):
        seen = len(model.data.split.train)
        out.append(
            f"SEEN IN TRAINING: the model was fitted on {seen:,} of these "
            f"{len(model.rows(split)):,} cycles; the metrics say nothing about new patients."
        )
    if split in ("val", "all") and len(model.data.split.val):
        out.append("SELECTED HERE: the run made its choices on the validation part.")
    return out


def baselines_of(model: TrainedModel) -> dict[str, Baseline]:
    """The baselines on the test part, from the model's own training rows and by its own rule."""
    return baseline_reports(model.task, model.data.table, model.data.split, **_rules(model))


def _rules(model: TrainedModel) -> dict[str, Any]:
    """How the model's thresholds were chosen and its loss weighed positives."""
    return {
        "selection": model.selection,
        "pos_weight": model.checkpoint.pos_weight or None,
        "thresholds": model.config.training.thresholds,
        "min_sensitivity": model.config.training.min_sensitivity,
    }


def stored(model: TrainedModel) -> tuple[pd.DataFrame, dict[str, Baseline]] | None:
    """The run's own predictions of the test part and its baselines, if they belong to this
    checkpoint for sure."""
    folder = model.run_folder
    if model.other_folder or folder is None or not folder.finished:
        return None
    report, checkpoint = read_report(folder.report), model.checkpoint
    same = (
        report.epoch == checkpoint.epoch
        and tuple(report.thresholds) == tuple(checkpoint.thresholds)
        and report.revision == checkpoint.revision
        and report.counts == checkpoint.counts
    )
    path = folder.predictions / "test.csv"
    if not same or not path.is_file():
        return None
    return read_predictions(path, model.task), report.test.baselines or {}
