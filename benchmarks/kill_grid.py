"""Kill the workers and controllers of a grid at random until it is finished, and look for damage.

    python -m benchmarks.kill_grid [--kills 20] [--seeds 8] [--workers 4] [--output FOLDER]

Three settings of dropout by --seeds cells of SoftFiLM's script run with `utils.runs.pool`, each as
a process with one thread. SIGKILL comes at random moments to a random cell at work or, every third
time or so, to the controller, whose cells then work on while a new controller starts. At the end
every cell must equal the same run made alone. Exit status 1 if anything is wrong.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import options, table
from benchmarks.kill_resume import CONFIGS, ROOT, execute, fingerprint
from data.synthetic.corpus import write_corpus
from utils.common.files import write_text
from utils.common.lock import owner_of
from utils.runs.cells import Grid, read_grid
from utils.runs.pool import run_tracked
from utils.tracking import replay

CONTEXT = get_context("forkserver")
JOURNAL = "journal.txt"  # lines: name of a run, what happened, process
GRID = """
scripts: {%s: %s}
configs: [%s]
grid: {models.ast_softfilm.dropout: [0.0, 0.1, 0.2]}
"""


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def cell(words: Sequence[str], log: str, journal: Path | None) -> None:
    """What a cell's process does: the script, and a line for each start, taking and release."""
    from utils.runs.run import Run

    def note(run: Run, what: str) -> None:
        lines = journal.read_text().split("\n") if journal.is_file() else []
        entered = {line.split()[2] for line in lines if line.startswith(f"{run.folder.path.name} ")}
        others = entered - {str(os.getpid())}
        if what == "taken" and any(alive(int(pid)) for pid in others - _ended(lines)):
            what = "OVERLAP"
        with journal.open("a") as file:
            file.write(f"{run.folder.path.name} {what} {os.getpid()}\n")

    enter, leave = Run.__enter__, Run.__exit__

    def watched_enter(run: Run) -> Run:
        finished = run.folder.finished
        enter(run)
        note(run, "RESTARTED" if finished else "taken")
        return run

    def watched_exit(run: Run, *error: Any) -> None:
        note(run, "left")
        leave(run, *error)

    if journal:
        Run.__enter__, Run.__exit__ = watched_enter, watched_exit
    execute(list(words[1:]), log, append=True)


def _ended(lines: Sequence[str]) -> set[str]:
    return {line.split()[2] for line in lines if " left " in line}


def _spawn(requests: Any, controllers: Any) -> None:
    """Forks cells for a controller, whose own threads would make that unsafe."""
    controllers.close()
    context, cells = get_context("fork"), {}
    with suppress(EOFError, ConnectionError):  # the controller was killed; its cells work on
        while True:
            request = requests.recv()
            if isinstance(request, int):
                requests.send(cells[request].exitcode)
            else:
                process = context.Process(target=cell, args=request)
                process.start()
                cells[process.pid] = process
                requests.send(process.pid)
    os._exit(0)


class Process:
    """A cell's process with the methods of Popen that a pool asks for."""

    def __init__(self, requests: Any, *request: Any):
        self.requests = requests
        self.pid = self._ask(request)

    def _ask(self, request: Any) -> int | None:
        self.requests.send(request)
        return self.requests.recv()

    def poll(self) -> int | None:
        return self._ask(self.pid)

    def wait(self) -> int:
        while (status := self.poll()) is None:
            time.sleep(0.05)
        return status

    def terminate(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)


def control(folder: Path, words: Sequence[str], workers: int) -> None:
    """What a controller's process does."""
    torch.set_num_threads(1)
    os.chdir(folder)
    requests, theirs = get_context("fork").Pipe()
    get_context("fork").Process(target=_spawn, args=(theirs, requests)).start()
    theirs.close()

    def start(words: Sequence[str], log: Path, _: Mapping[str, str]) -> Process:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.with_suffix(".json").unlink(missing_ok=True)
        return Process(requests, words, str(log), folder / JOURNAL)

    sys.stdout = sys.stderr = (folder / "controllers.log").open("a")
    grid = read_grid("kill.yaml", overrides=words)
    failed = run_tracked(grid, start, workers=workers)
    sys.stdout.flush()
    os._exit(1 if failed else 0)  # not waiting for the spawner


class Place:
    """A corpus, a grid file, and the words that make its cells tiny.

    Args:
        seeds: a third of the number of cells.
    """

    def __init__(self, folder: Path, seeds: int, *overrides: str):
        self.folder = folder
        shape = {"patients": 8, "recordings_per_patient": 2, "cycles_per_recording": 5}
        write_corpus(folder / "corpus", **shape)
        script = ROOT / "ast_film_soft.py"
        text = GRID % (script, *CONFIGS) + f"seeds: {list(range(seeds))}\n"
        (folder / "kill.yaml").write_text(text)
        self.words = [f"dataset.data_folder={folder / 'corpus'}", *overrides]
        self.words += [f"dataset.cache_dir={folder / 'cache'}", "mlflow.enabled=true"]
        self.words += [f"training.output_dir={folder / 'runs'}"]
        self.words += [f"mlflow.tracking_uri=sqlite:///{folder / 'mlflow.db'}"]
        self.grid = read_grid(folder / "kill.yaml", overrides=self.words)
        CONTEXT.set_forkserver_preload(
            ["benchmarks.kill_grid", "ast_film_soft", "utils.runs.run", "utils.figures.runs"]
        )

    def alone(self) -> dict[str, str]:
        """Every cell by itself, in a folder of its own; digests of all files."""
        for one in self.grid.cells:
            words = [w for w in one.arguments if not w.startswith(("training.output_dir", "mlfl"))]
            words = [*words[: words.index("--member-of")], "mlflow.enabled=false"]
            words += [f"training.output_dir={self.folder / 'alone'}"]
            words += ["--member-of", str(self.folder / "none")]
            process = CONTEXT.Process(
                target=cell, args=(words, str(self.folder / "alone.log"), None)
            )
            process.start()
            process.join()
            if process.exitcode:
                raise RuntimeError((self.folder / "alone.log").read_text()[-2000:])
        return fingerprint(self.folder / "alone")


def kill_and_count(place: Place, kills: int, workers: int, seed: int = 0) -> dict[str, Any]:
    """Run the grid to its end under `kills` kills; counts."""
    began, draw, counts = time.monotonic(), random.Random(seed), Counter()
    alone = place.alone()
    status = None
    while status != 0:
        controller = CONTEXT.Process(target=control, args=(place.folder, place.words, workers))
        controller.start()
        counts["controllers started"] += 1
        while controller.is_alive():
            controller.join(draw.uniform(0.3, 1.5))
            working = _at_work(place.grid)
            if counts["cells killed"] + counts["controllers killed"] >= kills or not working:
                continue
            if draw.random() < 0.3:
                controller.kill()
                counts["controllers killed"] += 1
            else:
                with suppress(ProcessLookupError):
                    os.kill(draw.choice(working), signal.SIGKILL)
                    counts["cells killed"] += 1
        controller.join()
        status = controller.exitcode
        if status not in (0, 1, -signal.SIGKILL):
            raise RuntimeError((place.folder / "controllers.log").read_text()[-3000:])
    found = fingerprint(place.folder / "runs")
    names = [one.folder.path.name for one in place.grid.cells]
    same = [
        all(found.get(f) == d for f, d in alone.items() if f.startswith(f"{name}/"))
        for name in names
    ]
    journal = (place.folder / JOURNAL).read_text()
    return {
        "cells": len(names),
        "workers": workers,
        "kills": counts["cells killed"] + counts["controllers killed"],
        **{key: counts[key] for key in ("cells killed", "controllers killed")},
        "controllers started": counts["controllers started"],
        "starts of cells": journal.count(" taken "),
        "finished": sum(one.folder.finished for one in place.grid.cells),
        "bit-equal to a run alone": sum(same),
        "finished cells started again": journal.count("RESTARTED"),
        "two owners at once": journal.count("OVERLAP"),
        **_tracked(place),
        "seconds": round(time.monotonic() - began),
    }


def _at_work(grid: Grid) -> list[int]:
    owners = [owner_of(one.folder.path) for one in grid.cells]
    return [owner["pid"] for owner in owners if owner and "pid" in owner]


def _tracked(place: Place) -> dict[str, int]:
    """How many runs MLflow has without and with a parent, once what was late has been sent."""
    from mlflow import MlflowClient

    for folder in (place.grid.folder, *(one.folder.path for one in place.grid.cells)):
        replay(folder)
    client = MlflowClient(f"sqlite:///{place.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("icbhi").experiment_id
    runs = client.search_runs([experiment], max_results=1000)
    parents = [run.info.run_id for run in runs if "mlflow.parentRunId" not in run.data.tags]
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") in parents]
    return {"MLflow parents": len(parents), "MLflow children": len(below)}


def sound(result: Mapping[str, Any]) -> bool:
    whole = ("finished", "bit-equal to a run alone", "MLflow children")
    return (
        all(result[name] == result["cells"] for name in whole)
        and not result["finished cells started again"]
        and not result["two owners at once"]
        and result["MLflow parents"] == 1
    )


def main() -> int:
    """Measure, print, and write the result where that is asked for."""
    args = options(__doc__, kills=20, seeds=8, workers=4, output="")
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), args.seeds)
        result = kill_and_count(place, args.kills, args.workers)
    command = f"python -m benchmarks.kill_grid --kills {args.kills} --workers {args.workers}"
    page = f"# A grid killed at random, {date.today()}\n\n`{command}`\n\n"
    page += table({key: {"": value} for key, value in result.items()}) + "\n"
    if args.output:
        write_text(Path(args.output, "kill_grid.md"), page)
    print(f"\n{page}\n{json.dumps(result)}")
    return 0 if sound(result) else 1


if __name__ == "__main__":
    sys.exit(main())
