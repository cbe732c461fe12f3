"""Cells as jobs that are preempted, queued again and resume: locally and on a real Slurm."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.utils.tiny import tiny_config
from utils.common.errors import UserError
from utils.runs import grid as grids
from utils.runs.cells import Cell, Grid
from utils.runs.processes import read_ending
from utils.runs.slurm import CellJob, _minutes, job_states, queued, submit
from utils.runs.states import state_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("single_node.sh")
#: Saves and stops when it is told to; the second time it goes on to its end.
CELL = """
import pathlib, signal, sys, time
name = pathlib.Path(sys.argv[1])
def stop(*_):
    name.with_suffix(".saved").touch(); print("saved", flush=True); sys.exit(75)
signal.signal(signal.SIGTERM, stop)
if name.with_suffix(".saved").exists():
    print("resumed", flush=True); name.with_suffix(".done").touch(); sys.exit(0)
name.with_suffix(".ready").touch()
time.sleep(120)
"""


@pytest.fixture
def stub(tmp_path, monkeypatch) -> Grid:
    """A grid of two cells that wait to be preempted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "cell.py").write_text(CELL)
    folder = {"training.output_dir": str(tmp_path / "runs"), "training.epochs": 2}
    cells = [
        Cell(f"cell {n}", tiny_config(**folder, **{"training.seed": n}), ("cell.py", f"c{n}"))
        for n in range(2)
    ]
    return Grid("stub", tmp_path / "runs" / "grid", tuple(cells))


def wait_for(what, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def logs(grid: Grid) -> list[str]:
    return [grid.log(cell).read_text() if grid.log(cell).is_file() else "" for cell in grid.cells]


@pytest.mark.slow
def test_a_local_job_is_preempted_and_resumes(stub):
    one = replace(stub, cells=stub.cells[:1])
    (job,) = submit(one, one.cells, "local", {})
    assert queued(one) == {one.cells[0].folder.path.name: f"{job} RUNNING"}
    wait_for(Path("c0.ready").exists)
    children = subprocess.run(["pgrep", "-P", job], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[0]), signal.SIGUSR1)
    wait_for(Path("c0.done").exists)
    wait_for(lambda: not queued(one))
    assert logs(one) == ["saved\nresumed\n"]
    assert read_ending(one.log(one.cells[0]))["status"] == 0


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    done = subprocess.run([SCRIPT, "start", folder], capture_output=True, text=True, check=False)
    try:
        if done.returncode:
            pytest.skip(f"no Slurm here: {done.stderr.strip() or done.stdout.strip()}")
        yield done.stdout.split("=", 1)[1].strip()
    finally:
        subprocess.run([SCRIPT, "stop", folder], check=False)


@pytest.mark.slow
def test_jobs_of_a_real_slurm_resume(stub, slurm, monkeypatch):
    """One array; one job gets SIGUSR1, the other SIGTERM; one that is cancelled stays away."""
    monkeypatch.setenv("SLURM_CONF", slurm)
    jobs = submit(stub, stub.cells, "slurm", {"partition": "test", "time": "10"}, parallelism=2)
    assert len({job.partition("_")[0] for job in jobs}) == 1 and jobs[0].endswith("_0")
    wait_for(lambda: all(Path(f"c{n}.ready").exists() for n in range(2)))
    assert [text.split()[1] for text in queued(stub).values()] == ["RUNNING"] * 2
    for job, name in zip(jobs, ("USR1", "TERM"), strict=True):
        subprocess.run(["scancel", f"--signal={name}", job], check=True)
    wait_for(lambda: logs(stub) == ["saved\n"] * 2)
    # Slurm holds a job that was put back for two minutes; the test does not wait for that
    wait_for(lambda: [job_states(jobs).get(job) for job in jobs] == ["PENDING"] * 2)
    assert [state_of(stub, cell).name for cell in stub.cells] == ["preempted"] * 2
    for job in jobs:
        subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], check=True)
    wait_for(lambda: logs(stub) == ["saved\nresumed\n"] * 2)
    for n in range(2):
        Path(f"c{n}.saved").unlink()
        Path(f"c{n}.ready").unlink()
    first = replace(stub, cells=stub.cells[:1])
    jobs = submit(first, first.cells, "slurm", {"time": "0:10"})
    wait_for(Path("c0.ready").exists)
    subprocess.run(["scancel", jobs[0]], check=True)
    wait_for(lambda: not job_states(jobs) and logs(first)[0].endswith("saved\n"))


def test_a_cell_on_several_nodes_is_started_by_torchrun():
    place = {"num_nodes": 2, "node": 1, "raw_job_id": "4021", "hostnames": ["n7", "n8"]}
    environment = SimpleNamespace(**place)
    found = CellJob(("ast_train.py", "x=1"), "log", processes=4)._command(environment)
    assert found == [
        *("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=4", "--node-rank=1"),
        *("--master-addr=n7", "--master-port=29521", "ast_train.py", "x=1"),
    ]
    alone = SimpleNamespace(**place | {"num_nodes": 1})
    assert CellJob(("ast_train.py",), "log")._command(alone) == ["ast_train.py"]


@pytest.mark.parametrize(
    ("text", "minutes"), [("90", 90), ("1:30", 90), ("12:00:00", 720), ("2-00:00:00", 2880)]
)
def test_time_limits_are_read_as_sbatch_reads_them(text, minutes):
    assert _minutes(text) == minutes


def test_a_time_limit_must_be_given(stub):
    with pytest.raises(UserError, match=r"--slurm\.time : give minutes"):
        submit(stub, stub.cells, "slurm", {})


def test_slurm_options_take_both_forms(capsys):
    words = ["run", "g.yaml", "--slurm.gres=gpu:1", "--slurm.time", "1:00", "--launcher", "slurm"]
    options = grids.parse_arguments(words)
    assert options.slurm == {"gres": "gpu:1", "time": "1:00"} and options.launcher == "slurm"
    with pytest.raises(SystemExit):
        grids.parse_arguments(["run", "g.yaml", "--slurn.time", "1:00"])
    assert "--slurn.time is not known" in capsys.readouterr().err
