"""Small models and random inputs for the model tests."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from data.batch import Metadata
from data.corpora.icbhi import DEVICES, SITES
from data.task import FIELDS
from models.build import build_model
from models.config import BackboneConfig
from models.registry import VARIANTS
from utils.common.settings import check_section

BACKBONE = BackboneConfig(
    weights="none", embed_dim=48, depth=3, num_heads=4, mlp_ratio=2.0, trainable_blocks=3
)
SMALL = {
    **{"n_mels": 32, "n_frames": 64, "n_outputs": 2},
    **{"device_counts": (1.0,) * 4 + (0.0,), "site_counts": (1.0,) * 7 + (0.0,)},
}


@pytest.fixture(autouse=True)
def _deterministic():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_model():
    """make_model(variant, config={...}, **build_model arguments) -> small ConditionedAST."""

    def make(variant: str, config: dict | None = None, seed: int = 0, **overrides):
        torch.manual_seed(seed)
        model_config = dataclasses.replace(VARIANTS[variant].config_class(), **(config or {}))
        keys = BackboneConfig.__dataclass_fields__.keys() & overrides.keys()
        backbone = dataclasses.replace(BACKBONE, **{k: overrides.pop(k) for k in keys})
        check_section(backbone, "backbone")
        check_section(model_config, f"models.{variant}")
        model_config.check(f"models.{variant}", backbone.depth)
        return build_model(variant, model_config, backbone, **{**SMALL, **overrides})

    return make


@pytest.fixture
def make_metadata():
    """make_metadata(n) -> random Metadata with every field known."""

    def make(n: int, seed: int = 0) -> Metadata:
        generator = torch.Generator().manual_seed(seed)
        return Metadata(
            device=torch.randint(0, len(DEVICES), (n,), generator=generator),
            site=torch.randint(0, len(SITES), (n,), generator=generator),
            rest=torch.randn(n, 3, generator=generator),
            known=torch.ones(n, len(FIELDS), dtype=torch.bool),
        )

    return make


@pytest.fixture
def make_spectrogram():
    """make_spectrogram(n, F, T) -> random [n, 1, F, T]."""

    def make(n: int, f: int = SMALL["n_mels"], t: int = SMALL["n_frames"], seed: int = 0):
        return torch.randn(n, 1, f, t, generator=torch.Generator().manual_seed(seed))

    return make
