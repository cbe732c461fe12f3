"""The plain AST: no metadata."""

from __future__ import annotations

from models.conditioner import Conditioner, ModelConfig, Variant


def _build(config: ModelConfig, **_) -> Conditioner:
    return Conditioner()


VARIANT = Variant("ast", "ast", "AST", ModelConfig, _build, order=0)
