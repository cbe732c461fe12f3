"""From a script to the loss: at most five calls of this repository's own functions lie between."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from tests.utils.tiny import words

ROOT = Path(__file__).resolve().parents[2]


def test_five_hops_from_script_to_loss(synthetic_corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = ROOT / "ast_film_train.py"
    config = ROOT / "configs" / "ast_film_config.yaml"
    keys = {"dataset.data_folder": synthetic_corpus, "dataset.cycle_metadata_path": "null"}
    keys |= {"dataset.cache_dir": synthetic_corpus.parent / "cache", "dataset.store_workers": 1}
    keys |= {"training.epochs": 1, "models.*.conditioned_layers": "all"}
    keys |= {"models.*.input_fdim": 32, "models.*.input_tdim": 48}
    arguments = [str(script), "--config", str(config), *words(**keys)]
    monkeypatch.setattr(sys, "argv", arguments)
    stacks = []

    def watch(frame, event, _):
        if event != "call" or frame.f_code.co_name != "bce" or stacks:
            return
        while frame:
            file = Path(frame.f_code.co_filename)
            if file.is_relative_to(ROOT) and ".venv" not in file.parts:
                stacks.append(f"{file.name}:{frame.f_code.co_name}")
            if file == script:
                raise KeyboardInterrupt  # seen enough
            frame = frame.f_back

    sys.setprofile(watch)
    try:
        with pytest.raises(SystemExit):
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.setprofile(None)
    assert stacks[0] == "losses.py:bce" and stacks[-1] == "ast_film_train.py:main", stacks
    assert len(stacks) - 1 <= 5, " <- ".join(stacks)
