"""Atomic files: the old content or the new one, whatever happens in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.files import TEMPORARY, atomic_write, write_error, write_text

ROOT = Path(__file__).resolve().parents[2]


def test_text_arrives_whole_and_alone(tmp_path):
    path = tmp_path / "made" / "on the way" / "file.txt"
    write_text(path, "müßig\n")
    assert path.read_bytes() == "müßig\n".encode()
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"half of the new")
        raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_write_leaves_the_old_file_and_a_leftover_that_is_known(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = (
        "import os, signal, sys; from utils.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.glob(TEMPORARY))) == 1


def test_a_folder_in_the_way_is_named(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(UserError, match="file can not be written"):
        write_text(tmp_path / "file", "x")
    (tmp_path / "plain").write_text("x")
    with pytest.raises(UserError, match="plain/below can not be written"):
        write_text(tmp_path / "plain" / "below", "x")
    assert not list(tmp_path.glob(TEMPORARY))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="can not be written"):
        write_text(tmp_path / "file", "x")


def test_a_full_disk_is_told_with_path_and_space(small_disk):
    path = small_disk / "runs" / "file"
    write_text(path, "old")
    with (
        pytest.raises(UserError, match=r"disk is full: .*runs/file .*about 3\.0 MB are needed"),
        atomic_write(path, needed_bytes=3_000_000) as file,
    ):
        file.write(bytes(3_000_000))
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
    write_text(path, "there is room again")


def test_quota_counts_as_full(tmp_path):
    import errno

    message = str(write_error(tmp_path / "x", OSError(errno.EDQUOT, "quota")))
    assert "disk is full" in message
    assert "more space is needed" in message
