"""Real processes that are killed or stopped, and resumed: nothing is lost."""

from __future__ import annotations

import shutil
import time

import pytest

from benchmarks.kill_resume import Commands, fingerprint, kill_and_compare, phase

SHORT = ("training.epochs=2", "training.warmup_epochs=0", "models.*.mask_annealing_epochs=2")


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    return Commands(tmp_path_factory.mktemp("killed"), *SHORT)


@pytest.fixture(scope="module")
def killed(commands):
    """What the program finds; the run that was never killed stays in `whole-plain`."""
    return kill_and_compare(1, commands, seed=3, kinds=("plain",))


@pytest.mark.slow
def test_sigkill_at_a_random_moment_loses_nothing(killed):
    assert killed["differences"] == []
    assert killed["kills"] == 1 and killed["finished"] == killed["identical"] >= 1


@pytest.mark.slow
def test_sigterm_exits_with_75_and_is_resumed(commands, killed):
    runs = commands.folder / "stopped"
    stopped, _ = commands.watch("plain", runs, until="training")
    stopped.terminate()
    stopped.join()
    assert stopped.exitcode == 75
    commands.watch("plain", runs)
    (log,) = runs.glob("*/run.log")
    assert "resuming after epoch" in log.read_text()
    assert fingerprint(runs) == fingerprint(commands.folder / "whole-plain")


@pytest.mark.slow
def test_a_changed_figure_is_noticed(commands, killed, tmp_path):
    whole, copy = commands.folder / "whole-plain", tmp_path / "copy"
    shutil.copytree(whole, copy)
    (report,) = copy.glob("*/report.json")
    report.write_text(report.read_text().replace('"value": ', '"value": 1', 1))
    before, after = fingerprint(whole), fingerprint(copy)
    changed = [name for name in before if before[name] != after[name]]
    assert changed == [str(report.relative_to(copy))]


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
