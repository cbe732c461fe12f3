"""Published systems on the official split of ICBHI 2017, and results of this repository."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.evaluation.published import NOT_STATED, TASKS, systems
from utils.figures import style
from utils.metrics.protocol import Selection

HONEST, ON_TEST = "honest", "test"
_BLOCKS = {  # in the order they are drawn: heading, colour, marker, filled
    HONEST: ("Honest: test half opened once", style.BLUE, "o", True),
    NOT_STATED: ("Selection not stated", style.GREY, "D", False),
    ON_TEST: ("Selected on the test half", style.VERMILLION, "s", False),
}


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
    """Two panels (4-class, 2-class): Score of every system, in blocks by how it was selected."""
    rows = pd.concat([_published_rows(systems()), _own_rows(own)], ignore_index=True)
    panels = [_lines(rows[rows.task == task]) for task in TASKS]
    heights = [len(lines) for lines in panels]
    figure = style.new_figure(style.PAGE, 0.165 * max(heights) + 0.75)
    axes = figure.subplots(1, 2)
    for axis, task, lines in zip(axes, TASKS, panels, strict=True):
        _panel(axis, lines, max(heights))
        axis.set_title(f"{task} task")
    figure.get_layout_engine().set(wspace=0.04)
    return figure


def sota_caption(own: Sequence[OwnResult] = ()) -> str:
    """What the reader must know to read the figure, from the table itself."""
    notes = systems().set_index("method").note.fillna("")
    text = (
        "Published systems on the official 60/40 split of ICBHI 2017, by how epoch and thresholds "
        "were chosen; ICBHI Score = (Sp + Se)/2, percent, with Sp and Se where the source gives "
        "them; bars: sd over seeds. “+”: metadata is an input; “(+)”: it steers the training loss "
        "only; “*”: collapsed from a 4-class model. Sources, evidence and notes: "
        "utils/figures/published.csv."
    )
    if notes.str.contains("does not add up").any():
        text += (
            " The TAFiLM 2-class row is drawn as printed (71.10), though (77.80 + 66.40)/2 = 72.10."
        )
    unseen = notes.index[notes.str.contains("seen nowhere else")]
    if len(unseen):
        text += f" Known from the README of the paper behind SoftFiLM only: {', '.join(unseen)}."
    if not own:
        text += (
            " No published row shows a selection without the test half; results of this repository "
            "are added with --run DIR."
        )
    return text


def _published_rows(table: pd.DataFrame) -> pd.DataFrame:
    rows = table[["task", "method", "sp", "se", "score", "score_sd"]].copy()
    rows["block"] = table.selection.replace({"validation": HONEST, "fixed": HONEST})
    mark = table.metadata.map({"yes": " +", "training only": " (+)"}).fillna("")
    collapsed = table.note.fillna("").str.startswith("collapsed").map({True: " *", False: ""})
    year = table.year.map(lambda y: "" if pd.isna(y) else f" ’{int(y) % 100:02d}")
    rows["label"] = table.method + year + mark + collapsed
    rows["own"] = False
    return rows


def _own_rows(own: Sequence[OwnResult]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "task": r.task, "method": r.name, "sp": r.sp, "se": r.se, "score": r.score,
            "score_sd": r.score_sd, "block": HONEST if Selection(r.protocol).honest else ON_TEST,
            "label": f"{r.name} (ours)", "own": True,
        }
        for r in own
    )  # fmt: skip


def _lines(rows: pd.DataFrame) -> list:
    """Headings (str) and rows (Series) from top to bottom; best Score first in each block."""
    lines: list = []
    for block in _BLOCKS:
        inside = rows[rows.block == block].sort_values("score", ascending=False)
        if len(inside):
            lines += [_BLOCKS[block][0], *(row for _, row in inside.iterrows())]
    return lines


def _panel(axis: Axes, lines: list, height: int) -> None:
    ticks, labels = [], []
    scores = [row.score for row in lines if not isinstance(row, str)]
    low, high = min(scores) - 2.5, max(scores) + 2
    for y, row in enumerate(lines):
        if isinstance(row, str):
            axis.text(low, y, row, fontsize=6.8, fontweight="bold", va="center", color="#303030")
            continue
        _, colour, marker, filled = _BLOCKS[row.block]
        sd = None if pd.isna(row.score_sd) else row.score_sd
        axis.plot([low, high], [y, y], color=style.PALE, linewidth=0.5, zorder=0)
        axis.errorbar(
            row.score, y, xerr=sd, fmt=marker, color=colour, capsize=1.5, elinewidth=0.8,
            markerfacecolor=colour if filled or row.own else "white", markersize=4,
        )  # fmt: skip
        detail = "" if pd.isna(row.sp) or pd.isna(row.se) else f"  {row.sp:.2f} / {row.se:.2f}"
        axis.annotate(
            f"{row.score:.2f}{detail}", (high, y), xytext=(2, 0), textcoords="offset points",
            fontsize=6, va="center", annotation_clip=False,
        )  # fmt: skip
        ticks.append(y)
        labels.append(row.label)
    axis.set_yticks(ticks, labels, fontsize=6.5)
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
