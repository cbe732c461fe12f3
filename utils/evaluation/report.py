"""What is reported about a model: the report of one part, and that of a finished run.

`evaluate_predictions` makes a `Report` from a predictions table alone. `to_dict` of a report is
its JSON on the disk, `from_dict` reads it back; `utils.evaluation.render` writes it as Markdown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data.task import Task
from utils.common.files import plain
from utils.common.readers import AGAIN, read_results, understood
from utils.metrics import predictions as table
from utils.metrics.bootstrap import (
    Difference,
    Interval,
    auroc_bootstrap,
    average_precision_bootstrap,
    macro_auroc_bootstrap,
    macro_auroc_difference,
    paired_bootstrap,
    patient_bootstrap,
    patient_tables,
)
from utils.metrics.calibration import calibration_report
from utils.metrics.protocol import Selection, is_leaky
from utils.metrics.score import confusion, event_targets, operating_curve, ranked_targets
from utils.metrics.subgroups import subgroup_table

#: Points of the operating curve that a report keeps.
CURVE_POINTS = 200
#: Rule of decision ("chosen", "default") -> metric -> value with its interval.
Metrics = dict[str, dict[str, Interval]]


@dataclass
class Baseline:
    """Metrics of a metadata-only baseline, under the names that `Report` has for a model's."""

    metrics: Metrics
    thresholds: dict[str, Sequence[float] | None] | None = None
    counts: dict[str, int] | None = None
    patients: list | None = None
    patient_tables: Any = None


@dataclass
class Origin:
    """Which model a report is about, and what it was evaluated on and with."""

    run: str
    variant: str
    title: str
    n_cls: int
    split_strategy: str
    selection: str
    seed: int
    epoch: int  # from 0
    revision: str
    part: str = "test"
    data_folder: str | None = None
    evaluated_with: dict[str, str] | None = None


@dataclass
class Report:
    """The report of one part (test, val, ...).

    Attributes:
        task: n_cls, exclusive, outputs, classes.
        protocol: selection, statement, bootstrap, bootstrap_seed, unit.
        partial_message: what is missing from the database; empty when nothing is.
        counts: cycles, recordings, patients and cycles of each class.
        thresholds: rule of decision -> thresholds; None: each fold has its own.
        metrics: Sp, Se and Score in percent, the others in 0..1; NaN where undefined.
        confusion: classes, and for each rule the cycles [C, C].
        operating_curve: se, sp, threshold, at most `CURVE_POINTS` points.
        calibration: as `calibration_report`; subgroups: rows of `subgroup_table`.
        patients, patient_tables: [P] and their confusion matrices [P, C * C] at the chosen
            thresholds, so that several runs can be resampled together.
        baselines: metadata-only baseline -> its metrics; `floors` in the file.
        metadata_test: rows of `utils.evaluation.metadata_test`.
        metadata_carry: as `utils.evaluation.carry.carried`.
        notes: what must be said before the metrics are read; controls: of the conditioner.
        origin: the model; None for a bare table of predictions.
    """

    task: dict[str, Any]
    protocol: dict[str, Any]
    partial: bool
    partial_message: str
    synthetic: bool
    counts: dict[str, int]
    thresholds: dict[str, Sequence[float] | None]
    metrics: Metrics
    confusion: dict[str, Any]
    operating_curve: dict[str, list]
    calibration: dict[str, dict]
    subgroups: list[dict[str, Any]]
    patients: Any
    patient_tables: Any
    baselines: dict[str, Baseline] | None = None
    metadata_test: list[dict[str, Any]] | None = None
    metadata_carry: dict[str, Any] | None = None
    notes: list[str] | None = None
    controls: dict[str, float] | None = None
    origin: Origin | None = None

    @property
    def leaky(self) -> bool:
        """Whether patients of the part were in training by design of the split."""
        return self.origin is not None and is_leaky(self.origin.split_strategy)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without what is None."""
        out = _given(asdict(self))
        if "baselines" in out:
            out["floors"] = {name: _given(one) for name, one in out.pop("baselines").items()}
        return plain(_given(out.pop("origin", {})) | out)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Report:
        """The report that `to_dict` gave; KeyError or TypeError where it is not one."""
        known = _known(cls, content)
        known["metrics"] = _metrics(content["metrics"])
        if "floors" in content:
            known["baselines"] = {
                name: Baseline(**floor | {"metrics": _metrics(floor["metrics"])})
                for name, floor in content["floors"].items()
            }
        if "metadata_test" in content:
            known["metadata_test"] = [
                row | {"difference": Difference(**row["difference"])}
                for row in content["metadata_test"]
            ]
        if "run" in content:
            known["origin"] = Origin(**_known(Origin, content))
        return cls(**known)


@dataclass
class RunReport:
    """report.json of a finished run: what was trained, and the reports of its parts.

    Attributes:
        counts: part -> cycles, recordings, patients and classes; `data`: of all data.
        epoch: from 0; -1 for pooled folds.
        controls: `Conditioner.controls`.
        test, val: None where the run has no such part.
    """

    variant: str
    title: str
    n_cls: int
    selection: str
    seed: int
    epoch: int = -1
    split_strategy: str = "official"
    thresholds: Sequence[float] = ()
    partial: bool = False
    partial_message: str = ""
    synthetic: bool = False
    counts: dict[str, Any] = field(default_factory=dict)
    revision: str = ""
    controls: dict[str, float] = field(default_factory=dict)
    test: Report | None = None
    val: Report | None = None

    @property
    def leaky(self) -> bool:
        """As `Report.leaky`."""
        return is_leaky(self.split_strategy)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        parts = {part: own.pop(part) for part in ("val", "test")}
        return plain(own | {part: r.to_dict() for part, r in parts.items() if r is not None})

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> RunReport:
        """The report that `to_dict` gave; KeyError or TypeError where it is not one."""
        known = _known(cls, content)
        parts = {part: Report.from_dict(known[part]) for part in ("test", "val") if part in known}
        return cls(**known | parts)

    def origin(self, run: str) -> Origin:
        """For the report of its test part; run: name of the folder."""
        return Origin(**_known(Origin, vars(self) | {"run": run}))


def read_report(path: str | Path, kind: type = RunReport) -> Any:
    """Read report.json: a `RunReport`, or the `Report` that evaluate.py wrote.

    Raises:
        UserError: it is missing, not readable or not such a report.
    """
    with understood(path, AGAIN):
        return kind.from_dict(read_results(path))


_KINDS = {"dict": dict, "list": list, "str": str, "bool": bool, "int": int}


def _known(kind: type, content: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a dataclass's fields; KeyError or TypeError where one is missing or wrong."""
    known = {}
    for one in fields(kind):
        if one.name not in content:
            if one.default is MISSING and one.default_factory is MISSING:
                raise KeyError(one.name)
            continue
        value = known[one.name] = content[one.name]
        expected = _KINDS.get(re.match(r"\w+", one.type)[0], object)
        if not isinstance(value, expected) and not (value is None and "None" in one.type):
            raise TypeError(f"{one.name} is a {type(value).__name__}")
    return known


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _metrics(content: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> Metrics:
    def interval(figure):
        return Interval(**{k: math.nan if v is None else v for k, v in figure.items()})

    return {
        rule: {name: interval(figure) for name, figure in values.items()}
        for rule, values in content.items()
    }


def evaluate_predictions(
    predictions: pd.DataFrame,
    task: Task,
    thresholds: tuple[float, ...] | None,
    *,
    selection: str,
    val_predictions: pd.DataFrame | None = None,
    pos_weight: Sequence[float] | None = None,
    partial_message: str = "",
    synthetic: bool = False,
    bootstrap: int = 2000,
    seed: int = 0,
) -> Report:
    """Report of one part.

    Args:
        predictions: predictions table of the part.
        thresholds: the chosen ones; metrics at the default of 0.5 are reported as well. None: the
            table's `pred_class` is the decision (pooled folds, each with its own thresholds).
        selection: training.selection of the run.
        val_predictions: where calibration may be fitted; None or empty where there is none.
        pos_weight: [K] of the training loss, None where it had none.
        partial_message: what is missing from the database; empty when nothing is.
        synthetic: the recordings were generated.
        bootstrap: resamples of the patients; seed: of their choice.
    """
    probability, label = table.probabilities(predictions, task), table.labels(predictions, task)
    true = task.true_classes(label)
    decisions = {
        "chosen": table.class_numbers(predictions, task, "pred_class")
        if thresholds is None
        else task.predicted_classes(probability, thresholds),
        "default": task.predicted_classes(probability, task.default_thresholds),
    }
    ranking = _ranking_intervals(task, predictions, probability, label, bootstrap, seed)
    metrics, confusions, tables = {}, {}, {}
    for name, pred in decisions.items():
        patients, tables[name] = patient_tables(
            true, pred, predictions["patient"], len(task.classes)
        )
        metrics[name] = patient_bootstrap(tables[name], resamples=bootstrap, seed=seed) | ranking
        confusions[name] = confusion(task, true, pred).tolist()
    decided = predictions.assign(pred_class=np.array(task.classes)[decisions["chosen"]])
    fit = {}
    if val_predictions is not None and len(val_predictions):
        fit["val_probability"] = table.probabilities(val_predictions, task)
        fit["val_label"] = table.labels(val_predictions, task)
    rule = Selection(selection)
    return Report(
        task={"n_cls": task.n_cls, "exclusive": task.exclusive}
        | {"outputs": list(task.outputs), "classes": list(task.classes)},
        protocol={"selection": rule.value, "statement": rule.statement}
        | {"bootstrap": bootstrap, "bootstrap_seed": seed, "unit": "patient"},
        partial=bool(partial_message),
        partial_message=partial_message,
        synthetic=synthetic,
        counts=count(predictions, task),
        thresholds={"chosen": thresholds, "default": task.default_thresholds},
        metrics=metrics,
        confusion={"classes": list(task.classes), **confusions},
        operating_curve=_thinned(operating_curve(task, probability, label)),
        calibration=calibration_report(task, probability, label, pos_weight=pos_weight, **fit),
        subgroups=subgroup_table(decided, task).to_dict("records"),
        patients=patients,
        patient_tables=tables["chosen"].reshape(len(patients), -1),
    )


@dataclass(frozen=True)
class Comparison(Difference):
    """Difference of one metric, second model minus first, in points (AUROC: in 0..1)."""

    first: str
    second: str
    figure: str


def compare_predictions(
    named: Mapping[str, pd.DataFrame], task: Task, *, bootstrap: int = 10_000, seed: int = 0
) -> list[Comparison]:
    """Paired patient bootstrap of every pair of models and every metric.

    Args:
        named: name -> predictions table, all over the same cycles, decided by `pred_class`.

    Raises:
        ValueError: the tables do not hold the same cycles.
    """
    tables, rankings, options = {}, {}, {"resamples": bootstrap, "seed": seed}
    for name, frame in named.items():
        true, pred = (table.class_numbers(frame, task, c) for c in ("true_class", "pred_class"))
        _, tables[name] = patient_tables(true, pred, frame["patient"], len(task.classes))
        # the rows of one model in the order of another: resamples pair their patients
        ordered = frame.sort_values(["recording", "cycle_index"])
        patient, rankings[name] = ordered["patient"].to_numpy(), [ranking(ordered, task)]
    out = []
    for first, second in combinations(named, 2):
        found = paired_bootstrap(tables[first], tables[second], **options)
        found["auroc_macro"] = macro_auroc_difference(
            rankings[first], rankings[second], patient, **options
        )
        pair = {"first": first, "second": second}
        out += [Comparison(**vars(d), **pair, figure=name) for name, d in found.items()]
    return out


def ranking(predictions: pd.DataFrame, task: Task) -> list[tuple[np.ndarray, np.ndarray]]:
    """`event_targets` of a predictions table."""
    return event_targets(
        task, table.probabilities(predictions, task), table.labels(predictions, task)
    )


def count(predictions: pd.DataFrame, task: Task) -> dict[str, int]:
    """Cycles, recordings, patients and cycles per class."""
    out = {
        "cycles": len(predictions),
        "recordings": int(predictions["recording"].nunique()),
        "patients": int(predictions["patient"].nunique()),
    }
    return out | {name: int((predictions["true_class"] == name).sum()) for name in task.classes}


def _ranking_intervals(task, predictions, probability, label, resamples, seed):
    """Macro AUROC; AUROC and average precision of every output (and of any abnormality)."""
    patient, options = predictions["patient"], {"resamples": resamples, "seed": seed}
    events = event_targets(task, probability, label)
    out = {"auroc_macro": macro_auroc_bootstrap([events], patient, **options)}
    for name, (target, value) in ranked_targets(task, probability, label).items():
        out[f"auroc_{name}"] = auroc_bootstrap(target, value, patient, **options)
        out[f"ap_{name}"] = average_precision_bootstrap(target, value, patient, **options)
    return out


def _thinned(curve: np.ndarray) -> dict[str, list]:
    """At most `CURVE_POINTS` points of [points, 3], evenly over them, both ends kept."""
    keep = np.unique(np.linspace(0, len(curve) - 1, CURVE_POINTS).round().astype(int))
    curve = curve[keep] if len(curve) else curve
    return {name: curve[:, k].tolist() for k, name in enumerate(("se", "sp", "threshold"))}
