"""Figures of an evaluation: confusion matrix, operating curve, reliability, subgroups.

Plain arrays in, a Figure out; rates are per cent as the field prints them, probabilities 0..1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.figures import style

_CALIBRATIONS = {  # key of the calibration report: label, colour, marker
    "as_trained": ("as trained", style.GREY, "o"),
    "without_pos_weight": ("pos_weight undone", style.BLUE, "s"),
    "platt": ("Platt (validation)", style.ORANGE, "^"),
}


def confusion_figure(
    matrix: np.ndarray, classes: Sequence[str], figures: Mapping[str, float] | None = None
) -> Figure:
    """Confusion matrix: colour is the share of the true class, the numbers are cycles and per cent.

    Args:
        matrix: [classes, classes] cycles; rows are the truth.
        figures: sp, se, score in per cent for the title; none when None.
    """
    matrix = np.asarray(matrix)
    totals = matrix.sum(axis=1, keepdims=True)
    share = 100 * np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    n = len(classes)
    figure = style.new_figure(style.COLUMN, 2.0 + 0.22 * n)
    axis = figure.subplots()
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
    texts = [[f"{matrix[i, j]:,}\n{share[i, j]:.0f} %" for j in range(n)] for i in range(n)]
    style.annotate_cells(axis, share, texts, image)
    axis.set_xticks(range(n), classes)
    axis.set_yticks(range(n), [f"{c}\n({t:,})" for c, t in zip(classes, totals[:, 0], strict=True)])
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class (cycles)")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    bar = figure.colorbar(image, ax=axis, shrink=0.85, pad=0.02)
    bar.set_label("share of the true class (%)")
    bar.outline.set_visible(False)
    if figures is not None:
        axis.set_title(
            f"Sp {figures['sp']:.2f}   Se {figures['se']:.2f}   Score {figures['score']:.2f} %"
        )
    return figure


def operating_figure(
    curves: Mapping[str, Mapping[str, np.ndarray]],
    points: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """Sensitivity against specificity over all thresholds.

    Args:
        curves: name -> {"sp": [P], "se": [P]} in per cent; one line each.
        points: name -> (sp, se) of the thresholds in use, drawn on top.
    """
    figure = style.new_figure(style.COLUMN, 3.1)
    axis = figure.subplots()
    _equal_scores(axis)
    for i, (name, curve) in enumerate(curves.items()):
        axis.plot(curve["sp"], curve["se"], label=name, color=f"C{i}", drawstyle="default")
    for i, (name, (sp, se)) in enumerate((points or {}).items()):
        axis.plot(
            sp, se, linestyle="none", marker=style.MARKERS[i % len(style.MARKERS)], markersize=5.5,
            color=style.BLACK, markerfacecolor="white", clip_on=False,
            label=f"{name}: Sp {sp:.1f}, Se {se:.1f}",
        )  # fmt: skip
    axis.set(
        xlabel="specificity Sp (%)",
        ylabel="sensitivity Se (%)",
        xlim=(0, 101),
        ylim=(0, 101),
        aspect="equal",
    )
    figure.legend(loc="outside upper center", ncols=1)
    return figure


def _equal_scores(axis: Axes) -> None:
    """Thin lines of equal ICBHI Score behind the curves, labelled along the diagonal."""
    for score in range(20, 100, 10):
        sp = np.array([max(0, 2 * score - 100), min(100, 2 * score)])
        axis.plot(sp, 2 * score - sp, color=style.PALE, linewidth=0.6, zorder=0)
        axis.text(
            score, score, f"{score}", fontsize=5.5, color=style.GREY, rotation=-45, ha="center",
            va="center", zorder=0, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip


def reliability_figure(calibration: Mapping[str, Mapping]) -> Figure:
    """Observed share against predicted probability, one panel per output.

    Args:
        calibration: output -> report as `utils.metrics.calibration.calibration_report` returns.
    """
    n = len(calibration)
    width = style.COLUMN if n <= 2 else style.PAGE
    figure = style.new_figure(width, 2.5 if n == 1 else 2.2)
    axes = figure.subplots(1, n, squeeze=False)[0]
    for axis, (name, report) in zip(axes, calibration.items(), strict=True):
        axis.plot([0, 1], [0, 1], color=style.PALE, linewidth=0.8, zorder=0)
        axis.axhline(report["prevalence"], color=style.GREY, linewidth=0.6, linestyle=":")
        numbers = []
        for key, (label, colour, marker) in _CALIBRATIONS.items():
            if key not in report:
                continue
            table = report[key]["reliability"]
            axis.plot(
                [row["predicted"] for row in table], [row["observed"] for row in table],
                color=colour, marker=marker, label=label, markersize=3, clip_on=False,
            )  # fmt: skip
            numbers.append((f"{report[key]['ece']:.3f}", colour))
        for i, (number, colour) in enumerate([("ECE", style.BLACK), *numbers]):
            axis.text(0.27 * i, 1.05, number, color=colour, transform=axis.transAxes, fontsize=6.5)
        axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axis.set_title(name, pad=13)
        axis.set_xlabel("predicted probability")
    axes[0].set_ylabel("observed share")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


def subgroup_figure(table: pd.DataFrame, overall: float | None = None) -> Figure:
    """Sp, Se and Score of each subgroup; rates that rest on too few cycles are left out.

    Args:
        table: rows as `utils.metrics.subgroups.subgroup_table` returns (per cent).
        overall: Score of the whole part in per cent, drawn as a line.
    """
    figure = style.new_figure(style.COLUMN, 0.145 * len(table) + 0.09 * table.group.nunique() + 0.9)
    axis = figure.subplots()
    y, ticks, labels, heads = 0.0, [], [], []
    for group, rows in table.groupby("group", sort=False):
        heads.append((y, group))
        y += 0.9
        for row in rows.itertuples(index=False):
            axis.plot([0, 100], [y, y], color=style.PALE, linewidth=0.5, zorder=0)
            for value, colour, marker in (
                (row.sp, style.BLUE, "^"), (row.se, style.ORANGE, "s"), (row.score, "black", "o"),
            ):  # fmt: skip
                axis.plot(
                    value,
                    y,
                    marker=marker,
                    color=colour,
                    linestyle="none",
                    markersize=3.5,
                    clip_on=False,
                )
            ticks.append(y)
            labels.append(f"{row.value} ({row.cycles:,} / {row.patients})")
            y += 1
    for y_head, group in heads:
        axis.text(
            -0.01, y_head, group, fontsize=7, fontweight="bold", va="center", ha="right",
            transform=axis.get_yaxis_transform(),
        )  # fmt: skip
    if overall is not None:
        axis.axvline(overall, color="black", linewidth=0.7, linestyle=":")
    axis.set_yticks(ticks, labels, fontsize=6.5)
    axis.set(xlim=(0, 101), ylim=(y - 0.4, -0.7), xlabel="per cent")
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    for label, colour, marker in (
        ("Sp", style.BLUE, "^"), ("Se", style.ORANGE, "s"), ("Score", "black", "o"),
    ):  # fmt: skip
        axis.plot([], [], marker=marker, color=colour, linestyle="none", label=label)
    figure.legend(loc="outside upper center", ncols=3)
    return figure
