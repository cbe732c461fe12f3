"""Fixtures of the loop's tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    """Small tensors are slower on several threads, and the suite may share its cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """MLflow's tables, made once: the migrations take seconds."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("mlflow") / "empty.db"
    MlflowClient(tracking_uri=f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def small_disk(tmp_path):
    """An empty file system of one megabyte."""
    if not sys.platform.startswith("linux") or os.geteuid() or not shutil.which("mount"):
        pytest.skip("a disk can be made full by root on Linux only")
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
