"""The one table that every corpus gives: one row per breathing cycle, in the columns below."""

from __future__ import annotations

import pandas as pd

#: Columns of `icbhi_metadata.csv`, in order. Times and Duration in s, Age in years, BMI and
#: BMIDerived in kg/m2, CW (child weight) in kg, CH (child height) in cm; empty = missing.
COLUMNS: tuple[str, ...] = (
    *("PID", "Filename", "CycleIndex", "CycleStart", "CycleEnd", "Crackles", "Wheezes"),
    *("Split", "Device", "Fold", "Age", "Sex", "BMI", "CW", "CH", "Disease", "AuscLoc"),
    *("Duration", "BMIDerived"),
)
#: Column of the cycle table behind each of `data.batch.SCALARS`.
SCALAR_COLUMNS: tuple[str, ...] = ("Age", "BMIDerived", "Duration")


def derive_bmi(table: pd.DataFrame) -> pd.Series:
    """BMI [N], kg/m2: the adult value, else weight / (height / 100)^2 within 10..60, else NaN."""
    derived = table["CW"] / (table["CH"] / 100.0) ** 2
    return table["BMI"].fillna(derived.where(derived.between(10.0, 60.0)).round(6))
