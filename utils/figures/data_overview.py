"""The overview figure of a corpus: classes, devices, sites, durations, age and BMI, patients.

python -m utils.figures.data_overview --data-folder DIR --output DIR                    ICBHI
python -m utils.figures.data_overview --corpus FILE.yaml --output DIR [dataset.key=value ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from data.config import DatasetConfig, read_dataset
from data.corpora.registry import CORPORA, read_corpus
from data.cycle_table import classes_of
from data.synthetic.corpus import is_synthetic
from data.task import CLASSES
from utils.common.cli import command
from utils.figures import style

UNKNOWN, WHOLE = "unknown", "all"


def draw(table: pd.DataFrame, folder: str | Path, notice: style.Notice) -> list[Path]:
    """Write the overview figure (classes, devices, sites, durations, age and BMI) and name it."""
    figure = style.new_figure(style.PAGE, 4.2)
    axes = figure.subplots(2, 3).ravel()
    table = table.assign(
        Class=[CLASSES[number] for number in classes_of(table)],
        Device=table["Device"].fillna(UNKNOWN),
        AuscLoc=table["AuscLoc"].fillna(UNKNOWN),
        Split=table["Split"].where(table["Split"] != "", WHOLE),
    )
    parts = [part for part in style.SPLIT_COLOURS if (table["Split"] == part).any()]
    devices, sites = (_names(table[name]) for name in ("Device", "AuscLoc"))
    _bars(axes[0], table, "Class", CLASSES, parts, "class")
    _bars(axes[1], table, "Device", devices, parts, "device")
    _bars(axes[2], table, "AuscLoc", sites, parts, "auscultation site")
    if len(parts) > 1:
        axes[0].legend()
    durations = table["Duration"].dropna()
    bins = np.arange(0, max(10.0, durations.max() if len(durations) else 0) + 0.25, 0.25)
    for part in parts:
        rows = durations[table["Split"] == part]
        axes[3].hist(rows, bins, histtype="step", color=style.SPLIT_COLOURS[part], label=part)
    axes[3].set(title="cycle length", xlabel="s", ylabel="cycles")
    _patients(axes[4], table.drop_duplicates("PID"), devices)
    cycles = table.groupby("PID").size().sort_values(ascending=False).to_numpy()
    axes[5].plot(np.arange(1, len(cycles) + 1), 100 * cycles.cumsum() / cycles.sum())
    axes[5].set(title="share of the largest patients", xlabel="patients", ylabel="% of all cycles")
    style.panel_letters(axes)
    style.caption(figure, "", notice)
    return style.save(figure, folder, "data_overview")


def _names(column: pd.Series) -> list[str]:
    return sorted(column.unique(), key=lambda name: (name == UNKNOWN, name))


def _bars(
    axis: Axes,
    table: pd.DataFrame,
    column: str,
    values: Sequence[str],
    parts: Sequence[str],
    title: str,
) -> None:
    """Cycles of each value, one bar per part."""
    width = 0.8 / len(parts)
    for number, part in enumerate(parts):
        counts = table.loc[table["Split"] == part, column].value_counts()
        axis.bar(
            np.arange(len(values)) + (number - (len(parts) - 1) / 2) * width,
            counts.reindex(list(values), fill_value=0),
            width=width,
            color=style.SPLIT_COLOURS[part],
            label=part,
        )
    axis.set_xticks(range(len(values)), values)
    if sum(map(len, values)) > 28:  # as many letters as fit side by side
        axis.tick_params(axis="x", rotation=20 if len(values) < 6 else 60)
    axis.set(title=title, ylabel="cycles")


def _patients(axis: Axes, patients: pd.DataFrame, devices: Sequence[str]) -> None:
    """Age and BMI of each patient; the ages alone where no BMI is known."""
    colours = style.colours_of(devices)
    axis.set(title="patients", xlabel="age (years)")
    if patients["BMIDerived"].isna().all():
        ages = [patients.loc[patients["Device"] == device, "Age"].dropna() for device in devices]
        axis.hist(ages, 20, stacked=True, color=[colours[d] for d in devices], label=devices)
        axis.set_ylabel("patients")
        axis.margins(y=0.5)  # room for the legend above the bars
        axis.yaxis.get_major_locator().set_params(integer=True)
    else:
        for number, device in enumerate(devices):
            rows = patients[patients["Device"] == device].dropna(subset=["Age", "BMIDerived"])
            axis.plot(
                rows["Age"],
                rows["BMIDerived"],
                linestyle="",
                marker=style.MARKERS[number % len(style.MARKERS)],
                color=colours[device],
                label=device if len(rows) else None,
            )
        axis.set_ylabel("BMI (kg/m$^2$)")
    axis.legend(handletextpad=0.3)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.figures.data_overview",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data-folder", metavar="DIR", help="ICBHI: recordings, annotations, tables")
    what.add_argument("--corpus", metavar="FILE.yaml", help="any corpus, by the section dataset")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the figure")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dataset.data_folder=DIR")
    options = parser.parse_args(arguments)
    dataset = DatasetConfig(data_folder=options.data_folder)
    if options.corpus:
        dataset = read_dataset(options.corpus, options.overrides)
    table = read_corpus(replace(dataset, cycle_metadata_path=None))
    partial = CORPORA[dataset.name].completeness(table).message
    notice = style.Notice(
        partial=partial.removeprefix("PARTIAL DATA: "), synthetic=is_synthetic(*dataset.folders)
    )
    for path in draw(table, options.output, notice):
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
