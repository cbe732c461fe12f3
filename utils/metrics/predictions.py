"""The predictions table: one row per evaluated cycle, written by every run and evaluation.

Columns: `cycle` (row number in the run's cycle table), `recording`, `cycle_index`, `patient`,
`device`, `site`, `age` (years), `sex`, `bmi` (kg/m2, derived), `split`, then `p_<output>` and
`logit_<output>` for each of `Task.outputs`, `true_class`, `pred_class` (names of `Task.classes`).
All metrics can be computed again from this file alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from data.task import Task
from utils.common.errors import UserError
from utils.common.files import check_sum, write_text
from utils.common.readers import read_csv

#: Column of the predictions table -> column of the cycle table.
SOURCE = {
    "recording": "Filename",
    "cycle_index": "CycleIndex",
    "patient": "PID",
    "device": "Device",
    "site": "AuscLoc",
    "age": "Age",
    "sex": "Sex",
    "bmi": "BMIDerived",
    "split": "Split",
}


def make_predictions(
    task: Task, table: pd.DataFrame, rows, logits: np.ndarray, thresholds: tuple[float, ...]
) -> pd.DataFrame:
    """Predictions table of some cycles.

    Args:
        table: cycle table; rows: [N] row numbers; logits: [N, K] in the same order.
        thresholds: decision rule of `pred_class`.

    Raises:
        UserError: a logit is not finite.
    """
    rows, logits = np.asarray(rows, np.int64), np.asarray(logits, np.float64)
    diverged = int((~np.isfinite(logits)).any(axis=1).sum())
    if diverged:
        raise UserError(
            f"the model's logits are not finite for {diverged} of {len(rows)} cycles: its training "
            "diverged or its weights are damaged; use another checkpoint"
        )
    part = table.iloc[rows]
    columns = {"cycle": rows} | {name: part[c].to_numpy() for name, c in SOURCE.items()}
    probability = task.probabilities(logits)
    for k, output in enumerate(task.outputs):
        columns[f"p_{output}"] = probability[:, k]
        columns[f"logit_{output}"] = logits[:, k]
    label = task.labels(part["Crackles"].to_numpy(), part["Wheezes"].to_numpy())
    names = np.array(task.classes)
    columns["true_class"] = names[task.true_classes(label)]
    columns["pred_class"] = names[task.predicted_classes(probability, thresholds)]
    return pd.DataFrame(columns)


def write_predictions(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write the CSV atomically: a killed run leaves the old file or the new one."""
    write_text(path, frame.to_csv(index=False))
    return Path(path)


def read_predictions(path: str | Path, task: Task) -> pd.DataFrame:
    """Read a predictions CSV and check that it belongs to the task.

    Raises:
        UserError: the file is missing, lacks a column or has a class the task does not know.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no predictions at {path}; evaluate the run first")
    check_sum(path)
    # "both", "NA" and the like are values here; only empty cells are missing
    frame = read_csv(path, "evaluate the run again", keep_default_na=False, na_values=[""])
    needed = ["cycle", *SOURCE, *(f"{kind}_{o}" for o in task.outputs for kind in ("p", "logit"))]
    absent = [c for c in (*needed, "true_class", "pred_class") if c not in frame.columns]
    if absent:
        raise UserError(
            f"{path} lacks the column(s) {', '.join(absent)} of a {task.n_cls}-class task; "
            "evaluate the run again"
        )
    strange = set(frame["true_class"]) | set(frame["pred_class"])
    if strange := strange - set(task.classes):
        raise UserError(f"{path} has unknown class(es) {sorted(map(str, strange))}")
    return frame


def probabilities(frame: pd.DataFrame, task: Task) -> np.ndarray:
    """[N, K] probabilities of the outputs."""
    return frame[[f"p_{output}" for output in task.outputs]].to_numpy(np.float64)


def logits(frame: pd.DataFrame, task: Task) -> np.ndarray:
    """[N, K] logits of the outputs."""
    return frame[[f"logit_{output}" for output in task.outputs]].to_numpy(np.float64)


def class_numbers(frame: pd.DataFrame, task: Task, column: str = "true_class") -> np.ndarray:
    """[N] class numbers of `true_class` or `pred_class`."""
    order = {name: index for index, name in enumerate(task.classes)}
    return frame[column].map(order).to_numpy(np.int64)


def labels(frame: pd.DataFrame, task: Task) -> np.ndarray:
    """[N, C] label as in `Batch.label`."""
    number = class_numbers(frame, task)
    if task.n_cls == 4:
        return task.labels(number & 1, number >> 1)
    return number[:, None].astype(np.float32)
