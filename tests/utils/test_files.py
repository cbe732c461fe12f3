"""Atomic files: the old content or the new one, whatever happens in between."""

from __future__ import annotations

import logging
import logging.config
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from utils.common.cli import log_file
from utils.common.errors import UserError
from utils.common.files import (
    TEMPORARY,
    atomic_write,
    check_sum,
    write_error,
    write_last,
    write_text,
)

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
        "import os, signal, sys; from utils.common.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.glob(TEMPORARY))) == 1


def test_a_folder_in_the_way_is_named(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(UserError, match="file cannot be written"):
        write_text(tmp_path / "file", "x")
    (tmp_path / "plain").write_text("x")
    with pytest.raises(UserError, match="plain/below cannot be written"):
        write_text(tmp_path / "plain" / "below", "x")
    assert not list(tmp_path.glob(TEMPORARY))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
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
    with pytest.raises(UserError, match=r"about 2\.0 MB are needed, \d+\.\d MB are free"):
        write_text(path, "x" * 2_000_000)
    assert path.read_text() == "there is room again"


def test_quota_counts_as_full(tmp_path):
    import errno

    message = str(write_error(tmp_path / "x", OSError(errno.EDQUOT, "quota")))
    assert "disk is full" in message
    assert "more space is needed" in message


def test_a_log_on_a_full_disk_costs_one_warning(small_disk, caplog):
    log = logging.getLogger("utils.test")
    with caplog.at_level(logging.INFO), log_file() as log_to:
        log.info("before")
        log_to(small_disk / "run.log")
        log.info("first")
        (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free))
        for number in range(200):
            log.info("%d " * 30, *[number] * 30)
    lost = [record for record in caplog.records if "the rest of it is lost" in record.message]
    assert len(lost) == 1 and "run.log" in lost[0].message
    lines = (small_disk / "run.log").read_text().splitlines()
    assert lines[0].endswith("before") and lines[1].endswith("first")


def test_a_log_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "run.log").mkdir()
    with log_file() as log_to, pytest.raises(UserError, match=r"run\.log cannot be written"):
        log_to(tmp_path / "run.log")


def test_a_log_survives_a_library_that_configures_logging(tmp_path):
    with log_file() as log_to:
        log_to(tmp_path / "run.log")
        logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
        logging.getLogger("utils.test").warning("later")
    assert (tmp_path / "run.log").read_text().endswith("later\n")


def test_sums_name_what_has_changed(tmp_path):
    (tmp_path / "predictions").mkdir()
    table = tmp_path / "predictions" / "test.csv"
    table.write_text("1,2\n")
    write_last(tmp_path / "report.json", {"score": 50}, [table])
    free = tmp_path / "notes.txt"  # not listed
    free.write_text("a")
    for path in (table, tmp_path / "report.json", free, tmp_path / "predictions" / "none.csv"):
        check_sum(path)
    for path in (table, tmp_path / "report.json"):
        content = path.read_bytes()
        path.write_bytes(content.replace(b"5", b"6").replace(b"2", b"3"))
        with pytest.raises(UserError, match=f"{path.name} is not what the run wrote"):
            check_sum(path)
        path.unlink()
        with pytest.raises(UserError, match=f"{path.name} is missing"):
            check_sum(path)
    (tmp_path / "SHA256SUMS").unlink()  # a run of an earlier version
    check_sum(table)
