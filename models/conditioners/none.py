"""The plain AST: no metadata."""

from __future__ import annotations

from models.conditioner import Conditioner
from models.config import ModelConfig


def build(config: ModelConfig, **_) -> Conditioner:
    return Conditioner()
