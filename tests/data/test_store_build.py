"""Building the waveform store: in parallel, killed, on full disks, and what it leaves behind."""

from __future__ import annotations

import json
import logging
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import data.store_build as store_build
from data.store_build import open_store
from tests.data.sounds import (
    open_in,
    recording_table,
    spoil,
    stores_in,
    tone_in_noise,
    write,
)
from utils.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


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
    for name in ("samples.f32", "cycles.npy", "index.json"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()
    assert two.bad.sum() == 2


def test_no_room(corpus, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(UserError, match=r"cache.*needs 0\.00 GB.*dataset\.cache_dir"):
        open_in(corpus, tmp_path)
    assert not stores_in(tmp_path)


def test_a_disk_that_fills_up_while_writing_leaves_no_store(corpus, tmp_path, monkeypatch):
    finish = store_build._finish

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_build, "_finish", full)
    with pytest.raises(UserError, match="No space left"):
        open_in(corpus, tmp_path)
    assert not stores_in(tmp_path)
    monkeypatch.setattr(store_build, "_finish", finish)
    assert len(open_in(corpus, tmp_path)[5]) == int(0.99 * 16000) - 6400


def test_cache_folder_that_can_not_be_written(corpus, tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(UserError, match=r"cache.*dataset\.cache_dir"):
        open_in(corpus, tmp_path)


CHILD = """
import os, signal, sys, time
import pandas as pd
import data.store_build as build
from data.store import open_store

table, cache, log, gate, kill_at = sys.argv[1:]
work, build.SYNC_SECONDS, done = build.write_recording, 0.0, 0

def watched(job):
    global done
    if done == int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)
    done += 1
    with open(log, "a") as file:
        print(job["number"], file=file)
    while gate and not os.path.exists(gate):
        time.sleep(0.02)
    return work(job)

build.write_recording = watched
store = open_store(pd.read_pickle(table), cache_dir=cache, workers=1)
print(store.folder)
"""


def _child(tmp_path: Path, kill_at: int = -1, gate: Path | str = "") -> subprocess.Popen:
    """A process that builds the store, kills itself at a recording, or waits for the gate file."""
    files = [str(tmp_path / name) for name in ("table.pkl", "cache", "log.txt")]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *files, str(gate), str(kill_at)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_build_goes_on_where_it_stood(corpus, tmp_path):
    corpus.to_pickle(tmp_path / "table.pkl")
    child = _child(tmp_path, kill_at=2)
    child.communicate(timeout=120)
    assert child.returncode == -9
    assert not stores_in(tmp_path)
    building = next((tmp_path / "cache").glob("*.building"))
    with (building / "done.jsonl").open("a") as journal:
        journal.write('{"number": 2, "len')  # as if killed while writing the line
    child = _child(tmp_path)
    out, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    assert (tmp_path / "log.txt").read_text().split() == ["0", "1", "2"]  # nothing twice

    untouched = open_store(corpus, cache_dir=tmp_path / "other", workers=1, progress=False)
    for name in ("samples.f32", "cycles.npy", "index.json"):
        assert (Path(out.strip()) / name).read_bytes() == (untouched.folder / name).read_bytes()


@pytest.mark.slow
def test_two_processes_build_one_store(corpus, tmp_path):
    corpus.to_pickle(tmp_path / "table.pkl")
    gate = tmp_path / "gate"
    first, second = children = [_child(tmp_path, gate=gate) for _ in range(2)]
    waits = False
    while not waits:  # whichever came second says so
        ready = select.select([first.stderr, second.stderr], [], [], 60)[0]
        assert ready, "neither process waits for the other"
        lines = [pipe.readline() for pipe in ready]
        assert all(lines), "a process died"
        waits = any("waiting for it" in line for line in lines)
    gate.touch()
    results = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], results
    assert results[0][0] == results[1][0] != ""
    assert sorted((tmp_path / "log.txt").read_text().split()) == ["0", "1", "2"]


def test_index_says_what_the_store_was_made_from(corpus, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        folder = open_in(corpus, tmp_path).folder
    index = json.loads((folder / "index.json").read_text())
    assert index["settings"]["resampler"] == "torchaudio"
    assert [name for name, _, _ in index["prints"]] == ["r0.wav", "r1.wav", "r2.wav"]
    assert "6 cycles written" in caplog.text


def test_an_abandoned_build_goes_when_its_recordings_have_been_replaced(corpus, tmp_path):
    path = Path(corpus.Recording[2])
    good = path.read_bytes()
    spoil(path, "nan")
    for _ in range(2):
        with pytest.raises(UserError, match=r"r1\.wav"):
            open_in(corpus, tmp_path)
    (left,) = (tmp_path / "cache").glob("*.building")
    path.write_bytes(good)
    os.utime(path, ns=(1, 1))
    open_in(corpus, tmp_path)
    assert not left.exists() and not list((tmp_path / "cache").glob("*.building"))


def test_a_damaged_journal_is_named(corpus, tmp_path):
    spoil(Path(corpus.Recording[5]), "nan")
    with pytest.raises(UserError, match=r"r2\.wav"):
        open_in(corpus, tmp_path)
    (journal,) = (tmp_path / "cache").glob("*.building/done.jsonl")
    journal.write_text("garbage\n")
    with pytest.raises(UserError, match=r"building is damaged .done\.jsonl.*delete it"):
        open_in(corpus, tmp_path)
