"""The available variants and methods: the shipped ones, and every further module in their folders.

A new variant is one new file with a `VARIANT`; nothing here or elsewhere names it
(docs/adding_a_variant.md).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from types import ModuleType

from models import conditioners, methods
from models.config import SHIPPED, SHIPPED_METHODS, MethodType, Variant

__all__ = ["METHODS", "VARIANTS", "Variant"]


def _further(package: ModuleType, shipped: Iterable[str]) -> list[ModuleType]:
    """Modules of a package but for the named ones."""
    names = {file.name for file in pkgutil.iter_modules(package.__path__)}
    return [importlib.import_module(f"{package.__name__}.{n}") for n in sorted(names - {*shipped})]


class Registry(Mapping):
    """Name -> `Variant`, in the order of `Variant.order`.

    Modules of further variants are imported at the first look, not at import time, so that any of
    them may import this one.
    """

    def __init__(self):
        self._variants: dict[str, Variant] | None = None

    def _load(self) -> dict[str, Variant]:
        if self._variants is None:
            modules = _further(conditioners, [v.module.rpartition(".")[2] for v in SHIPPED])
            found = [*SHIPPED, *(m.VARIANT for m in modules if hasattr(m, "VARIANT"))]
            self._variants = {v.name: v for v in sorted(found, key=lambda v: (v.order, v.name))}
            if len(self._variants) < len(found):
                raise ValueError(f"two variants have one name: {[v.name for v in found]}")
        return self._variants

    def __getitem__(self, name: str) -> Variant:
        return self._load()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._load())

    def __len__(self) -> int:
        return len(self._load())


_SHIPPED_METHODS = {method.name: method for method in SHIPPED_METHODS}


class MethodRegistry(Mapping):
    """Name -> `MethodType`; modules of further methods are imported when a name is no shipped one's
    or all are asked for."""

    @cached_property
    def _methods(self) -> dict[str, MethodType]:
        further = (module.METHOD for module in _further(methods, _SHIPPED_METHODS))
        return _SHIPPED_METHODS | {method.name: method for method in further}

    def __getitem__(self, name: str) -> MethodType:
        return _SHIPPED_METHODS[name] if name in _SHIPPED_METHODS else self._methods[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)


VARIANTS = Registry()
METHODS = MethodRegistry()
