"""Sound for the benchmarks: real cycles where there are some, otherwise noise like breathing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import torch
from torch import Tensor

from data.augment import Augmentation
from data.config import AudioConfig, AugmentConfig
from data.frontend import AudioFrontend
from data.store import StorePlan
from data.store_build import cut_cycles

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_RATE = 16000
COLUMNS = ["Filename", "CycleIndex", "CycleStart", "CycleEnd", "Recording"]


def paper_frontend(augmented: bool = False) -> AudioFrontend:
    """The front end at the paper's settings."""
    augmentation = Augmentation(AugmentConfig(), SAMPLE_RATE) if augmented else None
    return AudioFrontend(AudioConfig(), 128, 1024, augmentation)


def real_table(limit: int | None = None) -> pd.DataFrame | None:
    """Cycle table of (the first `limit`) real recordings; None where there are none."""
    folder = Path(os.environ.get("ICBHI_ROOT", ROOT.parent / "shared" / "icbhi")) / "recordings"
    rows = []
    for path in sorted(folder.glob("*.wav"))[:limit]:
        times = np.loadtxt(path.with_suffix(".txt"), ndmin=2)[:, :2]
        rows += [(path.stem, i, start, end, str(path)) for i, (start, end) in enumerate(times)]
    return pd.DataFrame(rows, columns=COLUMNS) if rows else None


def synthetic_clip(seed: int, seconds: float = 10.0) -> np.ndarray:
    """Low-passed noise that swells and fades every three seconds: [n] float32 at 16 kHz."""
    n = int(seconds * SAMPLE_RATE)
    noise = np.random.default_rng(seed).standard_normal(n)
    noise = np.convolve(noise, np.hanning(33), mode="same")
    swell = np.sin(np.pi * np.arange(n) / (3 * SAMPLE_RATE)) ** 2
    return (0.02 * noise * (0.1 + swell)).astype(np.float32)


def written_table(
    folder: Path, *, recordings: int, cycles: int, rate: int = SAMPLE_RATE, seconds: float = 4.0
) -> pd.DataFrame:
    """Write noise recordings with that many cycles in total; their cycle table."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.resize(synthetic_clip(0), int(seconds * rate))
    rows = []
    for number, part in enumerate(np.array_split(np.arange(cycles), recordings)):
        path = folder / f"{number:04}.wav"
        soundfile.write(path, np.roll(noise, 97 * number), rate)
        edges = np.linspace(0, seconds, len(part) + 1)
        rows += [(path.stem, i, edges[i], edges[i + 1], str(path)) for i in range(len(part))]
    return pd.DataFrame(rows, columns=COLUMNS)


def clips_for_benchmark(batch: int) -> tuple[Tensor, str]:
    """[batch, 160000] float32, and what they are. Cycles are tiled to the length of a clip."""
    samples = 10 * SAMPLE_RATE
    table = real_table(limit=8)
    if table is None:
        return torch.from_numpy(np.stack([synthetic_clip(i) for i in range(batch)])), "synthetic"
    plan = StorePlan.of(table, SAMPLE_RATE, "torchaudio")
    cycles = [
        cycle for number in range(len(plan.recordings)) for cycle in cut_cycles(plan.job(number))[0]
    ]
    picked = [cycles[i % len(cycles)] for i in range(0, batch * 5, 5)]
    return torch.from_numpy(np.stack([np.resize(c, samples) for c in picked])), "real"
