"""Table of the runs of spectrograms.yaml.

    python -m experiments.spectrograms runs/* [--output FILE]

Runs are those of the grid (see spectrograms.yaml); a permutation test is shown where
`evaluate.py --checkpoint RUN/checkpoints/best.pt` was run on the test part.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from experiments.planted_effect import write_page
from models.registry import VARIANTS
from utils.common.cli import command
from utils.evaluation.finished_runs import RunGroup, group_runs, read_runs
from utils.evaluation.render import markdown_table, number, shown, with_interval
from utils.evaluation.report import Report, read_report

OUTPUT = Path(__file__).parent / "results" / "spectrograms.md"
RATES = {"sp": "Sp", "se": "Se", "score": "Score"}
ALWAYS_NORMAL = ["always normal", "–", "100.0", "0.0", "50.0", "50.0"]
SHOWN = ("shuffled", "all unknown", "device unknown", "site unknown", "duration unknown")


def performance(groups: Sequence[RunGroup]) -> list[str]:
    """Variants, metadata-only baselines and always normal, of runs of one task."""
    head = ["model", "runs", *RATES.values(), "collapsed Score", "sd over runs: Score"]
    head, rows = [*head, "macro AUROC"], []
    for group in groups:
        metrics = group.first.report.test.metrics["chosen"]
        cells = [with_interval(group.interval(key), 1) for key in RATES]
        collapsed, spread = "–", group.over_seeds("score")
        if "collapsed_score" in metrics:
            collapsed = with_interval(group.interval("collapsed_score"), 1)
        sd = number(spread.sd, 1)
        auroc = shown("auroc_macro", group.auroc) if group.auroc else "–"
        rows.append([group.title, str(spread.n), *cells, collapsed, sd, auroc])
    for name, baseline in (groups[0].first.report.test.baselines or {}).items():
        found = baseline.metrics["chosen"]
        cells = [with_interval(found[key], 1) for key in RATES]
        collapsed = found.get("collapsed_score")
        tail = [with_interval(collapsed, 1) if collapsed else "–", "–"]
        auroc = found.get("auroc_macro")
        rows.append([name, "1", *cells, *tail, shown("auroc_macro", auroc) if auroc else "–"])
    return markdown_table(head, [*rows, [*ALWAYS_NORMAL, "–", "0.500"]])


def permutation(groups: Sequence[RunGroup]) -> list[str]:
    """Score minus that with real metadata, of each run that was evaluated."""
    rows = []
    for group in groups:
        for run in group.runs:
            path = run.path / "evaluation" / "test" / "report.json"
            if not path.is_file():
                continue
            tested = {r["metadata"]: r for r in read_report(path, Report).metadata_test or []}
            if tested:
                cells = [with_interval(tested[name]["difference"], 1) for name in SHOWN]
                seed = f"seed {run.report.seed}"
                rows.append([group.title, seed, number(tested["real"]["score"], 1), *cells])
    return markdown_table(["model", "run", "real", *SHOWN], rows) if rows else []


def write_result(path: Path, lines: Sequence[str]) -> None:
    """Print the lines and write them, above the remarks that a person added to the file."""
    write_page(path, "\n".join(lines))
    print("\n".join(lines))


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Write the tables of both tasks."""
    parser = argparse.ArgumentParser(prog="python -m experiments.spectrograms", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished run folders")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE")
    options = parser.parse_args(arguments)
    lines = ["# Ready-made spectrograms of all ICBHI cycles", "", f"{date.today()}", ""]
    order = list(VARIANTS)
    for protocol, groups in group_runs(read_runs(options.runs)):
        groups = sorted(groups, key=lambda group: order.index(group.first.report.variant))
        for n_cls in (4, 2):
            of_task = [group for group in groups if group.n_cls == n_cls]
            if not of_task:
                continue
            text = f"{n_cls} classes, {protocol.split} split, selection `{protocol.selection}`"
            lines += [f"## {text}", "", *performance(of_task)]
            if tested := permutation(of_task):
                lines += ["Permutation test: Score minus that with real metadata.", "", *tested]
    write_result(options.output, lines)


if __name__ == "__main__":
    sys.exit(main())
