"""Run folders -> the tables of the README, ours beside the paper's printed figures.

    python -m utils.evaluation.result_tables runs/* [--table 4-class] [--format latex]
    python -m utils.evaluation.result_tables --mlflow sqlite:///mlflow.db --experiment icbhi

Each selection rule, split and data set has a table of its own, so figures of different protocols
never share a column. Runs that differ in the training seed only are averaged; the folds of a run
with --folds all stand there pooled, where the group's folder is named too (as runs/* does).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from models.registry import VARIANTS
from utils.common.cli import command
from utils.common.errors import UserError
from utils.evaluation import paper
from utils.evaluation.finished_runs import (
    POOLED,
    Protocol,
    Run,
    RunGroup,
    folders_from_mlflow,
    group_runs,
    read_runs,
)
from utils.evaluation.render import NOTHING, counts_line, number
from utils.evaluation.tables import FORMATS, Table, render
from utils.metrics.protocol import SYNTHETIC_NOTE, Selection, caption

COLLAPSED = " (4-class model, collapsed)"
FIGURES = {"sp": "Sp", "se": "Se", "score": "Score"}


def _place(variant: str) -> tuple[int, str]:
    """Sorts by `Variant.order`; one that is no longer in `models/` comes last."""
    names = list(VARIANTS)
    return (names.index(variant) if variant in names else len(names), variant)


def cell(group: RunGroup, figure: str, *, interval: bool = True) -> str:
    """`mean ± sd [low, high], n = 5`, in percent; sd from two runs on."""
    seeds, bounds = group.over_seeds(figure), group.interval(figure)
    if math.isnan(seeds.mean):
        return NOTHING
    text = f"{seeds.mean:.2f}"
    if seeds.n > 1:
        text += f" ± {seeds.sd:.2f}"
    if interval:
        text += f" [{bounds.low:.1f}, {bounds.high:.1f}], n = {seeds.n}"
    return text


def notes(protocol: Protocol, groups: Sequence[RunGroup], extra: Sequence[str]) -> list[str]:
    """What must stand under a table: rule, data, meaning of the numbers, the paper's own rule."""
    first = groups[0].runs[0].report
    trained = "one model per fold, on the other folds"
    if protocol.split != POOLED:
        trained = counts_line(first["counts"]["train"])
    lines = [
        f"Ours: {Selection(protocol.selection).statement}",
        f"Split `{protocol.split}`. Training: {trained}. "
        f"Test: {counts_line(first['test']['counts'])}.",
        "Percent; mean ± sd over n training seeds; in brackets the 95 % patient bootstrap interval "
        "of that mean.",
        paper.SELECTION_NOTE,
        *extra,
    ]
    if protocol.partial:
        lines.insert(0, first["partial_message"])
    if protocol.synthetic:
        lines.insert(0, SYNTHETIC_NOTE)
    return lines


def titled(text: str, protocol: Protocol) -> str:
    """Title of a table with its split, where it is not the official one, and its marks."""
    text += "" if protocol.split == "official" else f", split {protocol.split}"
    return caption(text, protocol.selection, protocol.partial, protocol.synthetic)


def labelled(groups: Sequence[RunGroup]) -> list[tuple[str, RunGroup]]:
    """Titles, with the settings' hash where a variant was run with several settings."""
    titles = [group.title for group in groups]
    return [
        (g.title if titles.count(g.title) == 1 else f"{g.title} · {g.setting}", g) for g in groups
    ]


def floor_rows(
    groups: Sequence[tuple[str, RunGroup]], prefix: str = "", suffix: str = ""
) -> list[list[str]]:
    """What models score that hear nothing, on the same split by the same rule: rows of a result
    table. Runs whose loss weighs positives otherwise have floors of their own."""
    found: dict[tuple[str, ...], str] = {}
    for _, group in groups:
        for name, floor in group.runs[0].report["test"].get("floors", {}).items():
            figures = [floor["metrics"]["chosen"][f"{prefix}{f}"] for f in FIGURES]
            values = [number(figure["value"]) for figure in figures]
            low, high = (number(figures[-1][end], 1) for end in ("low", "high"))
            values[-1] += f" [{low}, {high}]"
            found.setdefault((f"Floor: {name}{suffix}", *values), group.setting)
    names = [key[0] for key in found]
    return [
        [name if names.count(name) == 1 else f"{name} · {setting}", *values]
        + [NOTHING] * len(FIGURES)
        for (name, *values), setting in found.items()
    ]


def result_table(n_cls: int) -> Callable[[Protocol, list[RunGroup]], Table | None]:
    """Maker of the 4-class or 2-class table: all blocks trained, all layers conditioned."""

    def make(protocol: Protocol, groups: list[RunGroup]) -> Table | None:
        whole = [g for g in groups if g.trains_all and g.conditions_all]
        own = labelled([g for g in whole if g.n_cls == n_cls])
        collapsed = labelled([g for g in whole if g.n_cls == 4]) if n_cls == 2 else []
        if not own and not collapsed:
            return None
        printed = paper.RESULTS[n_cls]
        names = sorted({*printed, *(g.variant for _, g in own)}, key=_place)
        rows = []
        for variant in names:
            theirs = [str(printed.get(variant, {}).get(f, NOTHING)) for f in FIGURES]
            mine = [(label, g) for label, g in own if g.variant == variant]
            for label, group in mine:
                rows.append([label, *(cell(group, f, interval=f == "score") for f in FIGURES)])
                rows[-1] += theirs
            if not mine:
                rows.append([paper.TITLES[variant], *[NOTHING] * len(FIGURES), *theirs])
        rows += floor_rows(own)
        for label, group in collapsed:
            ours = [cell(group, f"collapsed_{f}", interval=f == "score") for f in FIGURES]
            rows.append([f"{label}{COLLAPSED}", *ours, *[NOTHING] * len(FIGURES)])
        rows += floor_rows(collapsed, "collapsed_", COLLAPSED)
        head = ["Method", *(f"{h}, ours" for h in FIGURES.values())]
        head += [f"{h}, paper" for h in FIGURES.values()]
        shown = [group for _, group in (*own, *collapsed)]
        extra = [paper.TAFILM_NOTE] if n_cls == 2 else []
        title = titled(f"{n_cls}-class evaluation", protocol)
        return Table(title, head, rows, notes(protocol, shown, extra), protocol)

    return make


def freezing_table(protocol: Protocol, groups: list[RunGroup]) -> Table | None:
    """4-class Score by trainable blocks and variant."""
    groups = [g for g in groups if g.n_cls == 4 and g.conditions_all]
    if len({g.blocks for g in groups}) < 2:
        return None
    variants = sorted({*paper.FREEZING[0], *(g.variant for g in groups)}, key=_place)
    titles = paper.TITLES | {g.variant: g.title for g in groups}
    head = ["Trainable blocks"]
    for variant in variants:
        head += [f"{titles[variant]}, ours", f"{titles[variant]}, paper"]
    rows = []
    for blocks in sorted({*paper.FREEZING, *(g.blocks for g in groups)}):
        row = [f"n = {blocks}"]
        for variant in variants:
            here = [g for g in groups if (g.variant, g.blocks) == (variant, blocks)]
            theirs = paper.FREEZING.get(blocks, {}).get(variant)
            row += [_joined(here), NOTHING if theirs is None else f"{theirs:.2f}"]
        rows.append(row)
    title = titled("Backbone freezing, 4-class Score (%)", protocol)
    return Table(title, head, rows, notes(protocol, groups, []), protocol)


def layers_table(protocol: Protocol, groups: list[RunGroup]) -> Table | None:
    """4-class Score by conditioned layers, whole backbone trained."""
    groups = [g for g in groups if g.n_cls == 4 and g.trains_all and g.layers]
    if len({g.layers for g in groups}) < 2:
        return None
    variants = sorted({g.variant for g in groups}, key=_place)
    titles = {g.variant: g.title for g in groups}
    depth = max(g.depth for g in groups)
    sets = {tuple(range(depth - n, depth)): n for n in paper.LAYERS if n <= depth}
    order = sorted({*sets, *(g.layers for g in groups)}, key=lambda layers: (len(layers), layers))
    head = ["Conditioned layers", *(f"{titles[v]}, ours" for v in variants), "SoftFiLM-AST, paper"]
    rows = []
    for layers in order:
        here = [[g for g in groups if (g.variant, g.layers) == (v, layers)] for v in variants]
        theirs = paper.LAYERS.get(sets.get(layers)) if depth == max(paper.LAYERS) else None
        rows.append([_layers_name(layers, depth), *map(_joined, here)])
        rows[-1].append(NOTHING if theirs is None else f"{theirs:.2f}")
    title = titled("Conditioned layers, 4-class Score (%)", protocol)
    return Table(title, head, rows, notes(protocol, groups, []), protocol)


def _joined(groups: Sequence[RunGroup]) -> str:
    """One cell; several settings stand side by side with their hashes, never averaged."""
    if len(groups) == 1:
        return cell(groups[0], "score")
    return "; ".join(f"{cell(g, 'score')} ({g.setting})" for g in groups) or NOTHING


def _layers_name(layers: tuple[int, ...], depth: int) -> str:
    if layers == tuple(range(depth)):
        return f"All {depth} {{0–{depth - 1}}}"
    listed = ", ".join(map(str, layers))
    if layers == tuple(range(layers[0], depth)):
        listed = f"{layers[0]}–{layers[-1]}" if len(layers) > 2 else listed
        return f"Last {len(layers)} {{{listed}}}"
    return f"{{{listed}}}"


TABLES: dict[str, Callable[[Protocol, list[RunGroup]], Table | None]] = {
    "4-class": result_table(4),
    "2-class": result_table(2),
    "freezing": freezing_table,
    "layers": layers_table,
}


def build_tables(runs: Sequence[Run], names: Sequence[str] = tuple(TABLES)) -> list[Table]:
    """Every table that the runs can fill, one per protocol, in the order of `names`.

    Raises:
        UserError: two of the runs are the same configuration with the same seed.
    """
    grouped = [
        (protocol, sorted(groups, key=lambda group: _place(group.variant)))
        for protocol, groups in group_runs(runs)
    ]
    made = (TABLES[name](protocol, groups) for name in names for protocol, groups in grouped)
    return [table for table in made if table is not None]


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.evaluation.result_tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", type=Path, help="run folders, such as runs/*")
    parser.add_argument("--table", choices=list(TABLES), help="one table only")
    parser.add_argument(
        "--format", choices=list(FORMATS), default="markdown", help="default: markdown"
    )
    parser.add_argument("--mlflow", metavar="URI", help="take the run folders of tracked runs")
    parser.add_argument(
        "--experiment", metavar="NAME", default="icbhi", help="of MLflow; default: icbhi"
    )
    options = parser.parse_args(arguments)
    folders = list(options.runs)
    if options.mlflow:
        folders += folders_from_mlflow(options.mlflow, options.experiment)
    if not folders:
        raise UserError("no run folders given; name some, such as runs/*, or use --mlflow")
    tables = build_tables(read_runs(folders), [options.table] if options.table else [*TABLES])
    if not tables:
        raise UserError(
            f"the runs fill no table{f' {options.table}' if options.table else ''}; "
            "train more of them, or choose another --table"
        )
    print(render(tables, options.format), end="")


if __name__ == "__main__":
    sys.exit(main())
