"""The data path from recordings to log-mels: building, opening, throughput.

    python -m benchmarks.data [--device cpu|cuda] [--threads 2] [--rounds 20]

* build: decode, resample and store the available recordings, per hour of audio;
* open: a finished store of 920 recordings and 6,898 cycles (ICBHI's size, generated);
* clips/s: batches of 16 from the store through padding and log-mel, plain and augmented in turn
  (augmentation at its default probabilities), and the processor time per clip.

Real recordings are taken from ICBHI_ROOT or ../shared/icbhi where there are any, noise otherwise.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import count
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import interleave, print_result
from benchmarks.recordings import SAMPLE_RATE, paper_frontend, real_table, written_table
from data.store import WaveformStore
from data.store_build import open_store

BATCH = 16


def batch_of(store: WaveformStore, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
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
