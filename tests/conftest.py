"""Shared fixtures: the real recordings where they are, a small synthetic corpus otherwise."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Small tensors are slower on several threads, and two test processes share the cores. Set before
# torch is imported; the processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items):
    """Files with slow tests first (pyproject.toml keeps xdist from sorting them by their number of
    tests), so that no worker begins a long one when the other has finished."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def icbhi_root() -> Path:
    """Folder with real ICBHI recordings; the test is skipped where there is none."""
    folder = Path(os.environ.get("ICBHI_ROOT", ROOT.parent / "shared" / "icbhi"))
    if not (folder / "annotations").is_dir():
        pytest.skip(f"no real ICBHI recordings at {folder}; set ICBHI_ROOT to use some")
    return folder


@pytest.fixture(scope="session")
def synthetic_corpus(tmp_path_factory) -> Path:
    """Small ICBHI-shaped corpus, written once per test session; treat it as read-only."""
    from data.synthetic.corpus import write_corpus

    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, patients=10, seed=0)
    return folder
