"""The data path from recordings to log-mels: building, opening, throughput.

    python -m benchmarks.data [--device cpu|cuda] [--threads 2] [--rounds 20]

* build: decode, resample and store the available recordings, per hour of audio;
* open: a finished store of 920 recordings and 6,898 cycles (ICBHI's size, generated);
* clips/s: batches of 16 from the store through padding and log-mel, plain and augmented in turn
  (augmentation at its default probabilities), and the processor time per clip.

Real recordings are taken from ICBHI_ROOT or ../shared/icbhi where there are any, noise otherwise.
"""

from __future__ import annotations

import os
import tempfile
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import torch
from torch import Tensor

from benchmarks.harness import interleave, options, print_result
from data.augment import Augmentation
from data.config import AudioConfig, AugmentConfig
from data.frontend import AudioFrontend
from data.store import StorePlan, WaveformStore
from data.store_build import cut_cycles, open_store

BATCH = 16
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


def batch_of(store: WaveformStore, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Cycles of a store as (waveform [B, S], length [B]), cut at 10 s."""
    lengths = np.minimum(store.lengths[rows], 10 * SAMPLE_RATE)
    waveform = np.zeros((len(rows), lengths.max()), np.float32)
    store.read(rows, waveform)
    return torch.from_numpy(waveform), torch.from_numpy(lengths)


def measure_open(folder: Path) -> float:
    """Median seconds to open a finished store of ICBHI's size."""
    table = written_table(folder / "many", recordings=920, cycles=6898)
    open_store(table, cache_dir=folder, workers=1, progress=False)
    opened = {"open": lambda: open_store(table, cache_dir=folder)}
    return interleave(opened, rounds=5, warmup=1)["open"].clock.median


def throughput(store: WaveformStore, device: str, rounds: int) -> dict[str, float]:
    """Clips/s and processor ms per clip, from the store to log-mel on the device.

    Means: every augmented batch draws something else, and all of them have to be paid for.
    """
    frontend = paper_frontend(augmented=True).to(device)
    random, seeds = np.random.default_rng(0), count()

    def step(augmented: bool) -> None:
        waveform, length = batch_of(store, random.choice(len(store), BATCH, replace=False))
        seed = next(seeds) if augmented else None
        frontend(waveform.to(device), length.to(device), seed)

    calls = {"": lambda: step(False), "augmented_": lambda: step(True)}
    result = {}
    for name, times in interleave(calls, rounds=rounds).items():
        result[f"{name}clips_per_s"] = BATCH / times.clock.mean
        result[f"{name}cpu_ms_per_clip"] = 1000 * times.processor.mean / BATCH
    return result


def main() -> None:
    """Measure and print."""
    args = options(__doc__, device="cpu", threads=2, rounds=20)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder, table, source = Path(name), real_table(), "real"
        if table is None:
            few = {"recordings": 24, "cycles": 168, "rate": 44100, "seconds": 20}
            table, source = written_table(folder / "few", **few), "generated"
        stores: list[WaveformStore] = []

        def build() -> None:
            stores.append(open_store(table, cache_dir=folder, progress=False))

        seconds = interleave({"build": build}, rounds=1, warmup=0)["build"].clock.median
        hours = table.groupby("Recording")["CycleEnd"].max().sum() / 3600
        print_result(
            {
                **{key: getattr(args, key) for key in ("device", "threads")},
                "recordings": source,
                "audio_hours": hours,
                "build_s": seconds,
                "build_s_per_hour_of_audio": seconds / hours,
                "open_s_6898_cycles": measure_open(folder),
                **throughput(stores[0], args.device, args.rounds),
            }
        )


if __name__ == "__main__":
    main()
