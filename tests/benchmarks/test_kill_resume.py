"""Real processes that are killed or stopped, and resumed: nothing is lost."""

from __future__ import annotations

import shutil
import time

import pytest

from benchmarks.kill_resume import Commands, fingerprint, kill_and_compare, phase


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    return Commands(tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="module")
def whole(commands):
    """The runs of a command that was never killed."""
    commands.watch("plain", commands.folder / "never-killed")
    return commands.folder / "never-killed"


@pytest.mark.slow
def test_sigkill_at_random_moments_loses_nothing(commands):
    result = kill_and_compare(2, commands, seed=3, kinds=("plain",))
    assert result["differences"] == []
    assert result["kills"] == 2 and result["finished"] == result["identical"] >= 1


@pytest.mark.slow
def test_sigterm_exits_with_75_and_is_resumed(commands, whole):
    runs = commands.folder / "stopped"
    stopped, _ = commands.watch("plain", runs, until="training")
    stopped.terminate()
    stopped.join()
    assert stopped.exitcode == 75
    commands.watch("plain", runs)
    (log,) = runs.glob("*/run.log")
    assert "resuming after epoch" in log.read_text()
    assert fingerprint(runs) == fingerprint(whole)


@pytest.mark.slow
def test_a_changed_figure_is_noticed(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    (report,) = (tmp_path / "copy").glob("*/report.json")
    report.write_text(report.read_text().replace('"value": ', '"value": 1', 1))
    before, after = fingerprint(whole), fingerprint(tmp_path / "copy")
    changed = [name for name in before if before[name] != after[name]]
    assert changed == [str(report.relative_to(tmp_path / "copy"))]


def test_phases_follow_from_the_files(tmp_path):
    def stands_at(*names: str, kind: str = "group") -> str:
        runs = tmp_path / str(time.monotonic_ns())
        for name in names:
            path = runs / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return phase(runs, kind)

    last, best, report = ("checkpoints/last.pt", "checkpoints/best.pt", "report.json")
    assert stands_at() == "start"
    assert stands_at(f"a/{last}") == "training"
    assert stands_at(f"a/{last}", f"a/{best}") == "evaluation"
    assert stands_at(f"a/{last}", f"a/{best}", f"a/{report}") == "publishing"
    done = (f"a/{best}", f"a/{report}")
    assert stands_at(*done) == stands_at(*done, kind="plain") == "start"
    both = (*done, f"b/{best}", f"b/{report}")
    assert stands_at(*both) == "assembly"
    assert stands_at(*both, "g/group.json") == "start"
