"""Grids of runs: lists of override sets over configurations, each cell one command of a script.

    python -m utils.runs.grid [run] configs/ablations/freezing.yaml [--workers 4] [--gpus 0,1] \\
        [--seeds 5] [--config configs/demo.yaml] [--mlflow-config FILE] [key=value ...]
    python -m utils.runs.grid list   GRID.yaml ...    state, expected time and memory of each cell
    python -m utils.runs.grid status GRID.yaml ...    state, owner, Score or last line of each cell
    python -m utils.runs.grid report GRID.yaml ...    the table of the finished cells

Each cell runs in its own process; finished ones are skipped, so the same command resumes after a
kill, and the same command on a second machine that sees the folders helps with the rest. A failing
cell does not stop the others. --dry-run prints the commands, one per line. Seeds and folds of a
script are a grid as well (`utils.runs.group`); docs/sweeps.md shows all of it.

    runs/ablation-<name>-<hash>/
        grid.json       cells and their commands
        logs/           what each cell printed, and how it ended
        jobs/           of a batch system
        table.md|tex|csv    the table of utils.evaluation.result_tables

Exit status: 0 done, 1 a cell failed, 2 something in the grid or a key is wrong, 75 stopped by
SIGTERM with the state of the running cells saved.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.common.cli import command
from utils.runs.cells import Grid, read_grid
from utils.runs.pool import conclude, run_tracked
from utils.runs.states import show_list, show_states

logger = logging.getLogger(__name__)

ACTIONS = ("run", "list", "status", "report")


def parse_arguments(given: Sequence[str]) -> argparse.Namespace:
    """The command line; `action` is the first word if it is one, `overrides` are key=value."""
    parser = argparse.ArgumentParser("python -m utils.runs.grid", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("grid", metavar="GRID", help="such as configs/ablations/freezing.yaml")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="as for the scripts")
    parser.add_argument("--config", nargs="+", default=[], metavar="FILE", help="merged after each")
    parser.add_argument("--mlflow-config", metavar="FILE", help="as for the scripts")
    parser.add_argument("--workers", type=int, metavar="N", help="cells at a time; default 1")
    parser.add_argument("--gpus", default="", metavar="0,1", help="one for each worker, in turn")
    words = list(given)
    action = words.pop(0) if words and words[0] in ACTIONS else "run"
    overrides = [w for w in words if "=" in w and not w.startswith("-") and not Path(w).is_file()]
    options = parser.parse_args([word for word in words if word not in overrides])
    options.action, options.overrides = action, overrides
    options.gpus = [name for name in options.gpus.split(",") if name]
    options.workers = options.workers or max(len(options.gpus), 1)
    if options.workers < 1:
        parser.error(f"--workers {options.workers}: give the number of cells at a time, from 1")
    return options


@command
def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    files = {"config_files": options.config, "mlflow_file": options.mlflow_config}
    grid = read_grid(options.grid, seeds=options.seeds, overrides=options.overrides, **files)
    if options.dry_run:
        print("\n".join(grid.commands()))
        done = sum(cell.folder.finished for cell in grid.cells)
        print(f"{len(grid.cells)} cells, {done} of them finished", file=sys.stderr)
        return 0
    if options.action == "list":
        print(show_list(grid, options.workers))
    elif options.action == "status":
        print(show_states(grid))
    elif options.action == "report":
        conclude(grid)
    else:
        return run(grid, options)
    return 0


def run(grid: Grid, options: argparse.Namespace) -> int:
    """Run the cells; exit status."""
    failed = run_tracked(grid, workers=options.workers, gpus=options.gpus)
    if failed:
        names = "; ".join(cell.label for cell in failed)
        logger.error("%d of %d cells failed: %s", len(failed), len(grid.cells), names)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
