"""The overview figure of a corpus: classes, devices, sites, durations, age and BMI, patients.

python -m utils.figures.data_overview --data-folder DIR --output DIR
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from data.corpora.icbhi import completeness, read_cycles
from data.cycle_table import classes_of
from data.task import CLASSES
from utils.common.cli import command
from utils.figures import style

PARTS = ("train", "test")


def draw(table: pd.DataFrame, folder: str | Path) -> list[Path]:
    """Write the overview figure (classes, devices, sites, durations, age and BMI) and name it."""
    figure = style.new_figure(style.PAGE, 4.2)
    axes = figure.subplots(2, 3).ravel()
    named = table.assign(Class=[CLASSES[number] for number in classes_of(table)])
    devices, sites = (sorted(table[name].dropna().unique()) for name in ("Device", "AuscLoc"))
    colours = style.colours_of(devices)
    for axis, (column, values, title) in zip(
        axes,
        (
            ("Class", CLASSES, "class"),
            ("Device", devices, "device"),
            ("AuscLoc", sites, "auscultation site"),
        ),
        strict=False,
    ):
        counts = pd.crosstab(named[column], named["Split"]).reindex(
            index=list(values), columns=list(PARTS), fill_value=0
        )
        for shift, part in ((-0.2, "train"), (0.2, "test")):
            axis.bar(
                np.arange(len(values)) + shift,
                counts[part],
                width=0.4,
                color=style.SPLIT_COLOURS[part],
                label=part,
            )
        axis.set_xticks(range(len(values)), values)
        if column == "Device":  # four names do not fit side by side
            axis.tick_params(axis="x", rotation=20)
        axis.set(title=title, ylabel="cycles")
    axes[0].legend()
    bins = np.arange(0, max(10.0, table["Duration"].max()) + 0.25, 0.25)
    for part in PARTS:
        durations = table.loc[table["Split"] == part, "Duration"]
        axes[3].hist(durations, bins, histtype="step", color=style.SPLIT_COLOURS[part], label=part)
    axes[3].set(title="cycle length", xlabel="s", ylabel="cycles")
    patients = table.drop_duplicates("PID")
    for device, marker in zip(devices, style.MARKERS, strict=False):
        rows = patients[patients["Device"] == device]
        axes[4].plot(
            rows["Age"],
            rows["BMIDerived"],
            linestyle="",
            marker=marker,
            color=colours[device],
            label=device,
        )
    axes[4].set(title="patients", xlabel="age (years)", ylabel="BMI (kg/m$^2$)")
    axes[4].legend(handletextpad=0.1)
    cycles = table.groupby("PID").size().sort_values(ascending=False).to_numpy()
    axes[5].plot(np.arange(1, len(cycles) + 1), 100 * cycles.cumsum() / cycles.sum())
    axes[5].set(title="share of the largest patients", xlabel="patients", ylabel="% of all cycles")
    style.panel_letters(axes)
    state = completeness(table)
    partial = state.message.removeprefix("PARTIAL DATA: ")
    style.caption(figure, "", style.Notice(partial=partial))
    return style.save(figure, folder, "data_overview")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.figures.data_overview", description=__doc__
    )
    parser.add_argument("--data-folder", required=True, help="recordings, annotations, tables")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the figure")
    options = parser.parse_args(arguments)
    for path in draw(read_cycles(options.data_folder), options.output):
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
