"""Small tables that the evaluation tests share."""

from __future__ import annotations

import numpy as np
import pandas as pd

from data.corpora.icbhi import DEVICES, SITES
from data.splits import Split
from data.task import Task
from utils.config.schema import RunConfig
from utils.evaluation.baselines import baseline_reports
from utils.evaluation.report import evaluate_predictions
from utils.metrics.predictions import make_predictions, write_predictions
from utils.training.runfolder import RunFolder


def cycle_table(patients=12, recordings=3, cycles=4, seed=0) -> pd.DataFrame:
    """Small cycle table; every patient has an age, BMI and device of its own."""
    rng = np.random.default_rng(seed)
    rows = []
    for p in range(patients):
        for r in range(recordings):
            for c in range(cycles):
                rows.append(
                    {
                        "PID": 101 + p,
                        "Filename": f"{101 + p}_{r}b1_{SITES[(p + r) % 7]}_sc_{DEVICES[p % 4]}",
                        "CycleIndex": c,
                        "Crackles": int(p % 2),
                        "Wheezes": int(rng.random() < 0.3),
                        "Split": "test",
                        "Device": DEVICES[p % 4],
                        "Age": 20.0 + p,
                        "Sex": "F",
                        "BMI": np.nan if p == 0 else 18.0 + p,
                        "BMIDerived": np.nan if p == 0 else 18.0 + p,
                        "CW": np.nan,
                        "CH": np.nan,
                        "AuscLoc": SITES[(p + r) % 7],
                        "Duration": rng.uniform(1, 4),
                    }
                )
    return pd.DataFrame(rows)


def predictions(task: Task, table: pd.DataFrame, seed: int = 0, skill: float = 1.0):
    """Predictions table of all cycles from a model that is right more often than not."""
    rng = np.random.default_rng(seed)
    label = task.labels(table["Crackles"].to_numpy(), table["Wheezes"].to_numpy())
    if task.exclusive:
        label = np.eye(4)[task.true_classes(label)]
    logits = rng.normal(size=label.shape) + 2 * skill * (label - 0.5)
    return make_predictions(task, table, np.arange(len(table)), logits, task.default_thresholds)


def finish_run(config: RunConfig, table: pd.DataFrame | None = None, seed: int = 0) -> RunFolder:
    """The folder of a finished run, as training would leave it; table: its test part, with which
    the report has baselines as well."""
    folder, task, given = RunFolder.of(config), config.task, table
    table = cycle_table() if given is None else given
    frame = predictions(task, table, seed=seed)
    frame["cycle"] = table.index
    folder.prepare(config, fresh=False)
    folder.checkpoints.mkdir()
    folder.best.write_bytes(b"weights")
    write_predictions(frame, folder.predictions / "test.csv")
    rule = {"selection": config.training.selection, "bootstrap": 20}
    test = evaluate_predictions(frame, task, task.default_thresholds, **rule)
    if given is not None:
        rows = np.arange(len(table))
        split, rule["selection"] = Split(rows, rows[:0], rows), "fixed"
        test.baselines = baseline_reports(task, table.reset_index(drop=True), split, **rule)
    folder.write_report(
        {
            "variant": config.variant,
            "title": config.title,
            "n_cls": config.dataset.n_cls,
            "split_strategy": config.dataset.split_strategy,
            "selection": config.training.selection,
            "seed": config.training.seed,
            "partial": False,
            "partial_message": "",
            "synthetic": True,
            "counts": {"train": test.counts},
            "test": test.to_dict(),
        }
    )
    return folder
