"""Grids of runs: lists of override sets over configurations, each cell one command of a script.

    python -m utils.runs.grid configs/ablations/freezing.yaml [--dry-run] \\
        [--seeds 5] [--config configs/demo.yaml] [--mlflow-config FILE] [key=value ...]

Cells run one after another, each in its own process; finished ones are skipped, so the same
command resumes after a kill. --dry-run prints the commands instead, one per line, each of which
can be given to a scheduler as it is. A failing cell does not stop the others. Seeds and folds of a
script are a grid as well (`utils.runs.group`).

    runs/ablation-<name>-<hash>/
        grid.json       cells and their commands
        logs/           what each cell printed
        table.md|tex|csv    the table of utils.evaluation.result_tables

Exit status: 0 done, 1 a cell failed, 2 something in the grid or a key is wrong, 75 stopped by
SIGTERM with the state of the running cell saved.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from utils.common.cli import EXIT_BUSY, EXIT_INTERRUPTED, EXIT_PREEMPTED, command
from utils.common.errors import Preempted, UserError
from utils.common.files import write_json, write_text
from utils.config.merge import merge, read_yaml
from utils.config.schema import RunConfig, flatten, load_config
from utils.evaluation.finished_runs import read_runs
from utils.evaluation.render import number
from utils.evaluation.result_tables import FORMATS, TABLES, USUAL, build_tables, render
from utils.metrics.protocol import caption, is_leaky
from utils.tracking import Tracker, start_tracking
from utils.training.checkpoint import git_revision
from utils.training.runfolder import RunFolder

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = {"markdown": "md", "latex": "tex", "csv": "csv"}


@dataclass
class GridFile:
    """What a grid file holds: every combination of a script, a further configuration (null: none;
    a file, keys and values, or a list of these) and of the keys' values is a cell."""

    scripts: dict[str, str] = field(default_factory=dict)  # script: its configuration
    configs: list[Any] = field(default_factory=lambda: [None])  # merged after it, one per cell
    # one script with one further configuration, in addition to the combinations: [script, its
    # configuration, further ...]
    systems: list[list[Any]] = field(default_factory=list)
    grid: dict[str, Any] = field(default_factory=dict)  # key: values
    overrides: dict[str, Any] = field(default_factory=dict)  # key: value, in every cell
    seeds: list[int] = field(default_factory=lambda: [0])
    table: str | None = None  # of result_tables; null: whichever the runs can fill

    @classmethod
    def read(cls, file: str | Path) -> GridFile:
        """Raises UserError: the file, a key or the kind of a value is wrong."""
        found = merge(OmegaConf.structured(cls), read_yaml(file), f"in {file}")
        content = cls(**OmegaConf.to_container(found))
        if not content.scripts and not content.systems:
            raise UserError(f"{file}: scripts is missing; name script: configuration")
        for key, values in content.grid.items():
            if not isinstance(values, list) or not values:
                raise UserError(f"{file}: grid.{key} must be a list of values")
        if any(len(system) < 2 for system in content.systems):
            raise UserError(f"{file}: each of systems must be [script, configuration, ...]")
        if content.table not in (None, *TABLES):
            names = ", ".join(TABLES)
            raise UserError(f"{file}: no table {content.table!r}; there are {names}")
        return content

    def rows(self) -> list[list[Any]]:
        """[script, configurations ...] of each combination, then `systems`."""
        further = [part if isinstance(part, list) else [part] for part in self.configs]
        pairs = itertools.product(self.scripts.items(), further)
        return [[*script, *parts] for script, parts in pairs] + self.systems


@dataclass(frozen=True)
class Cell:
    """One run of a grid: what it is called, its configuration, its command after `python`."""

    label: str
    config: RunConfig
    arguments: tuple[str, ...] = ()

    @property
    def folder(self) -> RunFolder:
        return RunFolder.of(self.config)

    def score(self) -> str:
        """Test Score of the finished run, in percent, with the marks that belong to it."""
        report = self.folder.read_report()
        value = number(report["test"]["metrics"]["chosen"]["score"]["value"])
        marks = report["selection"], report["partial"], report["synthetic"]
        marks += (is_leaky(report["split_strategy"]),)
        return caption(f"Score {value}", *marks)


@dataclass(frozen=True)
class Grid:
    """Cells in the order they run, and the folder of what they say together."""

    name: str
    folder: Path
    cells: tuple[Cell, ...]
    table: str | None = None

    def commands(self) -> list[str]:
        """Shell commands, one per cell."""
        return [shlex.join(["python", *cell.arguments]) for cell in self.cells]


def override_sets(axes: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the keys' values, the last key fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def digest(names: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:8]


def seeds_from(words: Sequence[int]) -> list[int]:
    """--seeds: one number n means 0..n-1, several mean just these.

    Raises:
        UserError: none, or a negative one.
    """
    seeds = list(range(words[0])) if len(words) == 1 else list(dict.fromkeys(words))
    if not seeds or min(seeds) < 0:
        raise UserError(f"--seeds {' '.join(map(str, words))}: give a count or seeds from 0")
    return seeds


# -------------------------------------------------------------------- grid files


def read_grid(
    file: str | Path,
    *,
    seeds: Sequence[int] | None = None,
    config_files: Sequence[str] = (),
    mlflow_file: str | None = None,
    overrides: Sequence[str] = (),
) -> Grid:
    """The cells of a grid file, every configuration checked.

    Args:
        file: YAML with the keys of `GridFile`.
        seeds: as the scripts' --seeds; None: those of the file.
        config_files: merged after each script's configuration.
        overrides: key=value words, in every cell.

    Raises:
        UserError: the file, a key or a value is wrong.
    """
    content = GridFile.read(file)
    fixed = [_word(key, value) for key, value in content.overrides.items()]
    for word in [*fixed, *overrides]:
        key = word.partition("=")[0]
        if key in content.grid or key == "training.seed":
            by = "--seeds" if key == "training.seed" else "the grid"
            raise UserError(f"{key} is set by {by}; leave {word} out")
    axes = content.grid | {"training.seed": content.seeds if seeds is None else seeds_from(seeds)}
    cells = []
    for (script, *parts), values in itertools.product(content.rows(), override_sets(axes)):
        own = [part for part in parts if isinstance(part, dict)]
        given = [_word(k, v) for part in own for k, v in flatten(part).items()]
        files = [_found(part) for part in parts if isinstance(part, str)] + list(config_files)
        *varied, seed = [_word(key, value) for key, value in values.items()]
        words = [*fixed, *given, *varied, *overrides, seed]
        shown = [re.sub(r"^[^=]*\.", "", word) for word in (*given, *varied, seed)]
        try:
            config = load_config(files, words, mlflow_file=mlflow_file)
        except UserError as error:
            raise UserError(f"{script} {' '.join(shown)}: {error}") from None
        arguments = [_found(script), "--config", *files, *words]
        arguments += ["--mlflow-config", mlflow_file] if mlflow_file else []
        cells.append(Cell(" ".join([config.title, *shown]), config, arguments))
    name = Path(file).stem
    folder = f"ablation-{name}-{digest([cell.folder.path.name for cell in cells])}"
    folder = Path(cells[0].config.training.output_dir) / folder
    member = ("--member-of", str(folder))
    cells = [Cell(c.label, c.config, (*c.arguments, *member)) for c in cells]
    title = f"ablation {name}: {len(cells)} runs"
    return Grid(title, folder, tuple(cells), content.table)


def _found(name: str) -> str:
    """A file of the repository as it is written from the current folder."""
    for path in (Path(name), ROOT / name):
        if path.is_file():
            return str(path)
    raise UserError(f"no file {name}, named in the grid")


def _text(value: Any) -> str:
    """A value as the command line takes it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n")[0].strip()


def _word(key: str, value: Any) -> str:
    return f"{key}={_text(value)}".replace(", ", ",")


# -------------------------------------------------------------------- running a grid


def run_grid(grid: Grid, start: Callable[[Cell, Path], int]) -> list[Cell]:
    """Run the unfinished cells one after another; returns those that failed.

    Args:
        start: runs a cell, appending what it prints to a log file; returns its exit status.

    Raises:
        Preempted: a cell was stopped by SIGTERM.
    """
    failed = []
    for position, cell in enumerate(grid.cells, start=1):
        head = f"[{position}/{len(grid.cells)}] {cell.label}"
        if cell.folder.finished:
            print(f"{head}: {cell.score()}, finished before", flush=True)
            continue
        log = grid.folder / "logs" / f"{cell.folder.path.name}.log"
        logger.info("%s: running, see %s", head, log)
        began = time.monotonic()
        status = start(cell, log)
        if status == EXIT_PREEMPTED:
            raise Preempted
        if status in (EXIT_INTERRUPTED, -signal.SIGINT):
            raise KeyboardInterrupt
        if status == EXIT_BUSY:
            print(f"{head}: another process is at work on it", flush=True)
        elif status == 0 and cell.folder.finished:
            minutes = (time.monotonic() - began) / 60
            print(f"{head}: {cell.score()}, {minutes:.1f} min", flush=True)
        else:
            print(f"{head}: FAILED with status {status}, see {log}", flush=True)
            logger.error("%s", _last_words(log))
            failed.append(cell)
    return failed


def start_process(cell: Cell, log: Path) -> int:
    """Run a cell in its own process; SIGTERM reaches it, so that it can save its state."""
    log.parent.mkdir(parents=True, exist_ok=True)
    process, came = None, False

    def pass_on(*_: Any) -> None:
        nonlocal came
        came = True
        if process is not None:
            process.terminate()

    previous = signal.signal(signal.SIGTERM, pass_on)
    try:
        with log.open("ab") as file:
            words = [sys.executable, *cell.arguments]
            process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        if came:  # before it could be passed on
            process.terminate()
        status = process.wait()
    finally:
        if process is not None:
            process.wait()  # an interrupt reaches the cell too: let it end by itself
        signal.signal(signal.SIGTERM, previous)
    return EXIT_PREEMPTED if came else status


def _last_words(log: Path) -> str:
    """The error at the end of a log: from the last "error:" or traceback on, at most ten lines."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    starts = [i for i, line in enumerate(lines) if re.match(r"error:|Traceback", line)]
    return "\n".join(lines[starts[-1] if starts else 0 :][-10:]) or f"{log} is empty"


def report_grid(grid: Grid) -> str:
    """Write the table in all formats; returns the Markdown, "" if the runs do not fill it."""
    done = [cell.folder.path for cell in grid.cells if cell.folder.finished]
    tables = build_tables(read_runs(done), [grid.table] if grid.table else USUAL)
    for form in FORMATS if tables else ():
        write_text(grid.folder / f"table.{SUFFIXES[form]}", render(tables, form))
    return render(tables, "markdown") if tables else ""


def run_tracked(grid: Grid, start: Callable[[Cell, Path], int] = start_process) -> list[Cell]:
    """`run_grid` with grid.json, the table and the MLflow run around it; returns failed cells."""
    cells = [
        {"label": cell.label, "run": cell.folder.path.name, "command": line}
        for cell, line in zip(grid.cells, grid.commands(), strict=True)
    ]
    content = {"name": grid.name, "table": grid.table, "cells": cells}
    write_json(grid.folder / "grid.json", content)
    tracker = start_parent(grid.cells[0].config, grid.folder, grid.name, ablation=grid.name)
    status = "FAILED"
    try:
        failed = run_grid(grid, start)
        status = "FAILED" if failed else "FINISHED"
        print(f"\n{report_grid(grid) or 'no table: too few finished cells'}")
        print(f"grid folder {grid.folder}")
        for path in (grid.folder / "grid.json", *sorted(grid.folder.glob("table.*"))):
            tracker.artifact(path)
    except (Preempted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        finish_tracking(tracker, status)
    return failed


def start_parent(config: RunConfig, folder: Path, name: str, **tags: str) -> Tracker:
    """Open the MLflow run that the runs of a grid's folder are nested below."""
    known = {"selection": config.training.selection, "run_folder": folder}
    known["git_revision"] = git_revision() or "unknown"
    return start_tracking(config.mlflow, folder, run_name=name, tags=known | tags)


def finish_tracking(tracker: Tracker, status: str) -> None:
    message = tracker.finish(status)
    if message:
        logger.warning("%s", message)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m utils.runs.grid", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("grid", metavar="GRID", help="such as configs/ablations/freezing.yaml")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="as for the scripts")
    parser.add_argument("--config", nargs="+", default=[], metavar="FILE", help="merged after each")
    parser.add_argument("--mlflow-config", metavar="FILE", help="as for the scripts")
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [w for w in given if "=" in w and not w.startswith("-") and not Path(w).is_file()]
    options = parser.parse_args([word for word in given if word not in words])
    files = {"config_files": options.config, "mlflow_file": options.mlflow_config}
    grid = read_grid(options.grid, seeds=options.seeds, overrides=words, **files)
    if options.dry_run:
        print("\n".join(grid.commands()))
        done = sum(cell.folder.finished for cell in grid.cells)
        print(f"{len(grid.cells)} cells, {done} of them finished", file=sys.stderr)
        return 0
    failed = run_tracked(grid)
    if failed:
        names = "; ".join(cell.label for cell in failed)
        logger.error("%d of %d cells failed: %s", len(failed), len(grid.cells), names)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
