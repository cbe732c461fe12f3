"""Running the cells of a grid on this machine: some at a time, each in its own process.

The claim on a cell is the lock of its run folder (`utils.common.lock`), which the cell's process
takes: any number of these pools, on any number of machines that share the folders, work on one
grid. Whoever holds the lock of the grid's folder writes its table and keeps its MLflow run.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.common.cli import EXIT_BUSY, EXIT_PREEMPTED
from utils.common.errors import Busy, Preempted
from utils.common.files import write_json, write_text
from utils.common.lock import held
from utils.config.schema import RunConfig
from utils.evaluation.finished_runs import read_runs
from utils.evaluation.result_tables import FORMATS, USUAL, build_tables, render
from utils.runs.cells import Cell, Grid
from utils.runs.processes import (
    INTERRUPTED,
    described,
    keep_ending,
    last_words,
    start_process,
)
from utils.runs.states import state_of
from utils.tracking import Tracker, start_tracking
from utils.training.checkpoint import git_revision

logger = logging.getLogger(__name__)

SUFFIXES = {"markdown": "md", "latex": "tex", "csv": "csv"}
POLL, LOOK = 0.2, 2.0  # s between looks at the own processes, and at cells of others

#: (words after `python`, log, environment) -> what has `poll`, `terminate` and `wait`, as Popen.
Start = Callable[[Sequence[str], Path, Mapping[str, str]], Any]


@contextmanager
def sigterm_reaches(processes: list[Any]) -> Iterator[Callable[[], bool]]:
    """Context in which SIGTERM reaches all of `processes`, and which ends with them.

    Yields:
        Whether it came; ask after a process was added.
    """
    came = False

    def pass_on(*_: Any) -> None:
        nonlocal came
        came = True
        for process in processes:
            process.terminate()

    previous = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield lambda: came
    finally:
        for process in processes:
            process.wait()  # an interrupt reaches them, too: let them save their state
        signal.signal(signal.SIGTERM, previous)


@dataclass
class Job:
    """A cell at work: its process, where, since when."""

    number: int
    process: Any
    slot: int
    began: float = field(default_factory=time.monotonic)


class Pool:
    """Runs the unfinished cells of a grid; `failed` are those that did not end well.

    Args:
        start: starts a cell.
        workers: cells at a time.
        gpus: CUDA devices; each worker sees one of them, in turn.
    """

    def __init__(
        self, grid: Grid, start: Start = start_process, workers: int = 1, gpus: Sequence[str] = ()
    ):
        self.grid, self.start, self.gpus = grid, start, list(gpus)
        self.free = list(range(workers))[::-1]
        self.threads = str(max((os.cpu_count() or 1) // workers, 1)) if workers > 1 else None
        self.queue = deque(range(len(grid.cells)))
        self.elsewhere: list[int] = []  # cells of other processes
        self.seen_elsewhere: set[int] = set()
        self.jobs: list[Job] = []
        self.failed: list[Cell] = []
        self.since = time.time()

    def run(self) -> list[Cell]:
        """Work until every cell has ended, here or elsewhere; returns those that failed.

        Raises:
            Preempted: this process or a cell was stopped by SIGTERM.
            KeyboardInterrupt: a cell was interrupted.
        """
        processes: list[Any] = []
        looked = time.monotonic()
        with sigterm_reaches(processes) as stopped:
            while self.queue or self.jobs or self.elsewhere:
                while self.free and self.queue and not stopped():
                    self._begin(self.queue.popleft())
                    processes[:] = [job.process for job in self.jobs]
                if stopped():
                    for process in processes:  # one that was started just then
                        process.terminate()
                    raise Preempted
                ended = [job for job in self.jobs if job.process.poll() is not None]
                for job in ended:
                    self.jobs.remove(job)
                    processes.remove(job.process)
                    self.free.append(job.slot)
                try:
                    for job in ended:
                        self._end(job)
                except (Preempted, KeyboardInterrupt):
                    for process in processes:
                        process.terminate()
                    raise
                if self.elsewhere and self.free and time.monotonic() - looked > LOOK:
                    looked = time.monotonic()
                    self.queue.extend(self.elsewhere)
                    self.elsewhere.clear()
                elif not ended and (self.jobs or self.elsewhere):
                    time.sleep(POLL)
        return self.failed

    def _say(self, number: int, text: str) -> None:
        cell = self.grid.cells[number]
        print(f"[{number + 1}/{len(self.grid.cells)}] {cell.label}: {text}", flush=True)

    def _begin(self, number: int) -> None:
        """Start a cell, unless it needs no start (any more) or is another process's."""
        cell = self.grid.cells[number]
        state = state_of(self.grid, cell)
        if state.name == "finished":
            self._say(number, f"{state.detail}, finished before")
        elif state.name == "running":
            self._leave(number, state.detail)
        elif state.name == "failed" and state.time > self.since:
            self._say(number, f"FAILED elsewhere, {state.detail}")
            self.failed.append(cell)
        else:
            slot, log = self.free.pop(), self.grid.log(cell)
            logger.info("%s: running, see %s", cell.label, log)
            environment = {}
            if self.gpus:
                environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
            if self.threads and "OMP_NUM_THREADS" not in os.environ:
                environment["OMP_NUM_THREADS"] = self.threads
            self.jobs.append(Job(number, self.start(cell.arguments, log, environment), slot))

    def _leave(self, number: int, who: str) -> None:
        """Another process is at work on a cell: look again later."""
        if number not in self.seen_elsewhere:
            self._say(number, f"another process is at work on it ({who})")
            self.seen_elsewhere.add(number)
        self.elsewhere.append(number)

    def _end(self, job: Job) -> None:
        """Note how a cell ended."""
        cell, status = self.grid.cells[job.number], job.process.poll()
        log = self.grid.log(cell)
        if status == 0 and not cell.folder.finished:
            status = 1
        keep_ending(log, status)
        if status == EXIT_PREEMPTED:
            raise Preempted
        if status in INTERRUPTED:
            raise KeyboardInterrupt
        if status == EXIT_BUSY:
            self._leave(job.number, "it was faster")
        elif status == 0:
            minutes = (time.monotonic() - job.began) / 60
            self._say(job.number, f"{cell.score()}, {minutes:.1f} min")
        else:
            self._say(job.number, f"FAILED with {described(status)}, see {log}")
            logger.error("%s", "\n".join(last_words(log)))
            self.failed.append(cell)


def report_grid(grid: Grid) -> str:
    """Write the table in all formats; returns the Markdown, "" if the runs do not fill it."""
    done = [cell.folder.path for cell in grid.cells if cell.folder.finished]
    tables = build_tables(read_runs(done), [grid.table] if grid.table else USUAL)
    for form in FORMATS if tables else ():
        write_text(grid.folder / f"table.{SUFFIXES[form]}", render(tables, form))
    return render(tables, "markdown") if tables else ""


@contextmanager
def kept(grid: Grid) -> Iterator[Tracker | None]:
    """Context in which this process keeps the grid's folder and MLflow run; None: another does."""
    with ExitStack() as stack:
        try:
            stack.enter_context(held(grid.folder))
        except Busy:
            yield None
            return
        cells = [
            {"label": cell.label, "run": cell.folder.path.name, "command": line}
            for cell, line in zip(grid.cells, grid.commands(), strict=True)
        ]
        content = {"name": grid.name, "table": grid.table, "cells": cells}
        write_json(grid.folder / "grid.json", content)
        yield start_parent(grid.cells[0].config, grid.folder, grid.name, ablation=grid.name)


def run_tracked(grid: Grid, start: Start = start_process, **workers: Any) -> list[Cell]:
    """Run a grid with grid.json, the table and the MLflow run around it; returns failed cells.

    Args:
        workers: as for `Pool`.
    """
    with kept(grid) as tracker:
        status = "FAILED"
        try:
            failed = Pool(grid, start, **workers).run()
            status = "FAILED" if failed else "FINISHED"
            if tracker:
                finish_report(grid, tracker)
        except (Preempted, KeyboardInterrupt):
            status = "KILLED"
            raise
        finally:
            if tracker:
                finish_tracking(tracker, status)
    if tracker is None:
        conclude(grid)
    return failed


def conclude(grid: Grid) -> bool:
    """Print and track the table of a grid, unless another process does; ends the MLflow run unless
    cells are still to come. Returns whether it did."""
    with kept(grid) as tracker:
        if tracker is None:
            logger.warning("%s is kept by another process, which will write its table", grid.folder)
            return False
        finish_report(grid, tracker)
        names = {state_of(grid, cell).name for cell in grid.cells}
        ended = "FINISHED" if names == {"finished"} else "FAILED"
        finish_tracking(tracker, ended if names <= {"finished", "failed"} else None)
    return True


def finish_report(grid: Grid, tracker: Tracker) -> None:
    print(f"\n{report_grid(grid) or 'no table: too few finished cells'}")
    print(f"grid folder {grid.folder}")
    for path in (grid.folder / "grid.json", *sorted(grid.folder.glob("table.*"))):
        tracker.artifact(path)


def start_parent(config: RunConfig, folder: Path, name: str, **tags: str) -> Tracker:
    """Open the MLflow run that the runs of a grid's folder are nested below."""
    known = {"selection": config.training.selection, "run_folder": folder}
    known["git_revision"] = git_revision() or "unknown"
    return start_tracking(config.mlflow, folder, run_name=name, tags=known | tags)


def finish_tracking(tracker: Tracker, status: str | None) -> None:
    message = tracker.finish(status)
    if message:
        logger.warning("%s", message)
