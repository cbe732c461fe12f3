"""A table with its caption and notes, as Markdown, LaTeX (booktabs) or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from utils.evaluation.finished_runs import Protocol
from utils.evaluation.render import markdown_table


@dataclass(frozen=True)
class Table:
    """Cells are finished text; the notes belong under every rendering."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str]
    protocol: Protocol


def to_markdown(table: Table) -> str:
    """Heading, table, notes."""
    lines = [f"### {table.title}", "", *markdown_table(table.head, table.rows)]
    return "\n".join([*lines, *(f"> {note}  " for note in table.notes)]) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_", "{": r"\{",
    "}": r"\}", "$": r"\$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
    "–": "--", "·": r"$\cdot$", "≥": r"$\geq$", "`": "",
}  # fmt: skip


def latex_text(text: str) -> str:
    """Escape for LaTeX text mode."""
    return "".join(_LATEX.get(character, character) for character in text)


def to_latex(table: Table) -> str:
    """`table` environment in the style of booktabs; the notes stand in the caption."""

    def row(cells: Sequence[str]) -> str:
        return " & ".join(latex_text(str(cell)) for cell in cells) + r" \\"

    note = latex_text(" ".join(note.rstrip(".") + "." for note in table.notes))
    lines = [
        r"\begin{table}",
        rf"\caption{{{latex_text(table.title)}. {note}}}",
        r"\centering",
        rf"\begin{{tabular}}{{{'l' * len(table.head)}}}",
        r"\toprule",
        row(table.head),
        r"\midrule",
        *map(row, table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def to_csv(table: Table) -> str:
    """The rows, each with the protocol and the data they rest on; notes as `#` lines above."""
    text = io.StringIO()
    for line in (table.title, *table.notes):
        text.write(f"# {line}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*table.head, *Protocol._fields])
    writer.writerows([*row, *table.protocol] for row in table.rows)
    return text.getvalue()


FORMATS: dict[str, Callable[[Table], str]] = {
    "markdown": to_markdown,
    "latex": to_latex,
    "csv": to_csv,
}


def render(tables: Sequence[Table], form: str) -> str:
    """All tables in one of `FORMATS`, an empty line between them."""
    return "\n".join(FORMATS[form](table) for table in tables)
