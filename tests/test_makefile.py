"""What `make` says before it installs anything."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def make(tmp_path):
    """`make` in a folder where nothing is installed, with a Python that only says it was called."""
    for name in ("Makefile", "requirements.txt", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)

    def call(*words: str) -> subprocess.CompletedProcess:
        words = ("make", *words, "PYTHON=echo INSTALLATION; false")
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)

    return call


@pytest.mark.parametrize(
    ("goal", "variant"), [("train", "nonsense"), ("train", ""), ("demo", "ast_film")]
)
def test_unknown_variant_is_refused_before_set_up(make, goal, variant):
    ended = make(goal, f"VARIANT={variant}")
    assert ended.returncode == 2
    assert f"VARIANT={variant} is none of ast, grf, film, tafilm, softfilm" in ended.stderr
    assert "INSTALLATION" not in ended.stdout


@pytest.mark.parametrize("variant", ["ast", "grf", "film", "tafilm", "softfilm"])
def test_known_variant_reaches_the_set_up(make, variant):
    ended = make("train", f"VARIANT={variant}")
    assert "INSTALLATION" in ended.stdout and "none of" not in ended.stderr


def test_other_goals_need_no_variant(make):
    ended = make("help", "VARIANT=nonsense")
    assert ended.returncode == 0 and "make train VARIANT=ast" in ended.stdout


def test_ui_takes_a_port_and_sends_no_telemetry(make):
    shown = make("ui", "PORT=5999", "--dry-run").stdout
    assert "--port 5999" in shown
    assert "MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true" in shown


def test_demo_trains_only_without_a_checkpoint(make, tmp_path):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / ".ready").touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "CALLED $*"\n')
    python.chmod(0o755)
    opens = "CALLED -m utils.demo --checkpoint checkpoints/film_best.pt --port 7999 --open"
    first = make("demo", "VARIANT=film", "PORT=7999").stdout
    assert "CALLED ast_film_train.py --config configs/ast_film_config.yaml" in first
    assert opens in first.splitlines()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "film_best.pt").touch()
    second = make("demo", "VARIANT=film", "PORT=7999").stdout
    assert "CALLED ast_film_train" not in second and opens in second.splitlines()
    assert "7860" in make("help").stdout and "--port 7860" in make("demo", "--dry-run").stdout
