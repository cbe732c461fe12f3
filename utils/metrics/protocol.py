"""What every table, figure and report says about how its numbers came about."""

from __future__ import annotations

from enum import Enum

from data.config import LEAKY
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
        "Epoch and thresholds (unless training.thresholds is default) were chosen on held-out "
        "validation patients; the test part was opened once, at the end.",
    )
    FIXED = (
        "fixed",
        "nothing selected",
        "All training patients, last epoch, thresholds at 0.5: nothing was chosen.",
    )
    TEST = (
        "test",
        "SELECTED ON TEST",
        "SELECTED ON TEST: epoch and thresholds (unless training.thresholds is default) were "
        "chosen on the test part itself, so these metrics are optimistic.",
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
LEAKY_MARK = "LEAKY SPLIT"
SYNTHETIC_NOTE = f"{SYNTHETIC_MARK}: these metrics say nothing about patients."
LEAKY_NOTE = (
    f"{LEAKY_MARK}: patients of the test part were heard in training; not a result on new patients."
)


def is_leaky(split_strategy: str) -> bool:
    """Whether a split tests patients of the training part by design (`data.config.LEAKY`)."""
    return split_strategy in LEAKY


def caption(
    text: str, selection: str, partial: bool, synthetic: bool = False, leaky: bool = False
) -> str:
    """`text` with the marks that every figure and table carries."""
    marks = [Selection(selection).label] + [PARTIAL_MARK] * bool(partial)
    marks += [SYNTHETIC_MARK] * synthetic + [LEAKY_MARK] * leaky
    return f"{text} ({'; '.join(marks)})"


def warnings(partial_message: str, synthetic: bool, leaky: bool) -> list[str]:
    """What forbids reading metrics as results on the whole database and new patients."""
    whole = [SYNTHETIC_NOTE] * synthetic + [LEAKY_NOTE] * leaky
    return whole + [partial_message] * bool(partial_message)


def metric_group(name: str, selection: str, leaky: bool = False) -> str:
    """Prefix of a test part's metrics in a tracker, whose columns hold all runs: metrics that were
    chosen on that part, or are those of a leaky split, get columns of their own."""
    name += "_leaky_split" * leaky
    return name if Selection(selection).honest else f"{name}_selected_on_test"
