"""Building the waveform store: in parallel, killed, on full disks, and what it leaves behind."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data.store_build as store_build
from data.store_build import open_store
from tests.data.sounds import open_in, recording_table, spoil, stores_in, tone_in_noise, write
from utils.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FILES = ("samples.f32", "cycles.i64", "index.json")


def test_processes_write_what_one_process_writes(tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    files = {
        write(folder / f"r{i:02}.wav", tone_in_noise(0.3, 4000, i), 4000): [(0.0, 0.1), (0.1, 0.29)]
        for i in range(16)
    }
    spoil(folder / "r07.wav", "nan")
    table = recording_table(files)
    one = open_in(table, tmp_path, on_bad_recording="skip")
    keys = dict(workers=2, on_bad_recording="skip", progress=False)
    two = open_store(table, cache_dir=tmp_path / "other", **keys)
    for name in FILES:
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()
    assert two.bad.sum() == 2


def test_no_room(corpus, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(UserError, match=r"needs 0\.00 GB.*dataset\.cache_dir"):
        open_in(corpus, tmp_path)
    assert not list((tmp_path / "cache").iterdir())


def test_a_disk_that_fills_up_leaves_no_store(corpus, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store_build, "_finish", full)
        with pytest.raises(UserError, match="No space left"):
            open_in(corpus, tmp_path)
    assert not list((tmp_path / "cache").iterdir())
    assert len(open_in(corpus, tmp_path)[5]) == int(0.99 * 16000) - 6400


def test_cache_folder_that_cannot_be_written(corpus, tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(UserError, match=r"cache.*dataset\.cache_dir"):
        open_in(corpus, tmp_path)


CHILD = """
import os, sys, time
import pandas as pd
import data.store_build as build

table, cache, log, gate = sys.argv[1:]
work = build.write_recording

def watched(job):
    with open(log, "a") as file:
        print(job["number"], file=file)
    while job["number"] == 1 and not os.path.exists(gate):
        time.sleep(0.02)
    return work(job)

build.write_recording = watched
print(build.open_store(pd.read_pickle(table), cache_dir=cache, workers=1).folder)
"""


@pytest.fixture
def child(corpus, tmp_path):
    """Starts a process that builds the store and stops in the middle until `gate` exists."""
    corpus.to_pickle(tmp_path / "table.pkl")
    files = [str(tmp_path / name) for name in ("table.pkl", "cache", "log.txt", "gate")]
    command, pipe = [sys.executable, "-c", CHILD, *files], subprocess.PIPE
    children = []

    def start(halfway: bool) -> subprocess.Popen:
        children.append(subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True))
        log, deadline = tmp_path / "log.txt", time.monotonic() + 60
        while halfway and not (log.exists() and "1" in log.read_text()):
            assert time.monotonic() < deadline and children[-1].poll() is None
            time.sleep(0.02)
        return children[-1]

    yield start
    for process in children:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_killed_build_starts_again(corpus, tmp_path, child):
    process = child(halfway=True)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert not stores_in(tmp_path) and list((tmp_path / "cache").glob("*.building"))
    shutil.copytree(tmp_path / "cache", tmp_path / "changed" / "cache")
    store = open_in(corpus, tmp_path)
    untouched = open_store(corpus, cache_dir=tmp_path / "other", workers=1, progress=False)
    for name in FILES:
        assert (store.folder / name).read_bytes() == (untouched.folder / name).read_bytes()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [store.folder.name]
    # what was begun for recordings that have changed since goes
    write(Path(corpus.Recording[0]), tone_in_noise(1.0, 44100, seed=9), 44100)
    folder = open_in(corpus, tmp_path / "changed").folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.slow
def test_two_processes_build_one_store(tmp_path, child):
    first, second = child(halfway=True), child(halfway=False)
    time.sleep(0.3)
    (tmp_path / "gate").touch()
    results = [process.communicate(timeout=120) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], results
    assert results[0][0] == results[1][0] != ""
    assert (tmp_path / "log.txt").read_text().split() == ["0", "1", "2"]  # built once


def test_bad_recordings_leave_no_unfinished_build(corpus, tmp_path):
    spoil(Path(corpus.Recording[2]), "nan")
    with pytest.raises(UserError, match=r"r1\.wav"):
        open_in(corpus, tmp_path)
    assert not list((tmp_path / "cache").iterdir())
