"""Recordings for tests, sound and spoilt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import soundfile

from data.store import WaveformStore
from data.store_build import open_store


def tone_in_noise(seconds: float, rate: int, seed: int = 0) -> np.ndarray:
    """A tone in noise with an offset, [n] at `rate` Hz."""
    random = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    return 0.3 * np.sin(2 * np.pi * 440 * time) + 0.05 * random.standard_normal(len(time)) + 0.1


def write(path: Path, sound: np.ndarray, rate: int, subtype: str = "PCM_16") -> Path:
    """Write an audio file and return its path."""
    soundfile.write(path, sound, rate, subtype=subtype)
    return path


def cut(path: Path, keep: float) -> Path:
    """Keep the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    return path


def spoil(path: Path, kind: str) -> Path:
    """Write a recording that cannot be used in this way."""
    sound = tone_in_noise(1.0, 8000)
    if kind == "empty file":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("start end crackle wheeze\n")
    elif kind == "no samples":
        write(path, sound[:0], 8000)
    elif kind == "cut wav":
        cut(write(path, sound, 8000), 0.6)
    elif kind == "cut by one sample":
        cut(write(path, sound, 8000), 1 - 2 / (2 * 8000 + 44))
    elif kind == "cut flac":
        path = cut(write(path.with_suffix(".flac"), sound, 8000), 0.6)
    elif kind in ("nan", "inf"):
        sound[4000] = float(kind)
        write(path, sound, 8000, "FLOAT")
    elif kind == "silent":
        write(path, 0 * sound, 8000)
    elif kind == "silent in the mean":
        write(path, np.stack([sound, -sound], axis=1), 8000)
    elif kind == "rate":
        write(path, sound, 3000)
    return path


def recording_table(recordings: dict[Path, list[tuple[float, float]]]) -> pd.DataFrame:
    """What a store needs of a cycle table: {path: [(start, end) in s]}."""
    rows = [
        (path.stem, i, start, end, str(path))
        for path, cycles in recordings.items()
        for i, (start, end) in enumerate(cycles)
    ]
    return pd.DataFrame(
        rows, columns=["Filename", "CycleIndex", "CycleStart", "CycleEnd", "Recording"]
    )


def open_in(table: pd.DataFrame, tmp_path: Path, **keys) -> WaveformStore:
    """The table's store, in a cache folder of the test's."""
    keys = {"workers": 1, "progress": False} | keys
    return open_store(table, cache_dir=tmp_path / "cache", **keys)


def stores_in(tmp_path: Path) -> list[Path]:
    """Finished stores in that cache folder."""
    return [p for p in (tmp_path / "cache").glob("waveforms-*") if p.suffix == ""]
