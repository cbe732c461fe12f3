"""A grid over scripts, overrides and seeds: every cell is one command of a training script.

    python -m utils.runs.grid configs/ablations/freezing.yaml [--dry-run] \\
        [--seeds 5] [--config configs/demo.yaml] [--mlflow-config FILE] [key=value ...]

Cells run one after another, each as a process of its own; finished ones are skipped, so the same
command goes on after a kill. --dry-run prints the commands instead, one per line, each of which
can be given to a scheduler as it is. A failing cell is reported and the others go on.

    runs/ablation-<name>-<hash>/
        grid.json       cells and their commands
        logs/           what each cell printed
        table.md|tex|csv    the table of utils.evaluation.result_tables

Exit status: 0 done, 1 a cell failed, 2 something in the grid or a key is wrong, 75 stopped by
SIGTERM with the state of the running cell saved.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import itertools
import logging
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from models.registry import VARIANTS
from utils.common.cli import EXIT_INTERRUPTED, EXIT_PREEMPTED, command
from utils.common.errors import Preempted, UserError
from utils.common.files import write_json, write_text
from utils.config.schema import RunConfig, load_config
from utils.evaluation.finished_runs import read_runs
from utils.evaluation.render import number
from utils.evaluation.result_tables import TABLES, build_tables
from utils.evaluation.tables import FORMATS, render
from utils.metrics.protocol import Selection, caption
from utils.runs.group import seeds_from
from utils.tracking import Tracker, start_tracking
from utils.training.runfolder import RunFolder

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
KEYS = ("table", "scripts", "grid", "overrides", "seeds")
SUFFIXES = {"markdown": "md", "latex": "tex", "csv": "csv"}


@dataclass(frozen=True)
class Cell:
    """One run of a grid: what it is called, its command (without the interpreter), its result."""

    label: str
    arguments: tuple[str, ...]
    config: RunConfig

    @property
    def folder(self) -> RunFolder:
        return RunFolder.of(self.config)

    def score(self) -> str:
        """Test Score of the finished run, in percent, with the marks that belong to it."""
        report = self.folder.read_report()
        value = number(report["test"]["metrics"]["chosen"]["score"]["value"])
        marks = report["selection"], report["partial"], report["synthetic"]
        return caption(f"Score {value}", *marks)


@dataclass(frozen=True)
class Grid:
    """Cells in the order they run, and the folder of what they say together."""

    name: str
    table: str | None
    folder: Path
    cells: tuple[Cell, ...]

    def commands(self) -> list[str]:
        """Shell commands, one per cell."""
        return [shlex.join(["python", *cell.arguments]) for cell in self.cells]


# -------------------------------------------------------------------- from the file to the cells


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
        file: YAML with `scripts` (script: configuration), `grid` (key: values), and optionally
            `overrides` (key: value, in every cell), `seeds`, `table`.
        seeds: as the scripts' --seeds; None: those of the file.
        config_files: merged behind each script's configuration.
        overrides: key=value words, in every cell.

    Raises:
        UserError: the file, a key or a value is wrong.
    """
    content = _read(Path(file))
    varied = content.get("grid") or {}
    fixed = [_word(key, value) for key, value in (content.get("overrides") or {}).items()]
    for word in [*fixed, *overrides]:
        key = word.partition("=")[0]
        if key in varied or key == "training.seed":
            by = "--seeds" if key == "training.seed" else "the grid"
            raise UserError(f"{key} is set by {by}; leave {word} out")
    chosen = content.get("seeds", [0]) if seeds is None else seeds_from(seeds)
    combinations = list(itertools.product(*varied.values()))
    drafts = []
    for (script, config_file), values, seed in itertools.product(
        content["scripts"].items(), combinations, chosen
    ):
        files = [_found(config_file), *config_files]
        pairs = dict(zip(varied, values, strict=True))
        words = [_word(key, value) for key, value in pairs.items()]
        words = [*fixed, *words, *overrides, _word("training.seed", seed)]
        shown = [f"{key.rpartition('.')[2]}={_text(value)}" for key, value in pairs.items()]
        shown.append(f"seed={seed}")
        try:
            config = load_config(files, words, mlflow_file=mlflow_file)
        except UserError as error:
            raise UserError(f"{script} {' '.join(shown)}: {error}") from None
        label = " ".join([VARIANTS[config.variant].title, *shown])
        arguments = [_found(script), "--config", *files]
        arguments += ["--mlflow-config", mlflow_file] if mlflow_file else []
        drafts.append((label, arguments, words, config))
    folder = _folder(Path(file).stem, [config for *_, config in drafts])
    cells = tuple(
        Cell(label, (*arguments, "--member-of", str(folder), *words), config)
        for label, arguments, words, config in drafts
    )
    return Grid(Path(file).stem, content.get("table"), folder, cells)


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"no grid {file}; the shipped ones are in configs/ablations/")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not readable YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold the keys {', '.join(KEYS)}")
    for key in content:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(KEYS)}"
            raise UserError(f"{file}: unknown key {key}; {hint}")
    for key, kind in {"scripts": dict, "grid": dict, "overrides": dict, "seeds": list}.items():
        if key in content and not isinstance(content[key], kind):
            raise UserError(f"{file}: {key} must be a {'list' if kind is list else 'section'}")
    if not content.get("scripts"):
        raise UserError(f"{file}: scripts is missing; name script: configuration")
    for key, values in (content.get("grid") or {}).items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{file}: grid.{key} must be a list of values")
    if content.get("table", next(iter(TABLES))) not in TABLES:
        raise UserError(f"{file}: no table {content['table']!r}; there are {', '.join(TABLES)}")
    return content


def _found(name: str) -> str:
    """A file of the repository as it is written from the current folder."""
    if Path(name).is_file():
        return name
    if (ROOT / name).is_file():
        return str(ROOT / name)
    raise UserError(f"no file {name}, named in the grid")


def _text(value: Any) -> str:
    """A value as the command line takes it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n")[0].strip()


def _word(key: str, value: Any) -> str:
    return f"{key}={_text(value)}".replace(", ", ",")


def _folder(name: str, configs: Sequence[RunConfig]) -> Path:
    runs = "\n".join(RunFolder.of(config).path.name for config in configs)
    digest = hashlib.sha256(runs.encode()).hexdigest()[:8]
    return Path(configs[0].training.output_dir) / f"ablation-{name}-{digest}"


# -------------------------------------------------------------------- running them


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
        minutes = (time.monotonic() - began) / 60
        if status == 0 and cell.folder.finished:
            print(f"{head}: {cell.score()}, {minutes:.1f} min", flush=True)
        else:
            print(f"{head}: FAILED with status {status}, see {log}", flush=True)
            logger.error("%s", _last_words(log))
            failed.append(cell)
    return failed


def start_process(cell: Cell, log: Path) -> int:
    """Run a cell as a process of its own; SIGTERM reaches it, so that it can save its state."""
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, *cell.arguments]
    with log.open("ab") as file, _held_sigterm() as held:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        try:
            held.pass_on = process.terminate
            if held.came:  # before it could be passed on
                process.terminate()
            status = process.wait()
        finally:
            if process.poll() is None:
                process.wait()  # an interrupt reaches the cell too: let it end by itself
    return EXIT_PREEMPTED if held.came else status


class _Held:
    """A SIGTERM that came, and where to pass it on."""

    came = False
    pass_on: Callable[[], None] | None = None

    def __call__(self, *_: Any) -> None:
        self.came = True
        if self.pass_on is not None:
            self.pass_on()


@contextmanager
def _held_sigterm() -> Iterator[_Held]:
    held = _Held()
    previous = signal.signal(signal.SIGTERM, held)
    try:
        yield held
    finally:
        signal.signal(signal.SIGTERM, previous)


def _last_words(log: Path) -> str:
    """The error at the end of a log: from the last "error:" or traceback on, at most ten lines."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    starts = [i for i, line in enumerate(lines) if re.match(r"error:|Traceback", line)]
    return "\n".join(lines[starts[-1] if starts else 0 :][-10:]) or f"{log} is empty"


def write_tables(grid: Grid) -> str:
    """The grid's table in all formats; returns the Markdown, "" when the runs do not fill it."""
    done = [cell.folder.path for cell in grid.cells if cell.folder.finished]
    tables = build_tables(read_runs(done), [grid.table] if grid.table else [*TABLES])
    for form in FORMATS if tables else ():
        write_text(grid.folder / f"table.{SUFFIXES[form]}", render(tables, form))
    return render(tables, "markdown") if tables else ""


def open_tracking(grid: Grid) -> Tracker:
    """The MLflow run that the cells are nested below."""
    config = grid.cells[0].config
    selection = config.training.selection
    tags = {"ablation": grid.name, "selection": selection, "run_folder": grid.folder}
    name = f"ablation {grid.name}: {len(grid.cells)} runs"
    return start_tracking(config.mlflow, grid.folder, run_name=name, tags=tags)


def run_tracked(grid: Grid, start: Callable[[Cell, Path], int] = start_process) -> list[Cell]:
    """`run_grid` with grid.json, the table and the MLflow run around it; returns failed cells."""
    cells = [
        {"label": cell.label, "run": cell.folder.path.name, "command": line}
        for cell, line in zip(grid.cells, grid.commands(), strict=True)
    ]
    content = {"name": grid.name, "table": grid.table, "cells": cells}
    write_json(grid.folder / "grid.json", content)
    tracker = open_tracking(grid)
    status = "FAILED"
    try:
        failed = run_grid(grid, start)
        status = "FAILED" if failed else "FINISHED"
        text = write_tables(grid)
        rules = {Selection(cell.config.training.selection).label for cell in grid.cells}
        print(f"\n{text}" if text else f"\nno table: too few finished cells ({'; '.join(rules)})")
        print(f"grid folder {grid.folder}")
        for path in (grid.folder / "grid.json", *sorted(grid.folder.glob("table.*"))):
            tracker.artifact(path)
    except (Preempted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        message = tracker.finish(status)
        if message:
            logger.warning("%s", message)
    return failed


# -------------------------------------------------------------------- the command


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `overrides` are the key=value words, which may stand anywhere."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.runs.grid",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("grid", metavar="GRID", help="such as configs/ablations/freezing.yaml")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="as for the scripts")
    parser.add_argument(
        "--config", nargs="+", default=[], metavar="FILE", help="merged behind each configuration"
    )
    parser.add_argument("--mlflow-config", metavar="FILE", help="as for the scripts")
    given = list(sys.argv[1:] if arguments is None else arguments)
    overrides = [w for w in given if "=" in w and not w.startswith("-") and not Path(w).is_file()]
    options = parser.parse_args([word for word in given if word not in overrides])
    options.overrides = overrides
    return options


@command
def main() -> None:
    options = parse()
    grid = read_grid(
        options.grid,
        seeds=options.seeds,
        config_files=options.config,
        mlflow_file=options.mlflow_config,
        overrides=options.overrides,
    )
    if options.dry_run:
        print("\n".join(grid.commands()))
        done = sum(cell.folder.finished for cell in grid.cells)
        logger.info("%d cells, %d of them finished", len(grid.cells), done)
        return
    failed = run_tracked(grid)
    if failed:
        names = "; ".join(cell.label for cell in failed)
        logger.error("%d of %d cells failed: %s", len(failed), len(grid.cells), names)
        raise SystemExit(1)


if __name__ == "__main__":
    raise SystemExit(main())
