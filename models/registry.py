"""The available variants and methods: the shipped ones, and every further module in their folders.

A new variant is one new file with a `VARIANT`; nothing here or elsewhere names it
(docs/adding_a_variant.md).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cached_property

from models import conditioners, methods
from models.config import SHIPPED, MethodType, Variant

__all__ = ["METHODS", "VARIANTS", "Variant"]


class Registry(Mapping):
    """Name -> `Variant`, in the order of `Variant.order`.

    Modules of further variants are imported at the first look, not at import time, so that any of
    them may import this one.
    """

    def __init__(self):
        self._variants: dict[str, Variant] | None = None

    def _load(self) -> dict[str, Variant]:
        if self._variants is None:
            shipped = {variant.module for variant in SHIPPED}
            names = (
                f"{conditioners.__name__}.{i.name}"
                for i in pkgutil.iter_modules(conditioners.__path__)
            )
            modules = [importlib.import_module(name) for name in names if name not in shipped]
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


class MethodRegistry(Mapping):
    """Name -> `MethodType` of every module in `models/methods/`; imported at the first look."""

    @cached_property
    def _methods(self) -> dict[str, MethodType]:
        files = pkgutil.iter_modules(methods.__path__)
        modules = (importlib.import_module(f"{methods.__name__}.{file.name}") for file in files)
        return {module.METHOD.name: module.METHOD for module in modules}

    def __getitem__(self, name: str) -> MethodType:
        return self._methods[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)


VARIANTS = Registry()
METHODS = MethodRegistry()
