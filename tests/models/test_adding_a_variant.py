"""The worked example of docs/adding_a_variant.md, taken from the page and run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: What a variant must be able to do before it is trained.
CHECK = """
import torch
from data.batch import Metadata
from models.registry import VARIANTS
from utils.runs.model_summary import model_for_summary, summarise
from models.build import build_model
from models.config import BackboneConfig
from utils.config.schema import load_config

assert list(VARIANTS)[-1] == "ast_shift", list(VARIANTS)
config = load_config(["configs/ast_shift_config.yaml", "configs/demo.yaml"])
print(summarise(config))
n, torch_seed = 16, torch.manual_seed(0)
backbone = BackboneConfig(weights="none", embed_dim=24, depth=3, num_heads=2, mlp_ratio=2.0,
                          freq_stride=16, time_stride=16, trainable_blocks=3)
sizes = dict(n_mels=32, n_frames=48, n_outputs=2, device_counts=[1] * 5, site_counts=[1] * 8)
model = build_model("ast_shift", config.model, backbone, **sizes).eval()
x = torch.randn(n, 1, 32, 48)
metadata = Metadata(torch.randint(0, 4, (n,)), torch.randint(0, 7, (n,)), torch.randn(n, 3),
                    torch.ones(n, 5, dtype=torch.bool))
assert torch.equal(model.backbone(x), model.embed(x, metadata)[0])  # starts from the plain AST
model.train()
start = {k: p.detach().clone() for k, p in model.named_parameters()}
optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(2):
    optimiser.zero_grad()
    out = model(x, metadata)
    (out.logits.square().mean() + out.regularisation).backward()
    optimiser.step()
assert all(not torch.equal(p, start[k]) for k, p in model.named_parameters())
assert not torch.allclose(model.eval().backbone(x), model.embed(x, metadata)[0])
"""

#: Then the script is started, in the same process because imports take longer than the training.
TRAIN = """
import runpy, sys
import utils.runs.end

utils.runs.end.draw_figures = lambda *_: None
sys.argv[0] = "ast_shift_train.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the repository's code with the page's three files added to it."""
    for name in ("data", "utils", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("models", "models/conditioners", "models/methods", "configs"):
        folder = tmp_path / name
        if folder.is_symlink():
            folder.unlink()
        folder.mkdir()
        for file in (ROOT / name).iterdir():
            if file.is_file():
                (folder / file.name).symlink_to(file)
    page = (ROOT / "docs" / "adding_a_variant.md").read_text(encoding="utf-8")
    added = re.findall(r"^`([\w/.]+)`[^\n]*:\n\n```\w+\n(.*?)^```", page, re.M | re.S)
    assert [name for name, _ in added] == [
        "models/conditioners/shift.py",
        "configs/ast_shift_config.yaml",
        "ast_shift_train.py",
    ]
    for name, text in added:
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def run(folder: Path, *words: str) -> str:
    """Run Python in a checkout; the text it prints."""
    # without PYTHONPATH, so that the checkout's packages are found and not those of the tests
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_example_is_found_configured_and_trains(checkout, synthetic_corpus):
    overrides = {
        "dataset.data_folder": synthetic_corpus,
        "dataset.cycle_metadata_path": synthetic_corpus / "icbhi_metadata.csv",
        "dataset.cache_dir": checkout / "cache",
        "dataset.h": 32,
        "dataset.w": 48,
        "audio.clip_seconds": 0.5,
        "augment.enabled": "false",
        "backbone.embed_dim": 16,
        "backbone.num_heads": 2,
        "models.*.input_tdim": 48,
        "training.epochs": 1,
        "training.warmup_epochs": 0,
        "training.device": "cpu",
        "mlflow.enabled": "false",
    }
    files = ["configs/ast_shift_config.yaml", "configs/demo.yaml"]
    words = ["--config", *files, *(f"{key}={value}" for key, value in overrides.items())]
    text = run(checkout, "-c", CHECK + TRAIN, *words)
    assert "Shift-AST (models.ast_shift)" in text
    assert (checkout / "checkpoints" / "shift_best.pt").is_file()
