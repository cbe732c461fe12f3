"""A fingerprint of the data that a run read, and what has changed since in words."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from data import store
from data.cycle_table import COLUMNS

SHOWN = 3  # recordings that are named


def fingerprint(table: pd.DataFrame, full_hash: bool = False) -> dict[str, Any]:
    """Hashes of each column and of each recording of a cycle table [N], the sound included (of all
    its bytes with full_hash)."""
    texts = {name: [_text(value) for value in table[name]] for name in COLUMNS if name in table}
    paths = table["Recording"].unique()
    if all(paths):
        sound = {path: str(store.fingerprint(Path(path), full_hash)[1:]) for path in paths}
        texts["audio"] = [sound[path] for path in table["Recording"]]
    rows: dict[str, list[str]] = {}
    for name, *row in zip(table["Filename"], *texts.values(), strict=True):
        rows.setdefault(str(name), []).extend(row)
    return {
        "columns": {name: _hash(values) for name, values in texts.items()},
        "recordings": {name: _hash(values) for name, values in rows.items()},
    }


def difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two fingerprints, in words; empty: nothing, or nothing is known."""
    if not then or not now or then == now:
        return ""
    before, after = then["recordings"], now["recordings"]
    parts = []
    for names, what in ((before.keys() - after, "missing"), (after.keys() - before, "new")):
        if names:
            parts.append(f"{_some(names)} {'is' if len(names) == 1 else 'are'} {what}")
    changed = [name for name in before if name in after and before[name] != after[name]]
    old, new = then["columns"], now["columns"]
    where = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if changed:
        parts.append(f"{_some(changed)} differ{'s' * (len(changed) == 1)} in {', '.join(where)}")
    return "; ".join(parts) or f"the order of the cycles ({', '.join(where)})"


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest


def _text(value: Any) -> str:
    """Six digits: the last ones of a computed number depend on the processor."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _hash(values: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(values).encode()).hexdigest()[:16]
