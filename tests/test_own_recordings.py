"""The five commands of docs/data.md, on ten recordings made here."""

from __future__ import annotations

import json
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from tests.utils.tiny import words

ROOT = Path(__file__).resolve().parent.parent
TITLE = "## Your own recordings, from folder to trained model in five commands"
RATE = 8000


def page_commands() -> tuple[str, list[list[str]]]:
    """The example table and the commands of the page, as words after `python`."""
    section = (ROOT / "docs/data.md").read_text(encoding="utf-8").split(TITLE)[1].split("\n## ")[0]
    table, block = (section.split(f"```{kind}\n")[1].split("```")[0] for kind in ("csv", "bash"))
    lines = block.replace("\\\n", " ").splitlines()
    return table, [shlex.split(line, comments=True)[1:] for line in lines if line.strip()]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with the shipped configurations and ten recordings of ten patients."""
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    folder = Path("my_recordings")
    folder.mkdir()
    example = page_commands()[0].splitlines()
    rows = [example[0]]
    for number in range(10):
        generator = np.random.default_rng(number)
        soundfile.write(folder / f"{number}.wav", generator.normal(0, 0.1, 4 * RATE), RATE)
        for cycle in range(4):  # one of each class
            labels = f"{cycle & 1},{cycle >> 1}"
            device = ("Eko", "Littmann")[number % 2]
            times = f"{cycle},{cycle + 0.9}"
            rows.append(f"{number}.wav,{times},{labels},p{number},{device},Tc,{30 + number}")
    (folder / "cycles.csv").write_text("\n".join(rows) + "\n")
    soundfile.write("new_recording.wav", np.random.default_rng(99).normal(0, 0.1, 3 * RATE), RATE)
    return tmp_path


def run(monkeypatch, command: list[str]) -> int:
    """What `python command` would do, in this process."""
    target = command[1:] if command[0] == "-m" else command
    monkeypatch.setattr(sys, "argv", target)
    with pytest.raises(SystemExit) as end:
        if command[0] == "-m":
            runpy.run_module(target[0], run_name="__main__")
        else:
            runpy.run_path(str(ROOT / target[0]), run_name="__main__")
    return end.value.code or 0


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_page_from_folder_to_prediction(here, monkeypatch, capsys):
    monkeypatch.setattr("utils.runs.end.draw_figures", lambda *_: None)
    monkeypatch.setattr("utils.figures.runs.evaluation_figures", lambda *_: None)
    size = {"models.ast_film.input_fdim": 32, "models.ast_film.input_tdim": 48}
    tiny = words(
        **size,
        **{"models.ast_film.conditioned_layers": "all", "training.epochs": 1},
        **{"audio.clip_seconds": 2.0, "dataset.store_workers": 1},
    )
    added = {  # what takes seconds is tested elsewhere
        "ast_film_train.py": tiny,
        "evaluate.py": ["--no-metadata-test"],
        "predict.py": ["--no-pictures"],
    }
    commands = page_commands()[1]
    assert len(commands) == 5
    for command in commands:
        assert run(monkeypatch, [*command, *added.get(command[0], [])]) == 0, command
    out = capsys.readouterr().out
    assert "all 40 10 10 10 10 10 10" in [" ".join(line.split()) for line in out.splitlines()]
    (folder,) = Path("runs").iterdir()
    report = json.loads((folder / "evaluation/test/report.json").read_text())
    assert report["counts"]["cycles"] >= 8 and {"Eko", "Littmann"} >= {
        row["value"] for row in report["subgroups"] if row["group"] == "device"
    }
    predicted = pd.read_csv("predictions/summary.csv")
    assert len(predicted) == 1 and "new_recording" in str(predicted.iloc[0].tolist())
