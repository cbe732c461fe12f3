"""Grids of runs: lists of override sets over configurations, each cell one command of a script.

    python -m utils.runs.grid [run] configs/ablations/freezing.yaml [--workers 4] [--gpus 0,1] \\
        [--seeds 5] [--config configs/demo.yaml] [--mlflow-config FILE] [key=value ...]
    python -m utils.runs.grid run GRID.yaml --launcher slurm --slurm.time 12:00:00 \\
        [--slurm.partition NAME] [--slurm.gres gpu:1] [--array-parallelism 16] ...
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
import itertools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.common.cli import command
from utils.runs.cells import Grid, read_grid
from utils.runs.pool import conclude, finish_tracking, kept, run_tracked
from utils.runs.slurm import queued, submit
from utils.runs.states import show_list, show_states, state_of

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
    parser.add_argument("--launcher", choices=("slurm", "local"), help="as jobs, by submitit")
    parser.add_argument("--array-parallelism", type=int, default=256, metavar="N", help="of jobs")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="on a job's node")
    words = list(given)
    action = words.pop(0) if words and words[0] in ACTIONS else "run"
    overrides = [w for w in words if "=" in w and not w.startswith("-") and not Path(w).is_file()]
    options, rest = parser.parse_known_args([word for word in words if word not in overrides])
    options.slurm = _slurm(parser, rest)
    options.action, options.overrides = action, overrides
    options.gpus = [name for name in options.gpus.split(",") if name]
    options.workers = options.workers or max(len(options.gpus), 1)
    if options.workers < 1:
        parser.error(f"--workers {options.workers}: give the number of cells at a time, from 1")
    return options


def _slurm(parser: argparse.ArgumentParser, rest: Sequence[str]) -> dict[str, str]:
    """--slurm.KEY VALUE or --slurm.KEY=VALUE -> {KEY: VALUE}."""
    words = iter(word for text in rest for word in text.split("=", 1))
    pairs = dict(itertools.zip_longest(words, words))
    for key, value in pairs.items():
        if not key.startswith("--slurm.") or value is None:
            parser.error(f"{key} is not known, or its value is missing")
    return {key.removeprefix("--slurm.").replace("-", "_"): v for key, v in pairs.items()}


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
        print(show_states(grid, queued(grid)))
    elif options.action == "report":
        conclude(grid)
    else:
        return run(grid, options)
    return 0


def run(grid: Grid, options: argparse.Namespace) -> int:
    """Run the cells here, or submit them; exit status."""
    if options.launcher:
        return launch(grid, options)
    failed = run_tracked(grid, workers=options.workers, gpus=options.gpus)
    if failed:
        names = "; ".join(cell.label for cell in failed)
        logger.error("%d of %d cells failed: %s", len(failed), len(grid.cells), names)
    return 1 if failed else 0


def launch(grid: Grid, options: argparse.Namespace) -> int:
    """Submit the cells that are not finished, at work or in the queue already."""
    waiting = queued(grid)
    cells = [
        cell
        for cell in grid.cells
        if cell.folder.path.name not in waiting
        and state_of(grid, cell).name not in ("finished", "running")
    ]
    if cells:
        with kept(grid) as tracker:
            parameters = {"parallelism": options.array_parallelism, "processes": options.processes}
            jobs = submit(grid, cells, options.launcher, options.slurm, **parameters)
            if tracker:
                finish_tracking(tracker, None)
        print(f"jobs {', '.join(jobs)}; their logs are in {grid.folder}")
    print(f"{len(cells)} of {len(grid.cells)} cells submitted; see status, then report")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
