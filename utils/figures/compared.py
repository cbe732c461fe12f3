"""Finished runs side by side: Scores and paired differences, an ablation, the permutation test.

Runs that differ in the training seed alone are one row (`utils.evaluation.finished_runs`).
Intervals are 95 %, over patients; values are in per cent, differences in points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.common.errors import UserError
from utils.evaluation.finished_runs import RunGroup, differing
from utils.figures import style
from utils.metrics.bootstrap import Difference, Interval, paired_bootstrap

ALWAYS_NORMAL = 50.0  # Score of a model that calls every cycle normal


@dataclass(frozen=True)
class Row:
    """One line of a forest plot.

    Attributes:
        label: what it is.
        score: mean over the runs, and its interval.
        runs: Score of each run.
        difference: Score minus the reference's; None for the reference itself.
    """

    label: str
    score: Interval
    runs: Sequence[float] = ()
    difference: Difference | None = None


def names_of(groups: Sequence[RunGroup]) -> list[str]:
    """Title of each group, with the keys in which groups of that title differ."""
    names = []
    for group in groups:
        keys = differing([other for other in groups if other.title == group.title])
        values = (f"{key.rpartition('.')[2]}={group.first.setting.get(key, '–')}" for key in keys)
        names.append(", ".join([group.title, *values]))
    return names


def forest_rows(groups: Sequence[RunGroup]) -> list[Row]:
    """A row for each group; the first is the reference of the differences.

    Training seeds are resampled with the patients where a group has several, the same as the
    reference.

    Raises:
        UserError: two groups were tested on different cycles.
    """
    reference, rows = groups[0], []
    for group, name in zip(groups, names_of(groups), strict=True):
        runs = [run.report.test.metrics["chosen"]["score"].value for run in group.runs]
        difference = None
        if group is not reference:
            seeds = [[run.report.seed for run in one.runs] for one in (reference, group)]
            shared = len(seeds[0]) if seeds[0] == seeds[1] and len(seeds[0]) > 1 else 0
            patients = [list(one.first.report.test.patients) for one in (reference, group)]
            try:
                if patients[0] != patients[1]:
                    raise ValueError
                found = paired_bootstrap(reference.tables, group.tables, training_seeds=shared)
            except ValueError:
                raise UserError(
                    f"{group.first.path} and {reference.first.path} were tested on different "
                    "cycles; a paired difference needs the same test part"
                ) from None
            difference = found["score"]
        rows.append(Row(name, group.interval("score"), runs, difference))
    return rows


def forest_figure(rows: Sequence[Row], against: str) -> Figure:
    """Scores with intervals on the left, paired differences on the right.

    Args:
        against: what the differences are to, for the axis.
    """
    figure = style.new_figure(style.PAGE, 0.24 * len(rows) + 0.8)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.2, 1))
    several = any(len(row.runs) > 1 for row in rows)
    for y, row in enumerate(rows):
        _interval(left, y, row.score, style.BLUE)
        if len(row.runs) > 1:
            left.plot(row.runs, [y + 0.28] * len(row.runs), "|", color=style.GREY, markersize=4)
        if row.difference is not None:
            _interval(right, y, row.difference, style.VERMILLION)
    left.axvline(ALWAYS_NORMAL, color=style.GREY, linewidth=0.7, linestyle=":", zorder=0)
    right.axvline(0, color=style.GREY, linewidth=0.7, zorder=0)
    left.set_yticks(range(len(rows)), [row.label for row in rows])
    left.set_ylim(len(rows) - 0.5, -0.6)
    left.set_xlabel("Score (%)" + ("; bars: single seeds" if several else ""))
    right.set_xlabel(f"Score minus that of {against} (points)")
    for axis in (left, right):
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.margins(x=0.25)
    return figure


def _interval(axis: Axes, y: float, found: Interval, colour: str) -> None:
    """A point with its interval, and both in figures at the right end of it."""
    axis.plot([found.low, found.high], [y, y], color=colour, linewidth=1.1, solid_capstyle="butt")
    axis.plot(found.value, y, "o", color=colour, markersize=3.8)
    signed = "+" if isinstance(found, Difference) else ""
    text = f"{found.value:{signed}.1f} [{found.low:{signed}.1f}, {found.high:{signed}.1f}]"
    axis.annotate(
        text.replace("-", "−"),
        (max(found.high, found.value), y), xytext=(4, 0), textcoords="offset points", fontsize=6,
        va="center", annotation_clip=False,
    )  # fmt: skip


Series = dict[str, dict[str, Interval]]


def ablation_series(groups: Sequence[RunGroup]) -> tuple[str, Series]:
    """What was varied, and the Score of each variant at each of its values, both in the order of
    the runs; without a varied key, the training methods.

    Raises:
        UserError: nothing but the seed or the variant was varied.
    """
    keys = _varied(groups)
    methods = len({group.methods for group in groups}) > 1
    if not keys and not methods:
        raise UserError("the grid varies no key and no method, so there is no ablation to draw")
    series: Series = {}
    for group in groups:
        name = group.title if keys else group.variant
        values = [group.first.setting.get(key, "–") for key in keys] or [group.methods]
        series.setdefault(name, {})[", ".join(values)] = group.interval("score")
    return ", ".join(key.rpartition(".")[2] for key in keys) or "training method", series


def _varied(groups: Sequence[RunGroup]) -> list[str]:
    """Keys that differ among runs of the same title."""
    titles = dict.fromkeys(group.title for group in groups)
    alike = ([group for group in groups if group.title == title] for title in titles)
    return list(dict.fromkeys(key for same in alike for key in differing(same)))


def ablation_figure(key: str, series: Mapping[str, Mapping[str, Interval]]) -> Figure:
    """Score against the value of the key: curves where it is a number, else points side by side."""
    values = list(dict.fromkeys(value for points in series.values() for value in points))
    curve = _numbers(values)
    x = dict(zip(values, curve or range(len(values)), strict=True))
    x = dict(sorted(x.items(), key=lambda pair: pair[1]))
    values, step = list(x), min(np.diff(list(x.values())), default=1)
    figure = style.new_figure(style.COLUMN if len(values) < 7 else style.PAGE, 2.6)
    axis = figure.subplots()
    for i, (name, points) in enumerate(series.items()):
        shift = 0.5 * step * ((i + 0.5) / len(series) - 0.5)  # intervals must not hide each other
        inside = [value for value in values if value in points]
        found = [points[value] for value in inside]
        middle = [one.value for one in found]
        axis.errorbar(
            [x[value] + shift for value in inside], middle,
            yerr=[[one.value - one.low for one in found], [one.high - one.value for one in found]],
            label=name, marker=style.MARKERS[i % len(style.MARKERS)], elinewidth=0.8, capsize=1.5,
            linestyle="-" if curve else "none", color=style.CYCLE[i % 7],
        )  # fmt: skip
    axis.axhline(ALWAYS_NORMAL, color=style.GREY, linewidth=0.7, linestyle=":", zorder=0)
    axis.set_xticks([x[value] for value in values], values)
    if not curve and max(map(len, values)) > 8:
        axis.tick_params(axis="x", rotation=25)
    axis.set(xlabel=key, ylabel="Score (%)")
    figure.legend(loc="outside upper center", ncols=3 if len(values) < 7 else 5)
    return figure


def _numbers(values: Sequence[str]) -> list[float] | None:
    try:
        return [float(value) for value in values]
    except ValueError:
        return None


def permutation_figure(rows: Sequence[Mapping]) -> Figure:
    """Score under each kind of metadata, and its difference to that with the real ones.

    Args:
        rows: `Report.metadata_test`.
    """
    figure = style.new_figure(style.PAGE, 0.24 * len(rows) + 0.8)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.2))
    for y, row in enumerate(rows):
        for name, colour, marker in (
            ("sp", style.SKY, "^"), ("se", style.ORANGE, "s"), ("score", style.BLACK, "o"),
        ):  # fmt: skip
            label = name.capitalize() if y == 0 else None
            left.plot(row[name], y, marker, color=colour, label=label, clip_on=False)
        if row["metadata"] != "real":
            _interval(right, y, row["difference"], style.VERMILLION)
    left.axvline(rows[0]["score"], color=style.BLACK, linewidth=0.7, linestyle=":", zorder=0)
    right.axvline(0, color=style.GREY, linewidth=0.7, zorder=0)
    left.set_yticks(range(len(rows)), [row["metadata"] for row in rows])
    left.set(ylim=(len(rows) - 0.5, -0.6), xlim=(0, 100), xlabel="per cent")
    right.set_xlabel("Score minus that with real metadata (points)")
    right.margins(x=0.25)
    for axis in (left, right):
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
    figure.legend(loc="outside upper left", ncols=3)
    return figure
