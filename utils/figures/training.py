"""Learning curves from the table that a run writes while it trains."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from utils.common.errors import UserError
from utils.common.files import check_sum
from utils.common.readers import read_csv
from utils.figures import style

METRICS = "metrics.csv"


def read_metrics(run: str | Path) -> pd.DataFrame:
    """Table of a run folder's metrics: one row per epoch, at least epoch and train_loss.

    Raises:
        UserError: the file is missing, empty or lacks a column.
    """
    path = Path(run) / METRICS
    if not path.is_file():
        raise UserError(f"{path} is missing: give the folder of a run that has finished an epoch")
    check_sum(path)
    table = read_csv(path, "restore it, or repeat the run with training.resume=never")
    missing = {"epoch", "train_loss"} - set(table.columns)
    if missing or table.empty:
        what = f"lacks {', '.join(sorted(missing))}" if missing else "has no rows"
        raise UserError(f"{path} {what}; give the folder of a training run of this repository")
    return table


def measured_part(table: pd.DataFrame) -> str:
    """The part that was measured after each epoch: val, test_selection, or train alone."""
    for part in ("val", "test_selection"):
        if f"{part}_score" in table:
            return part
    return "train"


def learning_figure(table: pd.DataFrame, part: str = "val", best: int | None = None) -> Figure:
    """Loss, Sp/Se/Score and learning rate against the epoch.

    Args:
        table: columns epoch (from 0), train_loss and, where they exist, <part>_loss, <part>_sp,
            <part>_se, <part>_score (per cent), lr.
        part: as `measured_part` returns.
        best: epoch of the best checkpoint (from 0), marked; the best Score's when None.
    """
    figure = style.new_figure(style.PAGE, 2.1)
    loss, score, rate = figure.subplots(1, 3)
    epoch = table.epoch + 1
    loss.plot(epoch, table.train_loss, color=style.BLUE, label="train")
    title = {"val": "validation", "test_selection": "TEST"}.get(part, part)
    if part != "train" and table[f"{part}_loss"].notna().any():
        loss.plot(epoch, table[f"{part}_loss"], color=style.ORANGE, label=title)
        loss.legend()
    loss.set(title="loss", ylabel="loss")
    names = {"sp": ("Sp", style.SKY), "se": ("Se", style.ORANGE), "score": ("Score", style.BLACK)}
    shown = [n for n in names if f"{part}_{n}" in table and table[f"{part}_{n}"].notna().any()]
    for name in shown:
        label, colour = names[name]
        score.plot(epoch, table[f"{part}_{name}"], color=colour, label=label)
    if shown:
        score.set(ylim=(0, 138), yticks=range(0, 101, 20))
        _mark_best(score, table, part, best)
        score.legend(ncols=2, loc="upper center", handlelength=1.4, columnspacing=1)
    else:
        score.text(0.5, 0.5, "nothing measured\nbetween epochs", ha="center", va="center",
                   transform=score.transAxes, color=style.GREY)  # fmt: skip
        score.set_yticks([])
    score.set(title=f"{title} part, after each epoch", ylabel="per cent")
    if "lr" in table:
        rate.plot(epoch, table.lr, color=style.GREEN)
    rate.set(title="learning rate", ylabel="learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axis in (loss, score, rate):
        axis.set_xlabel("epoch")
        style.whole_numbers(axis, list(epoch))
        axis.grid(axis="y")
        if len(table) == 1:
            for line in axis.lines:
                line.set_marker("o")
    return figure


def _mark_best(axis, table: pd.DataFrame, part: str, best: int | None) -> None:
    column = table[f"{part}_score"] if f"{part}_score" in table else pd.Series(dtype=float)
    if best is None and column.notna().any():
        best = int(table.epoch[column.idxmax()])
    rows = table[table.epoch == best]
    if len(rows) and column.notna().any():
        value = float(rows[f"{part}_score"].iloc[0])
        axis.axvline(best + 1, color=style.GREY, linewidth=0.6, linestyle=":", ymax=100 / 138)
        axis.plot(
            best + 1, value, linestyle="none", marker="o", color=style.BLACK,
            markerfacecolor="white", zorder=3, label=f"{value:.1f} (epoch {best + 1})",
        )  # fmt: skip
