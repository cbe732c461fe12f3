"""Small tables that the evaluation tests share."""

from __future__ import annotations

import numpy as np
import pandas as pd

from data.batch import DEVICES, SITES
from data.task import Task
from utils.metrics.predictions import make_predictions


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
