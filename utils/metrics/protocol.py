"""The words that every table, figure and report carries about how its numbers came about."""

from __future__ import annotations

from utils.common.errors import UserError

#: What each `training.selection` means, in one sentence.
STATEMENTS: dict[str, str] = {
    "validation": "Epoch and thresholds were chosen on held-out validation patients; "
    "the test part was opened once, at the end.",
    "fixed": "All training patients, last epoch, thresholds at .5: nothing was chosen.",
    "test": "SELECTED ON TEST: epoch and thresholds were chosen on the test part itself, "
    "so these figures are optimistic.",
}
#: Short marks for columns, captions and titles.
MARKS: dict[str, str] = {
    "validation": "selected on validation patients",
    "fixed": "nothing selected",
    "test": "SELECTED ON TEST",
}
PARTIAL_MARK = "PARTIAL DATA"
SYNTHETIC_MARK = "SYNTHETIC RECORDINGS"
SYNTHETIC_NOTE = f"{SYNTHETIC_MARK}: these figures say nothing about patients."


def statement(selection: str) -> str:
    """Sentence for reports.

    Raises:
        UserError: an unknown rule.
    """
    if selection not in STATEMENTS:
        raise UserError(
            f"training.selection is '{selection}'; choose one of {', '.join(STATEMENTS)}"
        )
    return STATEMENTS[selection]


def caption(text: str, selection: str, partial: bool, synthetic: bool = False) -> str:
    """`text` with the marks that must stand beside every figure and table."""
    statement(selection)
    marks = [MARKS[selection]] + ([PARTIAL_MARK] if partial else [])
    marks += [SYNTHETIC_MARK] if synthetic else []
    return f"{text} ({'; '.join(marks)})"


def metric_group(name: str, selection: str) -> str:
    """Prefix of a test part's figures in a tracker, whose columns hold all runs: figures that were
    chosen on that part get columns of their own."""
    return f"{name}_selected_on_test" if selection == "test" else name
