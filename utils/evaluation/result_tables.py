"""Run folders -> result tables, ours next to the paper's printed values.

    python -m utils.evaluation.result_tables runs/* [--table 4-class] [--format latex]

Each selection rule, split and data set has its own table, so that values of different
protocols never share a column. Runs that differ in the training seed only are averaged; whatever
else differs between the rows of a table is a column of it. The folds of a run with --folds all are
one row, pooled, where the group's folder is named too (as runs/* does).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd

from models.registry import VARIANTS
from utils.common.cli import command
from utils.common.errors import UserError
from utils.evaluation.finished_runs import (
    POOLED,
    Protocol,
    Run,
    RunGroup,
    differing,
    group_runs,
    read_runs,
)
from utils.evaluation.published import (
    AUTHORS,
    BLOCKS,
    NOT_STATED,
    OFFICIAL,
    OURS,
    of_four_classes,
    read_published,
    systems,
)
from utils.evaluation.render import NOTHING, RATES, counts_line, markdown_table, number, shown
from utils.metrics.protocol import Selection, caption, warnings

COLLAPSED = " (4-class model, collapsed)"
HEADS = dict(zip(RATES, ("Sp", "Se", "Score"), strict=True))
AUROC = "Macro AUROC, ours"
TRAINABLE, LAYERS = "backbone.trainable_blocks", "models.*.conditioned_layers"
SELECTION_NOTE = (
    "Paper: SELECTED ON TEST: official split, values as printed; the authors' code chooses epoch "
    "and thresholds on the test half."
)
PUBLISHED_NOTE = (
    "Published: as printed, with sd where given; sources, rules and caveats are in "
    "utils/figures/published.csv. Test-selected values stand in the test-selected table only."
)
TAFILM_NOTE = (
    "The paper's 2-class TAFiLM row is quoted as printed, but does not add up: "
    "(77.80 + 66.40) / 2 = 72.10, printed 71.10."
)


@dataclass(frozen=True)
class Table:
    """Cells are finished text; the notes belong under every rendering."""

    title: str
    frame: pd.DataFrame
    notes: list[str]
    protocol: Protocol


@dataclass(frozen=True)
class Kind:
    """What a table shows: name, number of classes, metrics, and which runs belong to it.

    Attributes:
        key: the setting that the table is about, always a column; None: whole models.
        belongs: whether a run does.
    """

    title: str
    n_cls: int
    metrics: tuple[str, ...]
    key: str | None
    belongs: Callable[[Run], bool]


def _whole(run: Run) -> bool:
    return run.blocks == run.depth and run.conditions_all


TABLES: dict[str, Kind] = {
    "4-class": Kind("4-class evaluation", 4, RATES, None, _whole),
    "2-class": Kind("2-class evaluation", 2, RATES, None, _whole),
    "freezing": Kind(
        "Backbone freezing, 4-class", 4, ("score",), TRAINABLE, lambda run: run.conditions_all
    ),
    "layers": Kind(
        "Conditioned layers, 4-class", 4, ("score",), LAYERS,
        lambda run: run.blocks == run.depth and run.layers is not None,
    ),
    "methods": Kind("Score under each training method, 4-class", 4, ("score",), None, _whole),
    "leaderboard": Kind("Leaderboard", 4, RATES, None, lambda run: run.conditions_all),
}  # fmt: skip
#: Those that are made unless one is named.
USUAL = tuple(name for name in TABLES if name != "leaderboard")


def build_tables(runs: Sequence[Run], names: Sequence[str] = USUAL) -> list[Table]:
    """Every table that the runs can fill, one per protocol, in the order of `names`.

    Raises:
        UserError: two of the runs are the same configuration with the same seed.
    """
    grouped = group_runs(runs)
    made = (
        make(TABLES[name], protocol, groups)
        for name in names
        for make in MAKERS.get(name, (_table,))
        for protocol, groups in grouped
    )
    return [table for table in made if table is not None]


def _table(kind: Kind, protocol: Protocol, groups: Sequence[RunGroup]) -> Table | None:
    inside = [g for g in groups if kind.belongs(g.first)]
    own = [g for g in inside if g.n_cls == kind.n_cls]
    collapsed = [g for g in inside if g.n_cls == 4] if kind.n_cls == 2 else []
    if not own and not collapsed:
        return None
    if kind.key and len({g.first.setting.get(kind.key) for g in own}) < 2:
        return None
    keys = differing([*own, *collapsed])
    if kind.key:
        keys = [kind.key, *(key for key in keys if key != kind.key)]
    names = [HEADS[metric] for metric in kind.metrics]
    head = ["Method", *keys, *(f"{n}, ours" for n in names), *_auroc_column(own, collapsed)]
    frame = pd.DataFrame([_row(g, kind, keys) for g in own], columns=head)
    if not protocol.leaky:  # never in one row with values on other splits
        head += [f"{n}, paper" for n in names]
        on = ["Method", kind.key] if kind.key else ["Method"]
        frame = frame.merge(_paper(kind), how="outer", on=on)
    frame = frame.iloc[sorted(range(len(frame)), key=lambda i: _place(frame.iloc[i], kind))]
    rows = _baseline_rows(own, kind, keys)
    rows += [_row(g, kind, keys, "collapsed_", COLLAPSED) for g in collapsed]
    rows += _baseline_rows(collapsed, kind, keys, "collapsed_", COLLAPSED)
    frame = pd.concat([frame, pd.DataFrame(rows)], ignore_index=True)
    frame = frame.reindex(columns=head).fillna(NOTHING)
    shown = [*own, *collapsed]
    left_out = [g for g in groups if g.n_cls == kind.n_cls and g not in shown]
    return Table(_title(kind, protocol), frame, _notes(kind, protocol, shown, left_out), protocol)


def _methods(kind: Kind, protocol: Protocol, groups: Sequence[RunGroup]) -> Table | None:
    """Variants as rows, training methods as columns; a note says what else a method's runs set."""
    own = [g for g in groups if g.n_cls == kind.n_cls and kind.belongs(g.first)]
    columns: dict[str, list[RunGroup]] = {}
    for group in own:
        columns.setdefault(group.methods, []).append(group)
    if len(columns) < 2:
        return None
    keys = list(dict.fromkeys(key for column in columns.values() for key in differing(column)))
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for group in own:
        values = {key: group.first.setting.get(key, NOTHING) for key in keys}
        row = rows.setdefault(
            (group.variant, *values.values()), {"Variant": group.variant} | values
        )
        row[group.methods] = cell(group, "score")
    head = ["Variant", *keys, *sorted(columns, key=lambda name: (name != "none", name))]
    frame = pd.DataFrame(sorted(rows.values(), key=lambda row: _rank(row["Variant"])))
    notes = [note for note in _notes(kind, protocol, own, []) if note != SELECTION_NOTE]
    for name, column in columns.items():
        for key in differing([*column, *columns.get("none", [])]):
            if key not in keys:
                (value,) = {g.first.setting[key] for g in column if key in g.first.setting}
                notes.append(f"{name}: {key}={value}, unlike the runs without a method.")
    return Table(_title(kind, protocol), frame[head].fillna(NOTHING), notes, protocol)


def _leaderboard(n_cls: int, kind: Kind, protocol: Protocol, groups: Sequence) -> Table | None:
    """Every system of ours by its title and the published ones whose rule was as honest, then the
    metadata-only baselines."""
    kind = replace(kind, n_cls=n_cls, title=f"{kind.title}, {n_cls}-class")
    own = [g for g in groups if kind.belongs(g.first) and g.n_cls == n_cls]
    collapsed = [g for g in groups if kind.belongs(g.first) and g.n_cls == 4 != n_cls]
    if not own and not collapsed:
        return None
    shown = [*own, *collapsed]
    alike = ([o for o in shown if (o.title, o.n_cls) == (g.title, g.n_cls)] for g in shown)
    keys = dict.fromkeys(key for same in alike for key in differing(same))
    rows = [_row(g, kind, [*keys]) for g in own]
    rows += [_row(g, kind, [*keys], "collapsed_", COLLAPSED) for g in collapsed]
    names = [f"{HEADS[metric]}, ours" for metric in kind.metrics]
    head = ["Method", *keys, *names, *_auroc_column(own, collapsed)]
    frame = pd.DataFrame(rows, columns=head)
    absent = {SELECTION_NOTE} | ({TAFILM_NOTE} if protocol.selection != "test" else set())
    notes = [note for note in _notes(kind, protocol, shown, []) if note not in absent]
    if not protocol.leaky:  # never next to values on other splits
        frame = frame.merge(_published(kind, protocol), how="outer", on="Method")
        notes.append(PUBLISHED_NOTE)
    frame = frame.iloc[sorted(range(len(frame)), key=lambda i: _rank(frame["Method"].iloc[i]))]
    baselines = pd.DataFrame(_baseline_rows(own, kind, [*keys]))
    frame = pd.concat([frame, baselines], ignore_index=True).astype(object).fillna(NOTHING)
    return Table(_title(kind, protocol), frame, notes, protocol)


#: Tables that are not made by `_table`; the leaderboard is two.
MAKERS: dict[str, tuple[Callable[..., Table | None], ...]] = {
    "methods": (_methods,),
    "leaderboard": (partial(_leaderboard, 4), partial(_leaderboard, 2)),
}


def _title(kind: Kind, protocol: Protocol) -> str:
    title = kind.title + ("" if protocol.split == "official" else f", split {protocol.split}")
    return caption(title, protocol.selection, protocol.partial, protocol.synthetic, protocol.leaky)


def _row(
    group: RunGroup, kind: Kind, keys: Sequence[str], prefix: str = "", suffix: str = ""
) -> dict[str, str]:
    row = {"Method": group.title + suffix}
    row |= {key: group.first.setting.get(key, NOTHING) for key in keys}
    for metric in kind.metrics:
        row[f"{HEADS[metric]}, ours"] = cell(group, prefix + metric, interval=metric == "score")
    if group.auroc and not prefix:
        row[AUROC] = shown("auroc_macro", group.auroc)
    return row


def _auroc_column(*groups: Sequence[RunGroup]) -> list[str]:
    """The column of the macro AUROC, where any run has one; whole models only."""
    return [AUROC] * any(group.auroc for own in groups for group in own)


def cell(group: RunGroup, metric: str, *, interval: bool = True) -> str:
    """`mean ± sd [low, high], n = 5`, in percent; sd from two runs on."""
    seeds, bounds = group.over_seeds(metric), group.interval(metric)
    if math.isnan(seeds.mean):
        return NOTHING
    text = f"{seeds.mean:.2f}" + (f" ± {seeds.sd:.2f}" if seeds.n > 1 else "")
    if interval:
        text += f" [{bounds.low:.1f}, {bounds.high:.1f}], n = {seeds.n}"
    return text


def _paper(kind: Kind) -> pd.DataFrame:
    """The paper's rows of a table: method, the table's key, printed values with their sd."""
    table = read_published()
    table = table[(table.authors == AUTHORS) & (table.task == f"{kind.n_cls}-class")]
    blocks, layers = table.blocks.fillna(BLOCKS), table.layers.fillna(BLOCKS)
    if kind.key == LAYERS:  # of the one variant that was trained so
        inside = (blocks == BLOCKS) & table.method.isin(table.method[layers < BLOCKS])
    else:
        inside = (layers == BLOCKS) & ((blocks == BLOCKS) | (kind.key == TRAINABLE))
    out = pd.DataFrame({"Method": table.method})
    if kind.key == TRAINABLE:
        out[TRAINABLE] = blocks.astype(str)
    if kind.key == LAYERS:
        out[LAYERS] = layers.map(lambda n: "all" if n == BLOCKS else f"last {n}")
    return _with_printed(out, table, kind, "paper")[inside]


def _with_printed(out: pd.DataFrame, table: pd.DataFrame, kind: Kind, whose: str) -> pd.DataFrame:
    """`out` with the printed values of as many rows of published.csv and their sd."""
    for metric in kind.metrics:
        values = table[metric].map("{:.2f}".format, na_action="ignore")
        sd = table[f"{metric}_sd"].map(" ± {:.2f}".format, na_action="ignore").astype(object)
        out[f"{HEADS[metric]}, {whose}"] = values + sd.fillna("")
    return out


def _published(kind: Kind, protocol: Protocol) -> pd.DataFrame:
    """Systems of published.csv: in the row of ours (for a collapsed model of ours, too) where the
    split was official and nothing else speaks against it, else in one of their own that says why.
    Those chosen on validation patients stand with ours that were, all others with ours that were
    selected on test."""
    table = systems()
    honest = table.selection.isin([Selection.VALIDATION.value, Selection.FIXED.value])
    table = table[
        (table.task == f"{kind.n_cls}-class") & (honest == (protocol.selection != "test"))
    ]
    names = []
    for row, collapsed in zip(table.itertuples(), of_four_classes(table), strict=True):
        marks = [] if row.split == OFFICIAL else [f"split: {row.split}"]
        marks += [] if pd.isna(row.caveat) else [row.caveat]
        marks += [f"selection {NOT_STATED}"] if row.selection == NOT_STATED else []
        name = row.method if marks else OURS.get(row.method, row.method)
        name += f" ({'; '.join(marks)})" if marks else ""
        names.append(name + COLLAPSED if collapsed else name)
    out = pd.DataFrame({"Method": names}, index=table.index)
    return _with_printed(out, table, kind, "published")


def _place(row: pd.Series, kind: Kind) -> tuple:
    """Sorts by the table's key (numbers in their order), then by `_rank`."""
    value = row[kind.key] if kind.key else ""
    n = value.removeprefix("last ")
    size = int(n) if n.isdigit() else BLOCKS + 1 if value == "all" else -1
    return size, value, *_rank(row["Method"])


def _rank(title: str) -> tuple[int, str]:
    """Sorts titles by `Variant.order`, with methods after without; a variant that is no longer in
    `models/` comes last."""
    titles = [variant.title for variant in VARIANTS.values()]
    name = title.removesuffix(COLLAPSED).partition(" + ")[0]
    return titles.index(name) if name in titles else len(titles), title


def _baseline_rows(
    groups: Sequence[RunGroup], kind: Kind, keys: Sequence[str], prefix: str = "", suffix: str = ""
) -> list[dict[str, str]]:
    """Metadata-only baselines on the same split by the same rule. Runs whose loss weighs positives
    differently have baselines of their own, with the keys of the first such run."""
    found: dict[tuple[str, ...], RunGroup] = {}
    for group in groups if not kind.key else ():
        for name, baseline in (group.first.report.test.baselines or {}).items():
            metrics = [baseline.metrics["chosen"][prefix + metric] for metric in kind.metrics]
            values = [number(metric.value) for metric in metrics]
            values[-1] += f" [{number(metrics[-1].low, 1)}, {number(metrics[-1].high, 1)}]"
            found.setdefault((f"Baseline: {name}{suffix}", *values), group)
    names = [name for name, *_ in found]
    rows = []
    for (name, *values), group in found.items():
        row = {"Method": name}
        if names.count(name) > 1:
            row |= {key: group.first.setting.get(key, NOTHING) for key in keys}
        heads = (f"{HEADS[metric]}, ours" for metric in kind.metrics)
        rows.append(row | dict(zip(heads, values, strict=True)))
    return rows


def _notes(
    kind: Kind, protocol: Protocol, groups: Sequence[RunGroup], left_out: Sequence[RunGroup]
) -> list[str]:
    """What is printed under a table: rule, data, meaning of the numbers, the paper's own rule."""
    first = groups[0].first.report
    trained = "one model per fold, on the other folds"
    if protocol.split != POOLED:
        trained = counts_line(first.counts["train"])
    lines = warnings(first.partial_message, protocol.synthetic, protocol.leaky)
    lines += [
        f"Ours: {Selection(protocol.selection).statement}",
        f"Split `{protocol.split}`. Training: {trained}. Test: {counts_line(first.test.counts)}.",
        "Percent; mean ± sd over n training seeds; in brackets the 95 % patient bootstrap interval "
        "of that mean.",
    ]
    if not protocol.leaky:
        lines.append(SELECTION_NOTE)
    if kind.n_cls == 2 and not protocol.leaky:
        lines.append(TAFILM_NOTE)
    if left_out:
        names = ", ".join(run.path.name for group in left_out for run in group.runs)
        lines.append(
            f"Left out (blocks frozen, or some layers conditioned only; see the other tables): "
            f"{names}."
        )
    return lines


# -------------------------------------------------------------------- formats


def to_markdown(table: Table) -> str:
    """Heading, table, notes."""
    rows = table.frame.to_numpy().tolist()
    lines = [f"### {table.title}", "", *markdown_table(list(table.frame), rows)]
    return "\n".join([*lines, *(f"> {note}  " for note in table.notes)]) + "\n"


_LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_", "{": r"\{",
    "}": r"\}", "$": r"\$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
    "–": "--", "≥": r"$\geq$", "`": "",
})  # fmt: skip


def to_latex(table: Table) -> str:
    """`table` environment in the style of booktabs; the notes are in the caption."""
    frame = table.frame.rename(columns=lambda name: name.translate(_LATEX))
    frame = frame.map(lambda text: text.translate(_LATEX))
    text = " ".join(f"{note.rstrip('.')}." for note in (table.title, *table.notes))
    caption_ = text.translate(_LATEX)
    return frame.style.hide(axis="index").to_latex(hrules=True, caption=caption_)


def to_csv(table: Table) -> str:
    """The rows, each with its protocol and data; notes as `#` lines above."""
    notes = "".join(f"# {line}\n" for line in (table.title, *table.notes))
    frame = table.frame.assign(**table.protocol._asdict())
    return notes + frame.to_csv(index=False, lineterminator="\n")


FORMATS: dict[str, Callable[[Table], str]] = {
    "markdown": to_markdown,
    "latex": to_latex,
    "csv": to_csv,
}


def render(tables: Sequence[Table], form: str) -> str:
    """All tables in one of `FORMATS`, an empty line between them."""
    return "\n".join(FORMATS[form](table) for table in tables)


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
    options = parser.parse_args(arguments)
    if not options.runs:
        raise UserError("no run folders given; name some, such as runs/*")
    tables = build_tables(read_runs(options.runs), [options.table] if options.table else USUAL)
    if not tables:
        raise UserError(
            f"the runs fill no table{f' {options.table}' if options.table else ''}; "
            "train more of them, or choose another --table"
        )
    print(render(tables, options.format), end="")


if __name__ == "__main__":
    sys.exit(main())
