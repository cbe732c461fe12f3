"""What every table, figure and report says about how its numbers came about."""

from __future__ import annotations

from enum import Enum

from utils.common.errors import UserError


class Selection(str, Enum):
    """training.selection: on what the epoch and the thresholds were chosen; honest rules first.

    Attributes:
        label: short mark for columns, captions and titles.
        statement: one sentence for reports.
    """

    label: str
    statement: str

    VALIDATION = (
        "validation",
        "selected on validation patients",
        "Epoch and thresholds were chosen on held-out validation patients; the test part was "
        "opened once, at the end.",
    )
    FIXED = (
        "fixed",
        "nothing selected",
        "All training patients, last epoch, thresholds at 0.5: nothing was chosen.",
    )
    TEST = (
        "test",
        "SELECTED ON TEST",
        "SELECTED ON TEST: epoch and thresholds were chosen on the test part itself, so these "
        "metrics are optimistic.",
    )

    def __new__(cls, value: str, label: str, statement: str):
        member = str.__new__(cls, value)
        member._value_, member.label, member.statement = value, label, statement
        return member

    @classmethod
    def _missing_(cls, value):
        names = ", ".join(rule.value for rule in cls)
        raise UserError(f"training.selection is {value!r}; choose one of {names}")

    @property
    def rank(self) -> int:
        """Place in tables."""
        return list(Selection).index(self)

    @property
    def honest(self) -> bool:
        """Whether the test part had no say in the choice."""
        return self is not Selection.TEST


PARTIAL_MARK = "PARTIAL DATA"
SYNTHETIC_MARK = "SYNTHETIC RECORDINGS"
SYNTHETIC_NOTE = f"{SYNTHETIC_MARK}: these metrics say nothing about patients."


def caption(text: str, selection: str, partial: bool, synthetic: bool = False) -> str:
    """`text` with the marks that every figure and table carries."""
    marks = [Selection(selection).label] + ([PARTIAL_MARK] if partial else [])
    marks += [SYNTHETIC_MARK] if synthetic else []
    return f"{text} ({'; '.join(marks)})"


def metric_group(name: str, selection: str) -> str:
    """Prefix of a test part's metrics in a tracker, whose columns hold all runs: metrics that were
    chosen on that part get columns of their own."""
    return name if Selection(selection).honest else f"{name}_selected_on_test"
