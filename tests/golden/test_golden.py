"""Golden losses of the small preset: a change that moves them must be a change that was meant to.

    python -m tests.golden.test_golden

writes losses.json again; say in the commit why the numbers moved. Dropout and augmentation are on;
the cycles are `tests.utils.tiny`'s, so that the synthetic corpus may change without touching them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch

from models.registry import VARIANTS
from tests.utils.tiny import step_losses, tiny_data, tiny_trainer
from utils.config.schema import load_config

FILE = Path(__file__).with_name("losses.json")
ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    "ast": "ast_config",
    "ast_grf": "ast_fus_config",
    "ast_film": "ast_film_config",
    "ast_tafilm": "ast_tafilm_config",
    "ast_softfilm": "ast_film_soft_config",
}
#: The preset as it is, but for its length and where it runs.
SHORT = (
    "training.epochs=2",
    "training.warmup_epochs=1",
    "dataset.batch_size=6",
    "training.device=cpu",
    "training.precision=fp32",
    "mlflow.enabled=false",
)


def losses(variant: str, folder: Path) -> list[float]:
    """Mean task loss of each step of two epochs."""
    files = [ROOT / "configs" / f"{CONFIGS[variant]}.yaml", ROOT / "configs" / "demo.yaml"]
    config = load_config(files, SHORT, variant=variant)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return step_losses(tiny_trainer(config, folder, tiny_data(config)))
    finally:
        torch.set_num_threads(threads)


def test_every_variant_has_golden_losses():
    assert set(json.loads(FILE.read_text())) == set(CONFIGS) <= set(VARIANTS)


@pytest.mark.parametrize("variant", list(CONFIGS))
def test_losses_are_the_golden_ones(variant, tmp_path):
    golden = json.loads(FILE.read_text())[variant]
    assert losses(variant, tmp_path) == pytest.approx(golden, abs=1e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        found = {name: losses(name, Path(place) / name) for name in CONFIGS}
    rounded = {name: [round(x, 6) for x in values] for name, values in found.items()}
    FILE.write_text(json.dumps(rounded, indent=1) + "\n")
    print(FILE.read_text())
