"""Metadata fields as a few values each, and weights that make labels independent of them.

Device and site are as they are. Numbers fall into bins: age in years below 18, 18-64 and from 65;
body mass index in kg/m2 by the WHO's classes (below 18.5, 25 and 30, and above); duration in s
below 1.5, 2.5 and 3.5, and above. What is missing is a value of its own, `unknown`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from data.cycle_table import SCALAR_COLUMNS
from data.task import SCALARS

UNKNOWN = "unknown"
#: Inner edges of a number's bins, each belonging to the bin above it, and the bins' names.
BINS = {
    "age": ((18, 65), ("< 18", "18-64", ">= 65")),
    "bmi": ((18.5, 25, 30), ("< 18.5", "18.5-25", "25-30", ">= 30")),
    "duration": ((1.5, 2.5, 3.5), ("< 1.5", "1.5-2.5", "2.5-3.5", ">= 3.5")),
}
#: Field -> column of the cycle table.
COLUMNS = {
    **{"device": "Device", "site": "AuscLoc"},
    **dict(zip(SCALARS, SCALAR_COLUMNS, strict=True)),
}


def binned(values: pd.Series, field: str) -> pd.Series:
    """Values of a column -> names of their bins (scalars) or themselves; missing: `unknown`."""
    if field in BINS:
        edges, names = BINS[field]
        numbers = values.astype(float)
        values = pd.cut(numbers, [-np.inf, *edges, np.inf], right=False, labels=names)
    return values.astype(object).where(values.notna(), UNKNOWN)


def field_values(table: pd.DataFrame, fields: Sequence[str]) -> np.ndarray:
    """[N] text: the values of the named fields together, of each row of a cycle table."""
    columns = [binned(table[COLUMNS[field]], field).astype(str) for field in fields]
    return np.array([", ".join(values) for values in zip(*columns, strict=True)], object)


def balancing_weights(
    values: np.ndarray, classes: np.ndarray, bounds: Sequence[float]
) -> np.ndarray:
    """p(y) / p(y | values) of each of N cycles, within bounds and with mean 1.

    Under these weights class and values are independent, and both are as frequent as they were
    (importance weighting; in fairness "reweighing", Kamiran and Calders, Knowl. Inf. Syst. 33
    (2012) 1). What the bounds cut off is made up by one factor c on all weights, so that the mean
    of clip(c w, low, high) is 1.

    Args:
        values: [N] values of the fields; classes: [N] ints.
        bounds: low <= 1 <= high.
    """
    _, cell = np.unique(values.astype(str), return_inverse=True)
    counts = np.zeros((cell.max() + 1, classes.max() + 1))
    np.add.at(counts, (cell, classes), 1)
    expected = counts.sum(axis=1)[cell] * counts.sum(axis=0)[classes] / len(classes)
    weight = expected / counts[cell, classes]
    low, high = 0.0, bounds[1] / weight.min()  # at which every weight is at its upper bound
    for _ in range(100):  # the mean grows with the factor
        middle = (low + high) / 2
        below = np.clip(middle * weight, *bounds).mean() < 1
        low, high = (middle, high) if below else (low, middle)
    return np.clip(high * weight, *bounds)
