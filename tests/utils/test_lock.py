"""utils.common.lock: one owner at a time, with real processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from utils.common import lock
from utils.common.cli import EXIT_BUSY, command
from utils.common.errors import Busy, UserError
from utils.common.lock import held

HOLD = "import sys, time; from utils.common.lock import held\nwith held(sys.argv[1]): "


def start(path, body):
    """A process that owns `path` while it runs `body`; returned once it prints a line."""
    words = [sys.executable, "-c", HOLD + body, str(path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline()
    return process


def lock_file(path):
    return path.with_name(f".{path.name}.lock")


def test_the_second_is_told_who_is_at_work(tmp_path):
    owner = start(tmp_path / "run", "print(1, flush=True); time.sleep(60)")
    try:
        message = rf"the run is in use by process {owner.pid} on \S+ since"
        with pytest.raises(Busy, match=message), held(tmp_path / "run", "the run"):
            pass

        @command
        def main():
            with held(tmp_path / "run"):
                pass

        assert main() == EXIT_BUSY
        with held(tmp_path / "other"):
            pass
    finally:
        owner.kill()
        owner.wait()


def test_waiting_gets_it_when_the_other_ends(tmp_path):
    owner = start(tmp_path / "run", "print(1, flush=True); time.sleep(1)")
    with held(tmp_path / "run", wait=True):
        assert owner.wait() == 0
    assert not list(tmp_path.iterdir())


def test_a_killed_owner_is_succeeded_at_once(tmp_path):
    owner = start(tmp_path / "run", "print(1, flush=True); time.sleep(60)")
    owner.send_signal(signal.SIGKILL)  # not waited for: a zombie does not count as alive
    time.sleep(0.2)
    assert lock_file(tmp_path / "run").exists()
    with held(tmp_path / "run"):
        assert json.loads(lock_file(tmp_path / "run").read_text())["pid"] == os.getpid()
    owner.wait()


def test_never_two_at_once_after_a_kill(tmp_path):
    """Ten contenders for the lock of a dead owner, each for a few turns, count without a loss."""
    owner = start(tmp_path / "run", "print(1, flush=True); time.sleep(60)")
    owner.kill()
    owner.wait()
    count = tmp_path / "count"
    count.write_text("0")
    body = (
        "import sys, time; from pathlib import Path; from utils.common import lock\n"
        "lock.POLL = 0.01; count = Path(sys.argv[2])\n"
        "for _ in range(5):\n"
        "    with lock.held(sys.argv[1], wait=True):\n"
        "        n = int(count.read_text()); time.sleep(0.01); count.write_text(str(n + 1))\n"
    )
    words = [sys.executable, "-c", body, str(tmp_path / "run"), str(count)]
    processes = [subprocess.Popen(words) for _ in range(10)]
    assert [p.wait(timeout=60) for p in processes] == [0] * 10
    assert count.read_text() == "50"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["count"]


@pytest.mark.parametrize("content", ['{"host": "n1", "pid": 1, "token": "x"}', "", '{"ho'])
def test_another_machines_lock_counts_while_touched(content, tmp_path):
    file = lock_file(tmp_path / "run")
    file.write_text(content)
    message = "process 1 on n1" if content.endswith("}") else "unknown host"
    with pytest.raises(Busy, match=message), held(tmp_path / "run"):
        pass
    old = time.time() - lock.STALE - 5
    os.utime(file, (old, old))
    with held(tmp_path / "run"):
        assert json.loads(file.read_text())["pid"] == os.getpid()


def test_a_reused_process_id_does_not_hold(tmp_path):
    with held(tmp_path / "run"):
        record = json.loads(lock_file(tmp_path / "run").read_text())
    lock_file(tmp_path / "run").write_text(json.dumps(record | {"started": "1"}))
    with held(tmp_path / "run"):
        pass


def test_the_owner_shows_life_and_notices_a_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    file = lock_file(tmp_path / "run")
    with held(tmp_path / "run") as lost:
        os.utime(file, (1, 1))
        time.sleep(0.5)
        assert file.stat().st_mtime > 1 and not lost.is_set()
        file.write_text('{"token": "successor"}')
        assert lost.wait(5)
    assert file.exists()  # it belongs to the successor


def test_a_lock_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="check the folder"), held(tmp_path / "file" / "run"):
        pass


def test_an_error_inside_releases(tmp_path):
    with pytest.raises(KeyError), held(tmp_path / "run"):
        raise KeyError
    assert not list(tmp_path.iterdir())
