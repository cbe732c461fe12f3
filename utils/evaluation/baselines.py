"""Metadata-only baselines: the class prior and two models that see no audio.

All are fitted on the run's training rows and decide by the run's own rule, so they share the split
of the model they are compared with. The metadata-only models see what a conditioner sees (device,
site and the z-scored age, BMI and duration) and weigh positives as the training loss does. There
are two because neither is always the stronger baseline: logistic regression carries over to new
patients better (two classes), boosted trees find informative combinations of device and site (four
classes). Both have scikit-learn's defaults: nothing is tuned, so nothing is selected.

    python -m utils.evaluation.baselines --data-folder DIR [--selection validation]

needs annotations and tables only, no audio.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import ClassifierMixin
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression

from data.config import STRATEGIES
from data.corpora.icbhi import completeness, read_cycles
from data.splits import Split, split_cycles
from data.statistics import MetadataStatistics
from data.synthetic.corpus import is_synthetic
from data.task import Task
from utils.common.cli import command
from utils.evaluation.render import markdown_table, number, with_interval
from utils.evaluation.report import Baseline, evaluate_predictions
from utils.metrics.calibration import log_odds
from utils.metrics.predictions import make_predictions
from utils.metrics.protocol import Selection, caption, is_leaky
from utils.metrics.score import choose_thresholds, output_targets

PRIOR = "class prior"
MODELS: dict[str, Callable[[], ClassifierMixin]] = {
    "metadata only, linear": lambda: LogisticRegression(max_iter=2000),
    "metadata only, trees": lambda: HistGradientBoostingClassifier(random_state=0),
}


def design_matrix(statistics: MetadataStatistics, table: pd.DataFrame) -> np.ndarray:
    """N cycles -> [N, devices + 1 + sites + 1 + 3]: one-hot with unknown last, z-scored scalars."""
    metadata = statistics.transform(table)
    device = np.eye(len(statistics.devices) + 1)[metadata.device.numpy()]
    site = np.eye(len(statistics.sites) + 1)[metadata.site.numpy()]
    return np.concatenate([device, site, metadata.rest.numpy().astype(np.float64)], axis=1)


def prior_logits(task: Task, label: np.ndarray, n: int) -> np.ndarray:
    """[n, K]: every cycle gets the training part's class frequencies.

    A constant prediction scores 50 where it says normal or, with two classes, abnormal; with four
    classes it scores less when it names one abnormal class.

    Args:
        label: [N, C] of the training part.
    """
    share = output_targets(task, label).mean(axis=0)
    logits = np.log(np.clip(share, 1e-12, None)) if task.exclusive else log_odds(share)
    return np.tile(logits, (n, 1))


def metadata_logits(
    task: Task,
    model: Callable[[], ClassifierMixin],
    train: tuple[np.ndarray, np.ndarray],
    features: np.ndarray,
    pos_weight: Sequence[float] | None,
) -> np.ndarray:
    """Fit `model` on the training cycles, one classifier per output (one for all when the classes
    exclude each other), and return logits [M, K].

    Args:
        train: features [N, P] and label [N, C].
        features: [M, P] of the cycles to predict.
        pos_weight: [K] weights of positives, None for none.
    """
    x, label = train
    if task.exclusive:
        fitted = model().fit(x, task.true_classes(label))
        logits = np.full((len(features), len(task.classes)), np.log(1e-12))
        logits[:, fitted.classes_] = np.log(np.clip(fitted.predict_proba(features), 1e-12, None))
        return logits
    columns = []
    for k in range(len(task.outputs)):
        target = label[:, k].astype(int)
        if target.min() == target.max():  # nothing to learn: say so with certainty
            columns.append(np.full(len(features), log_odds(target[0])))
            continue
        weight = np.where(target > 0, 1.0 if pos_weight is None else pos_weight[k], 1.0)
        fitted = model().fit(x, target, sample_weight=weight)
        columns.append(log_odds(fitted.predict_proba(features)[:, 1]))
    return np.stack(columns, axis=1)


def baseline_predictions(
    task: Task,
    table: pd.DataFrame,
    split: Split,
    *,
    selection: str,
    pos_weight: Sequence[float] | None = None,
    thresholds: str = "chosen",
    min_sensitivity: float = 0.0,
) -> dict[str, tuple[pd.DataFrame, tuple[float, ...]]]:
    """Predictions table of the test part and thresholds of each baseline.

    Args:
        table: cycle table; split: its training, validation and test rows.
        selection: `validation`: thresholds from the validation rows; `fixed`: the default;
            `test`: from the test rows, like the model's.
        pos_weight: [K] of the training loss.
        thresholds, min_sensitivity: as in section `training`, like the model's.
    """
    label = task.labels(table["Crackles"].to_numpy(), table["Wheezes"].to_numpy())
    out = {}
    for name, values in baseline_logits(task, table, split, pos_weight).items():
        rule = baseline_rule(task, values, label, split, selection, thresholds, min_sensitivity)
        frame = make_predictions(task, table, split.test, values[split.test], rule)
        out[name] = frame, rule
    return out


def baseline_logits(
    task: Task, table: pd.DataFrame, split: Split, pos_weight: Sequence[float] | None
) -> dict[str, np.ndarray]:
    """Logits [N, K] of every cycle by each baseline, fitted on the training rows."""
    label = task.labels(table["Crackles"].to_numpy(), table["Wheezes"].to_numpy())
    features = design_matrix(MetadataStatistics.fit(table.iloc[split.train]), table)
    train = features[split.train], label[split.train]
    logits = {PRIOR: prior_logits(task, label[split.train], len(table))}
    for name, model in MODELS.items():
        logits[name] = metadata_logits(task, model, train, features, pos_weight)
    return logits


def baseline_rule(
    task: Task,
    logits: np.ndarray,
    label: np.ndarray,
    split: Split,
    selection: str,
    thresholds: str,
    min_sensitivity: float,
) -> tuple[float, ...]:
    """A baseline's thresholds, chosen where the model's are; logits [N, K], label [N, C]."""
    rows = {"validation": split.val, "test": split.test}.get(selection)
    if rows is None or thresholds != "chosen":
        return task.default_thresholds
    return choose_thresholds(task, task.probabilities(logits[rows]), label[rows], min_sensitivity)


def baseline_reports(
    task: Task,
    table: pd.DataFrame,
    split: Split,
    *,
    selection: str,
    bootstrap: int = 2000,
    seed: int = 0,
    **rules: Any,
) -> dict[str, Baseline]:
    """Metrics of each baseline on the test part; arguments as for `baseline_predictions`."""
    made = baseline_predictions(task, table, split, selection=selection, **rules)
    reports = {}
    for name, (frame, rule) in made.items():
        report = evaluate_predictions(
            frame, task, rule, selection=selection, bootstrap=bootstrap, seed=seed
        )
        reports[name] = Baseline(
            metrics=report.metrics,
            thresholds=report.thresholds,
            counts=report.counts,
            patients=report.patients,
            patient_tables=report.patient_tables,
        )
    return reports


def balancing_weight(task: Task, label: np.ndarray, sensitivity_bias: float = 1.5) -> np.ndarray:
    """[K] sensitivity_bias * negatives / positives of the training part, as the loss has it.

    Args:
        label: [N, C] of the training part.
    """
    positive = np.clip(output_targets(task, label).mean(axis=0), 1e-6, None)
    return sensitivity_bias * (1 - positive) / positive


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Print the baselines of both tasks."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.evaluation.baselines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data-folder", metavar="DIR", required=True, help="annotations and tables, no audio"
    )
    parser.add_argument(
        "--split-strategy", choices=STRATEGIES, default="official", help="default: official"
    )
    parser.add_argument(
        "--selection",
        choices=[rule.value for rule in Selection],
        default="validation",
        help="default: validation",
    )
    options = parser.parse_args(arguments)
    table = read_cycles(options.data_folder, require_audio=False)
    split = split_cycles(table, strategy=options.split_strategy, selection=options.selection)
    rows = []
    for task in (Task(4), Task(2)):
        train = table.iloc[split.train]
        label = task.labels(train["Crackles"].to_numpy(), train["Wheezes"].to_numpy())
        weight = balancing_weight(task, label)
        reports = baseline_reports(
            task, table, split, selection=options.selection, pos_weight=weight
        )
        for name, report in reports.items():
            for rule, metrics in report.metrics.items():
                shown = [with_interval(metrics[key], 1) for key in ("sp", "se", "score")]
                collapsed = metrics["collapsed_score"].value if task.n_cls == 4 else None
                cells = [f"{task.n_cls}-class", name, rule, *shown, number(collapsed, 1)]
                rows.append(cells)
    head = ["task", "baseline", "thresholds", "Sp", "Se", "Score", "collapsed Score"]
    partial = completeness(table)
    text = f"Metadata-only baselines, {options.split_strategy} split, 95 % intervals over patients"
    marks = options.selection, partial.partial, is_synthetic(options.data_folder)
    marks += (is_leaky(options.split_strategy),)
    lines = [caption(text, *marks), ""]
    print("\n".join([*lines, *markdown_table(head, rows)]))


if __name__ == "__main__":
    sys.exit(main())
