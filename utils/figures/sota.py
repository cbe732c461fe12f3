"""Published systems on ICBHI 2017, and results of this repository on the official split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.evaluation.published import (
    ENSEMBLE,
    LABEL_SEEN,
    NOT_STATED,
    OFFICIAL,
    OTHER_SE,
    PEOPLE,
    SHUFFLED,
    TASKS,
    UNCLEAR,
    of_four_classes,
    systems,
)
from utils.figures import style
from utils.metrics.protocol import Selection

HONEST, ON_TEST = "honest", "test"
_BLOCKS = {  # in the order they are drawn: heading, colour, marker, filled
    HONEST: ("Honest: test half opened once", style.BLUE, "o", True),
    NOT_STATED: ("Selection not stated", style.GREY, "D", False),
    ON_TEST: ("Selected on the test half", style.VERMILLION, "s", False),
}
#: Split or caveat -> mark at a system's name, and what the mark means.
_MARKS = {
    SHUFFLED: ("†", "public code shuffles the recordings:\n76 patients in both parts"),
    UNCLEAR: ("‡", "split unclear"),
    OTHER_SE: ("§", "Se counts any abnormal class as right"),
    LABEL_SEEN: ("¶", "text input whose public form holds the label"),
    ENSEMBLE: ("°", "ensemble of several models"),
}
_METADATA = {"yes": "+", "training only": "(+)"}
_KEY = {"+": "metadata is an input", "(+)": "metadata steers the training loss only",
        "*": "collapsed from a 4-class model"}  # fmt: skip
_KEY |= dict(_MARKS.values())


@dataclass(frozen=True)
class OwnResult:
    """A result of this repository on the complete official test half.

    Attributes:
        task: one of `TASKS`.
        name: variant and seeds.
        sp, se, score: percent.
        score_sd: percent, over seeds; None for one run.
        protocol: training.selection.
    """

    task: str
    name: str
    sp: float
    se: float
    score: float
    score_sd: float | None
    protocol: str


def sota_figure(own: Sequence[OwnResult] = ()) -> Figure:
    """Two panels (4-class, 2-class): Score of every system, in blocks by how it was selected.

    In each block the best comes first; pale and last are those whose split, Se or input is another.
    """
    table = systems()
    people, table = table[table.backbone == PEOPLE], table[table.backbone != PEOPLE]
    rows = pd.concat([_published_rows(table), _own_rows(own)], ignore_index=True)
    panels = [_lines(rows[rows.task == task]) for task in TASKS]
    heights = [len(lines) for lines in panels]
    figure = style.new_figure(style.PAGE, 0.155 * max(heights) + 0.75)
    axes = figure.subplots(1, 2)
    for axis, task, lines in zip(axes, TASKS, panels, strict=True):
        _panel(axis, lines, max(heights), people[people.task == task])
        axis.set_title(f"{task} task")
    key = [f"{mark}  {text}".replace("\n", "\n      ") for mark, text in _KEY.items()]
    axes[1].text(
        0, 0.52, "\n".join(["Marks", *key, "pale: not comparable with its block"]),
        transform=axes[1].transAxes, fontsize=6.5, va="top", linespacing=1.4,
    )  # fmt: skip
    figure.get_layout_engine().set(wspace=0.04)
    return figure


def sota_caption(own: Sequence[OwnResult] = ()) -> str:
    """What the reader must know to read the figure, from the table itself."""
    table = systems()
    text = (
        "Values are the papers' but for “(ours)”. Published systems that state the official 60/40 "
        "split of ICBHI 2017, by how epoch and thresholds were chosen; compare within a block "
        "only. ICBHI "
        "Score = (Sp + Se)/2, percent, with Sp and Se where the source gives them; bars: sd over "
        "seeds. Sources, evidence and notes: utils/figures/published.csv."
    )
    odd = table[table.note.fillna("").str.contains("does not add up")]
    if len(odd):
        rows = [f"{r.method} {r.task} ({r.score:.2f}, not {(r.sp + r.se) / 2:.2f})"
                for r in odd.itertuples()]  # fmt: skip
        text += f" Drawn as printed, though Sp and Se give another Score: {', '.join(rows)}."
    if not own:
        text += " Results of this repository are added with --run DIR."
    return text


def _published_rows(table: pd.DataFrame) -> pd.DataFrame:
    rows = table[["task", "method", "sp", "se", "score", "score_sd"]].copy()
    rows["block"] = table.selection.replace({"validation": HONEST, "fixed": HONEST})
    rows["other"] = (table.split != OFFICIAL) | table.caveat.isin([OTHER_SE, LABEL_SEEN])
    rows["label"] = table.method + table.year.map(
        lambda year: "" if pd.isna(year) else f" ’{int(year) % 100:02d}"
    )
    collapsed = of_four_classes(table).map({True: "*", False: ""})
    marks = {name: mark for name, (mark, _) in _MARKS.items()}
    for found in (table.metadata.map(_METADATA), collapsed, table.split.map(marks),
                  table.caveat.map(marks)):  # fmt: skip
        rows["label"] += found.fillna("").map(lambda mark: f" {mark}".rstrip())
    rows["own"] = False
    return rows


def _own_rows(own: Sequence[OwnResult]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "task": r.task, "method": r.name, "sp": r.sp, "se": r.se, "score": r.score,
            "score_sd": r.score_sd, "block": HONEST if Selection(r.protocol).honest else ON_TEST,
            "label": f"{r.name} (ours)", "own": True, "other": False,
        }
        for r in own
    )  # fmt: skip


def _lines(rows: pd.DataFrame) -> list:
    """Headings (str) and rows (Series) from top to bottom; best Score first in each block."""
    lines: list = []
    for block in _BLOCKS:
        inside = rows[rows.block == block].sort_values(["other", "score"], ascending=[True, False])
        if len(inside):
            lines += [_BLOCKS[block][0], *(row for _, row in inside.iterrows())]
    return lines


def _panel(axis: Axes, lines: list, height: int, people: pd.DataFrame) -> None:
    ticks, labels = [], []
    scores = [row.score for row in lines if not isinstance(row, str)]
    low, high = min([*scores, *people.score]) - 2.5, max(scores) + 2
    for one in people.itertuples():
        axis.axvline(one.score, color=style.BLACK, linestyle=(0, (4, 2)), linewidth=0.8, zorder=1)
        axis.annotate(
            f"{one.method.lower()} ({one.split}): {one.score:.2f}", (one.score, len(lines) * 0.75),
            xytext=(3, 0), textcoords="offset points", fontsize=6, va="center", rotation=90,
        )  # fmt: skip
    for y, row in enumerate(lines):
        if isinstance(row, str):
            axis.text(
                low, y, row, fontsize=6.8, fontweight="bold", va="center", color="#303030",
                bbox={"color": "white", "pad": 1},
            )  # fmt: skip
            continue
        _, colour, marker, filled = _BLOCKS[row.block]
        ink = style.GREY if row.other else style.BLACK
        sd = None if pd.isna(row.score_sd) else row.score_sd
        axis.plot([low, high], [y, y], color=style.PALE, linewidth=0.5, zorder=0)
        axis.errorbar(
            row.score, y, xerr=sd, fmt=marker, color=colour, capsize=1.5, elinewidth=0.8,
            markerfacecolor=colour if filled or row.own else "white", markersize=4,
            alpha=0.4 if row.other else 1,
        )  # fmt: skip
        detail = "" if pd.isna(row.sp) or pd.isna(row.se) else f"  {row.sp:.2f} / {row.se:.2f}"
        axis.annotate(
            f"{row.score:.2f}{detail}", (high, y), xytext=(2, 0), textcoords="offset points",
            fontsize=6, va="center", annotation_clip=False, color=ink,
        )  # fmt: skip
        ticks.append(y)
        labels.append(row.label)
    axis.set_yticks(ticks, labels, fontsize=6.5)
    rows = (row for row in lines if not isinstance(row, str))
    for text, row in zip(axis.get_yticklabels(), rows, strict=True):
        text.set_color(style.GREY if row.other else style.BLACK)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.annotate(
        "Score    Sp / Se", (high, -0.75), xytext=(2, 0), textcoords="offset points", fontsize=6,
        va="center", color="#303030", annotation_clip=False,
    )  # fmt: skip
    axis.spines["bottom"].set_position(("data", len(lines) - 0.4))
    axis.set_ylim(height - 0.4, -1)
    axis.set_xlim(low, high)
    axis.set_xlabel("ICBHI Score (%)")
