"""The cells of a grid as one job array of Slurm, through submitit (optional: pip install submitit).

A job that is told to go saves its state and is queued again: on SIGUSR2, which Slurm sends before
the time limit; on SIGUSR1; and on SIGTERM while the job still counts as running. A job that was
cancelled, or that Slurm itself puts back, only saves. --launcher local makes the same jobs
processes of this machine, which queue themselves in the same way.

    runs/ablation-<name>-<hash>/jobs/
        jobs.json       run -> job
        <job>_*         what submitit keeps of each job
"""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.common.cli import EXIT_BUSY, EXIT_PREEMPTED
from utils.common.errors import UserError
from utils.common.files import write_json
from utils.runs.processes import keep_ending, start_process

if TYPE_CHECKING:
    from utils.runs.cells import Grid

TIMEOUTS = 1000  # how often a job may reach its time limit and be queued again
PORT = 29500  # of the first node, plus the job's last three digits: several jobs may share a node


class CellJob:
    """What a job does: one cell, on every node of the job if it has several.

    Args:
        words: the cell's command after `python`.
        log: what it prints.
        processes: of torchrun on each node.
    """

    def __init__(self, words: Sequence[str], log: str, processes: int = 1):
        self.words, self.log, self.processes = list(words), log, processes

    def __call__(self) -> int:
        import submitit

        environment = submitit.JobEnvironment()
        requeue = signal.getsignal(environment._usr_sig())  # saves by `checkpoint`, queues again

        told: list[int] = []
        users = (signal.SIGUSR1, environment._usr_sig())
        log = Path(self.log)
        if environment.node:
            log = log.with_suffix(f".node{environment.node}.log")
        for one in users:  # Slurm sends them to every process, and the cell inherits this
            signal.signal(one, signal.SIG_IGN)
        process = start_process(self._command(environment), log)
        for one in (signal.SIGTERM, *users):
            signal.signal(one, lambda number, _: told.append(number))
        while process.poll() is None and not told:
            time.sleep(0.2)  # and no `wait`: a signal's handler may not interrupt it
        if told:
            process.terminate()
            keep_ending(log, process.wait() and EXIT_PREEMPTED)
            job, on_slurm = environment.raw_job_id, environment.cluster == "slurm"
            if told[0] == environment._usr_sig() or not on_slurm or job in job_states([job]):
                requeue(told[0], None)
            sys.exit(EXIT_PREEMPTED)
        status = process.wait()
        keep_ending(log, status)
        if status not in (0, EXIT_BUSY):
            raise RuntimeError(f"the cell ended with status {status}; see {log}")
        return status

    def _command(self, environment: Any) -> list[str]:
        nodes = environment.num_nodes
        if nodes * self.processes == 1:
            return self.words
        port = PORT + int(environment.raw_job_id) % 1000
        launch = ["-m", "torch.distributed.run", f"--nnodes={nodes}"]
        launch += [f"--nproc-per-node={self.processes}", f"--node-rank={environment.node}"]
        launch += [f"--master-addr={environment.hostnames[0]}", f"--master-port={port}"]
        return [*launch, *self.words]

    def checkpoint(self) -> Any:
        """What is to be queued again; the cell has saved its state."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def submit(
    grid: Grid,
    cells: Sequence[Any],
    launcher: str,
    parameters: dict[str, str],
    *,
    parallelism: int = 256,
    processes: int = 1,
) -> list[str]:
    """Submit cells as one array; returns their jobs.

    Args:
        launcher: slurm, or local: processes of this machine.
        parameters: of sbatch, such as partition, gres, time, nodes.
        parallelism: jobs of the array at a time.
        processes: of torchrun on each node; 1 on one node runs without it.

    Raises:
        UserError: submitit or Slurm is missing, or a parameter is refused.
    """
    if importlib.util.find_spec("submitit") is None:
        raise UserError("--launcher needs submitit; run pip install submitit")
    import submitit

    folder = grid.folder / "jobs"
    minutes = _minutes(parameters.get("time", "")) if launcher == "slurm" else 60 * 24
    given = {f"slurm_{k}": _number(v) for k, v in parameters.items() if k != "time"}
    given |= {"slurm_array_parallelism": parallelism, "slurm_job_name": grid.folder.name}
    given |= {"slurm_additional_parameters": {"requeue": True}, "slurm_ntasks_per_node": 1}
    given["timeout_min"] = minutes
    try:
        executor = submitit.AutoExecutor(folder, cluster=launcher, slurm_max_num_timeout=TIMEOUTS)
        executor.update_parameters(**given)
        work = [CellJob(c.arguments, str(grid.log(c)), processes) for c in cells]
        with executor.batch():
            jobs = [executor.submit(one) for one in work]
    except (RuntimeError, ValueError, NameError, TypeError, OSError, AssertionError) as error:
        raise UserError(f"the jobs cannot be submitted: {error}") from None
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"sbatch refuses the jobs: {error}") from None
    names = {c.folder.path.name: job.job_id for c, job in zip(cells, jobs, strict=True)}
    write_json(folder / "jobs.json", {"launcher": launcher, "jobs": jobs_of(grid) | names})
    return list(names.values())


def jobs_of(grid: Grid) -> dict[str, str]:
    """Run -> job that was submitted for it last."""
    return _kept(grid).get("jobs", {})


def queued(grid: Grid) -> dict[str, str]:
    """Run -> job and its state, such as "12_3 PENDING", of the jobs in the queue."""
    kept = _kept(grid)
    jobs = kept.get("jobs", {})
    if kept.get("launcher") == "local":
        states = {job: "RUNNING" for job in jobs.values() if _lives(job)}
    else:
        states = job_states(list(jobs.values())) if jobs else {}
    return {run: f"{job} {states[job]}" for run, job in jobs.items() if job in states}


def _lives(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] not in "ZX"


def _kept(grid: Grid) -> dict[str, Any]:
    try:
        return json.loads((grid.folder / "jobs" / "jobs.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def job_states(jobs: Sequence[str]) -> dict[str, str]:
    """Job -> state of those that wait or run, by squeue, which needs no accounting database."""
    arrays = ",".join(sorted({job.partition("_")[0] for job in jobs}))
    command = ["squeue", "--noheader", "--array", "--format=%i %A %T", f"--jobs={arrays}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = [line.split() for line in done.stdout.splitlines()]
    live = ("PENDING", "RUNNING", "CONFIGURING", "REQUEUED", "SUSPENDED", "REQUEUE_HOLD")
    return {name: line[2] for line in lines if line[2] in live for name in line[:2]}


def _number(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _minutes(text: str) -> int:
    """Of a time limit as sbatch takes it: minutes, or [days-]hours:minutes[:seconds]."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+)(?::\d+)?)?", text)
    if not found:
        raise UserError(f"--slurm.time {text}: give minutes, or such as 12:00:00 or 2-00:00:00")
    days, first, second = found.groups()
    if days is None and second is None:
        return int(first)
    return 1440 * int(days or 0) + 60 * int(first) + int(second or 0)
