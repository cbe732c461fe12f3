"""Search over configurations with Optuna (optional: pip install optuna), on validation patients.

    python -m utils.runs.search configs/searches/film.yaml --trials 20 [--workers 4] [--gpus 0,1] \\
        [--config FILE ...] [--mlflow-config FILE] [key=value ...]

A trial is a run that stops before the test half (--validate-only); its objective is the validation
Score that its epoch was chosen by. The best one is repeated with three other validation seeds,
which shows how optimistic the best of many Scores is, and then opens the test half: the only one
that does. Unpromising trials are ended by what metrics.csv says after each epoch. The same command
resumes after a kill, and helps when it is started on a second machine that sees the folder.

    runs/search-<name>-<hash>/
        study.db        Optuna's study
        logs/           what each trial printed
        trials.csv      number, state, validation Score, parameters
        report.md       the best trial: validation and test apart, and the optimism

Exit status: as of `utils.runs.grid`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.common.cli import EXIT_BUSY, EXIT_PREEMPTED, command
from utils.common.errors import Busy, Preempted, UserError
from utils.common.files import write_text
from utils.common.lock import held
from utils.runs.cells import word
from utils.runs.pool import POLL, finish_tracking, sigterm_reaches, start_parent
from utils.runs.processes import INTERRUPTED, keep_ending, last_words, start_process
from utils.runs.study import Study, Task

logger = logging.getLogger(__name__)

RERUNS = 3  # of the best trial, each with another validation seed
STARTS = 3  # of one trial by one command; more means that something always kills it


class Search(Study):
    """Runs a study to its end."""

    def run(self, workers: int = 1, gpus: Sequence[str] = ()) -> None:
        """Search, repeat the best trial, test it, report.

        Raises:
            UserError: no trial was completed.
        """
        self.open()
        try:
            with held(self.folder):  # keeps the MLflow run
                tracker = start_parent(self.base, self.folder, f"search {self.name}", search="yes")
                status = "FAILED"
                try:
                    self._trials(workers, gpus)
                    self._conclude(workers, gpus)
                    for name in ("report.md", "trials.csv"):
                        tracker.artifact(self.folder / name)
                    status = "FINISHED"
                except (Preempted, KeyboardInterrupt):
                    status = "KILLED"
                    raise
                finally:
                    finish_tracking(tracker, status)
        except Busy:
            logger.info("%s is kept by another process; this one helps", self.folder)
            self._trials(workers, gpus)

    def _trials(self, workers: int, gpus: Sequence[str]) -> None:
        starts: Counter[str] = Counter()

        def following(own: Sequence[Task]) -> Task | None:
            task = self.next(own)
            if task and task.score is None:
                starts[task.cell.folder.path.name] += 1
                if starts[task.cell.folder.path.name] > STARTS:
                    self.study.tell(task.trial, state=_state("FAIL"))
                    return None
            return task

        while self.unfinished():
            self._work(following, workers, gpus)
            time.sleep(POLL)

    def _work(self, following: Any, workers: int, gpus: Sequence[str]) -> None:
        """Start what `following` gives, some at a time, until it gives nothing more."""
        processes: list[Any] = []
        own: list[Task] = []
        free = list(range(workers))[::-1]
        with sigterm_reaches(processes) as stopped:
            while True:
                task = following(own) if free and not stopped() else None
                if task and task.score is not None and task.trial:
                    self._tell(task)  # trained already, by a process that was killed then
                    continue
                if task:
                    task.slot = free.pop()
                    self._start(task, gpus)
                    own.append(task)
                    processes.append(task.process)
                if stopped():
                    for process in processes:
                        process.terminate()
                    raise Preempted
                if not own:
                    return
                for one in list(own):
                    self._watch(one)
                    if one.process.poll() is not None:
                        own.remove(one)
                        processes.remove(one.process)
                        free.append(one.slot)
                        try:
                            self._end(one)
                        except (Preempted, KeyboardInterrupt):
                            for process in processes:
                                process.terminate()
                            raise
                if not task:
                    time.sleep(POLL)

    def _log(self, task: Task) -> Path:
        return self.folder / "logs" / f"{task.cell.folder.path.name}.log"

    def _start(self, task: Task, gpus: Sequence[str]) -> None:
        words = (*task.cell.arguments, "--member-of", str(self.folder), *task.words)
        gpu = {"CUDA_VISIBLE_DEVICES": gpus[task.slot % len(gpus)]} if gpus else {}
        logger.info("%s: running, see %s", task.title, self._log(task))
        task.process = start_process(words, self._log(task), gpu)

    def _watch(self, task: Task) -> None:
        """Tell Optuna of new epochs; end a trial that it gives up."""
        if task.trial is None or self.content.pruner == "none" or task.pruned:
            return
        for row in task.cell.folder.read_metrics()[task.epochs :]:
            task.trial.report(row["val_score"], int(row["epoch"]))
            task.epochs += 1
            if task.trial.should_prune():
                task.pruned = True
                task.process.terminate()
                return

    def _end(self, task: Task) -> None:
        status = task.process.poll()
        keep_ending(self._log(task), status)
        if task.score is not None or task.cell.folder.finished:
            if task.trial:
                self._tell(task)
            elif task.words:  # only the winner needs its training state again
                task.cell.folder.last.unlink(missing_ok=True)
        elif task.pruned:
            self.study.tell(task.trial, state=_state("PRUNED"))
            self._drop_state(task)
            print(f"{task.title}: pruned after {task.epochs} epochs", flush=True)
        elif status == EXIT_PREEMPTED:
            raise Preempted
        elif status in INTERRUPTED:
            raise KeyboardInterrupt
        elif status == EXIT_BUSY or status < 0:
            return  # another process's; or killed: the trial is still open and will be resumed
        elif task.trial is None:
            raise UserError(f"{task.title} failed, see {self._log(task)}")
        else:
            self.study.tell(task.trial, state=_state("FAIL"))
            print(f"{task.title}: FAILED, see {self._log(task)}", flush=True)
            logger.error("%s", "\n".join(last_words(self._log(task))))

    def _tell(self, task: Task) -> None:
        with suppress(ValueError):  # told meanwhile by another process
            self.study.tell(task.trial, task.score)
            print(f"{task.title}: validation Score {task.score:.2f}", flush=True)
        self._drop_state(task)

    def _drop_state(self, task: Task) -> None:
        """Only the best trial so far keeps its training state, from which its test continues."""
        with suppress(ValueError):  # no trial is complete
            if self.study.best_trial.number != task.trial.number:
                task.cell.folder.last.unlink(missing_ok=True)

    def _conclude(self, workers: int, gpus: Sequence[str]) -> None:
        best = self.best()
        seed = self.base.dataset.val_seed
        words = [w for w in best.cell.arguments if w.partition("=")[0] in self.content.space]
        others = [
            Task(self.cell([*words, f"dataset.val_seed={seed + n}"])) for n in range(1, RERUNS + 1)
        ]
        starts = Counter()
        for tasks in (others, [best]):  # the test half is opened last
            while todo := deque(t for t in tasks if not self._over(t)):
                starts["rounds"] += 1
                if starts["rounds"] > 2 * STARTS:
                    raise UserError(f"{todo[0].title} does not end, see {self._log(todo[0])}")
                self._work(lambda _, todo=todo: todo.popleft() if todo else None, workers, gpus)
        self._report(best, [task.score for task in others])

    @staticmethod
    def _over(task: Task) -> bool:
        return task.cell.folder.finished if not task.words else task.score is not None

    def _report(self, best: Task, others: Sequence[float]) -> None:
        study = self.study
        columns = ("number", "state", "value", "params")
        trials = study.trials_dataframe(attrs=columns)
        write_text(self.folder / "trials.csv", trials.to_csv(index=False))
        counts = Counter(trial.state.name.lower() for trial in study.trials)
        metrics = best.cell.folder.read_report()["test"]["metrics"]["chosen"]["score"]
        value = study.best_value
        optimism = value - statistics.fmean(others)
        spread = statistics.stdev(others)
        rows = [
            f"# Search {self.name}",
            ", ".join(f"{n} {state}" for state, n in counts.items()) + f" of {len(trials)} trials; "
            f"sampler {self.content.sampler}, pruner {self.content.pruner}.",
            "## Validation patients",
            f"Best trial, number {study.best_trial.number}: Score **{value:.2f}**, the highest of "
            f"{counts['complete']} and optimistic for that.",
            f"Repeated with {RERUNS} other validation seeds: "
            f"{', '.join(f'{score:.2f}' for score in others)} (mean "
            f"{statistics.fmean(others):.2f}, sd {spread:.2f}).",
            f"Optimism: **{optimism:+.2f}** points.",
            "## Test patients",
            f"Opened once, for the best trial only: Score **{best.cell.score().split()[1]}** "
            f"[{_percent(metrics['low'])}, {_percent(metrics['high'])}] (95 % over patients); "
            f"{best.cell.score().partition(' (')[2].rstrip(')')}.",
            "## Its keys",
            "\n".join(f"- `{word(k, _plain(v))}`" for k, v in study.best_params.items()),
            f"Run folder: `{best.cell.folder.path.name}`",
        ]
        write_text(self.folder / "report.md", "\n\n".join(rows) + "\n")
        print("\n" + "\n\n".join(rows))
        print(f"\nsearch folder {self.folder}")


def _plain(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.1f}"


def _state(name: str) -> Any:
    import optuna

    return optuna.trial.TrialState[name]


def _arguments(given: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser("python -m utils.runs.search", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("space", metavar="SPACE", help="such as configs/searches/film.yaml")
    parser.add_argument("--trials", type=int, required=True, metavar="N", help="in all")
    parser.add_argument("--workers", type=int, metavar="N", help="trials at a time; default 1")
    parser.add_argument("--gpus", default="", metavar="0,1", help="one for each worker, in turn")
    parser.add_argument("--config", nargs="+", default=[], metavar="FILE", help="merged after")
    parser.add_argument("--mlflow-config", metavar="FILE", help="as for the scripts")
    words = [w for w in given if "=" in w and not w.startswith("-") and not Path(w).is_file()]
    options = parser.parse_args([one for one in given if one not in words])
    if options.trials < 1:
        parser.error(f"--trials {options.trials}: give a number from 1")
    return options, words


@command
def main(arguments: Sequence[str] | None = None) -> int:
    options, words = _arguments(list(sys.argv[1:] if arguments is None else arguments))
    gpus = [name for name in options.gpus.split(",") if name]
    files = {"config_files": options.config, "mlflow_file": options.mlflow_config}
    search = Search(options.space, options.trials, overrides=words, **files)
    search.run(options.workers or max(len(gpus), 1), gpus)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
