"""Sp, Se and Score by device, site, sex, age group and whether the BMI is known."""

from __future__ import annotations

import pandas as pd

from data.fields import BINS, binned
from data.task import Task
from utils.metrics.predictions import class_numbers
from utils.metrics.score import rate

#: A rate whose denominator has fewer cycles than this is not shown.
LEAST_CYCLES = 10
AGE_GROUPS = BINS["age"][1]


def age_group(age: pd.Series) -> pd.Series:
    """Age in years -> child (< 18), adult (18-64), older (65 and over), unknown."""
    return binned(age, "age")


def group_columns(frame: pd.DataFrame) -> dict[str, pd.Series]:
    """Predictions table -> group name -> value of each cycle."""

    def named(column):
        return frame[column].astype(object).where(frame[column].notna(), "unknown")

    return {
        "device": named("device"),
        "site": named("site"),
        "sex": named("sex"),
        "age": age_group(frame["age"]),
        "bmi": frame["bmi"].notna().map({True: "known", False: "unknown"}),
    }


def _order(value) -> tuple[int, str]:
    """Age groups by age, everything else by name."""
    return (AGE_GROUPS.index(value) - len(AGE_GROUPS) if value in AGE_GROUPS else 0), str(value)


def _shown(correct: pd.Series) -> float:
    return rate(correct.sum(), len(correct)) if len(correct) >= LEAST_CYCLES else float("nan")


def subgroup_table(frame: pd.DataFrame, task: Task) -> pd.DataFrame:
    """One row per subgroup: group, value, patients, cycles, normal, abnormal, sp, se, score.

    Rates are percentages of the table's `pred_class`; one with a denominator of fewer than
    `LEAST_CYCLES` cycles is NaN, because it would be read as a finding.
    """
    true = pd.Series(class_numbers(frame, task), index=frame.index)
    correct = true == class_numbers(frame, task, "pred_class")
    rows = []
    for group, values in group_columns(frame).items():
        for value in sorted(values.unique(), key=_order):
            inside = values == value
            normal, abnormal = inside & (true == 0), inside & (true > 0)
            sp, se = (_shown(correct[part]) for part in (normal, abnormal))
            rows.append(
                {
                    "group": group,
                    "value": str(value),
                    "patients": int(frame.loc[inside, "patient"].nunique()),
                    "cycles": int(inside.sum()),
                    "normal": int(normal.sum()),
                    "abnormal": int(abnormal.sum()),
                    "sp": sp,
                    "se": se,
                    "score": (sp + se) / 2,
                }
            )
    return pd.DataFrame(rows)
