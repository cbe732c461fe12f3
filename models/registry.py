"""The variants there are: every module in `models/conditioners/` that holds a `VARIANT` is one.

A new variant is one new file; nothing here or elsewhere names it (docs/adding_a_variant.md).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping

from models import conditioners
from models.conditioner import Variant

__all__ = ["VARIANTS", "Variant"]


class Registry(Mapping):
    """Name -> `Variant`, in the order of `Variant.order`.

    The modules are imported at the first look, not at import time, so that any of them may import
    this one.
    """

    def __init__(self):
        self._variants: dict[str, Variant] | None = None

    def _load(self) -> dict[str, Variant]:
        if self._variants is None:
            found = {}
            for info in pkgutil.iter_modules(conditioners.__path__):
                module = importlib.import_module(f"{conditioners.__name__}.{info.name}")
                variant = getattr(module, "VARIANT", None)
                if isinstance(variant, Variant):
                    if variant.name in found:
                        raise ValueError(f"two conditioners are named {variant.name!r}")
                    found[variant.name] = variant
            self._variants = {
                v.name: v for v in sorted(found.values(), key=lambda v: (v.order, v.name))
            }
        return self._variants

    def __getitem__(self, name: str) -> Variant:
        return self._load()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._load())

    def __len__(self) -> int:
        return len(self._load())


VARIANTS = Registry()
