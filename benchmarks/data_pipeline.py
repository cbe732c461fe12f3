"""The data path from recordings to log-mels: building, opening, throughput, memory.

    python -m benchmarks.data_pipeline [--device cpu|cuda] [--threads 2] [--rounds 20] [--profile]

* build: decode, resample and store the recordings at hand, by the hour of audio;
* open: a finished store of 920 recordings and 6,898 cycles (ICBHI's size, generated);
* clips/s: batches of 16 from the store through padding and log-mel, plain and augmented in turn
  (`forward` of the front end; augmentation at the configuration's default probabilities); beside
  it the processor time per clip, which other programs on the same cores do not change as much;
* memory: largest resident size of a process that builds a store of 500 or of 5,000 cycles and
  sends every cycle through the augmented front end.

With --profile it prints instead where the processor time of plain and of augmented batches goes,
operation by operation, on one thread.

Real recordings are taken from ICBHI_ROOT or ../shared/icbhi where there are any, noise else.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.recordings import SAMPLE_RATE, real_table, written_table
from benchmarks.timing import interleave, print_result
from data.augment import Augmentation
from data.frontend import AudioFrontend
from data.store import WaveformStore
from data.store_build import open_store

BATCH = 16


def batch_of(store: WaveformStore, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Cycles of a store as (waveform [B, S], length [B]), cut at 10 s."""
    lengths = np.minimum(store.lengths[rows], 10 * SAMPLE_RATE)
    waveform = np.zeros((len(rows), lengths.max()), np.float32)
    store.read(rows, waveform)
    return torch.from_numpy(waveform), torch.from_numpy(lengths)


def measure_build(table: pd.DataFrame, folder: Path) -> tuple[float, WaveformStore]:
    """Seconds to build, and the store."""
    start = time.perf_counter()
    store = open_store(table, cache_dir=folder, progress=False)
    return time.perf_counter() - start, store


def measure_open(folder: Path) -> float:
    """Median seconds to open a finished store of ICBHI's size."""
    table = written_table(folder / "many", recordings=920, cycles=6898)
    open_store(table, cache_dir=folder, workers=1, progress=False)
    opened = interleave(
        {"open": lambda: open_store(table, cache_dir=folder)}, rounds=5, warmup=1
    )  # fmt: skip
    return opened["open"].median


def measure_throughput(store: WaveformStore, device: str, rounds: int) -> dict[str, float]:
    """Clips/s from the store to log-mel on the device."""
    frontend = AudioFrontend(augmentation=Augmentation()).to(device)
    random = np.random.default_rng(0)
    seeds = iter(range(1_000_000))

    def step(augmented: bool) -> None:
        waveform, length = batch_of(store, random.choice(len(store), BATCH, replace=False))
        seed = next(seeds) if augmented else None
        frontend(waveform.to(device), length.to(device), seed)

    times = interleave(
        {"plain": lambda: step(False), "augmented": lambda: step(True)},
        rounds=rounds,
        device=device,
    )
    cpu = {name: statistics.mean(timing.cpu_seconds) / BATCH for name, timing in times.items()}
    # means: every augmented batch draws something else, and all of them must be paid
    return {
        "clips_per_s": BATCH / statistics.mean(times["plain"].seconds),
        "augmented_clips_per_s": BATCH / statistics.mean(times["augmented"].seconds),
        "cpu_ms_per_clip": 1000 * cpu["plain"],
        "augmented_cpu_ms_per_clip": 1000 * cpu["augmented"],
    }


def print_profile(store: WaveformStore, rounds: int) -> None:
    """Milliseconds per clip of each torch operation itself, largest first."""
    torch.set_num_threads(1)  # the profiler sees its own thread only
    frontend = AudioFrontend(augmentation=Augmentation())
    random = np.random.default_rng(0)
    for name, augmented in (("plain", False), ("augmented", True)):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for seed in range(rounds):
                rows = random.choice(len(store), BATCH, replace=False)
                frontend(*batch_of(store, rows), seed if augmented else None)
        spent = {e.key: e.self_cpu_time_total / 1000 / rounds / BATCH
                 for e in profiler.key_averages()}  # fmt: skip
        print(f"\n{name}: {sum(spent.values()):.2f} ms per clip in torch operations")
        for key, milliseconds in sorted(spent.items(), key=lambda item: -item[1])[:12]:
            print(f"  {key:36}{milliseconds:8.3f}")


def peak_memory(cycles: int) -> float:
    """MB that a fresh process needs at most for a store of so many cycles, read to the end."""
    command = [sys.executable, "-m", "benchmarks.data_pipeline", "--memory-of", str(cycles)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])["peak_mb"]


def memory_child(cycles: int) -> None:
    """What `peak_memory` starts."""
    torch.set_num_threads(1)
    frontend = AudioFrontend(augmentation=Augmentation())
    with tempfile.TemporaryDirectory() as name:
        table = written_table(
            Path(name) / "sound", recordings=cycles // 5, cycles=cycles, rate=8000
        )
        store = open_store(table, cache_dir=name, workers=1, progress=False)
        for start in range(0, len(store), BATCH):
            rows = np.arange(start, min(start + BATCH, len(store)))
            seed = start % (20 * BATCH)  # both sizes meet the same draws, rare heaps of them too
            frontend(*batch_of(store, rows), seed)
    print_result({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        memory_child(args.memory_of)
        return
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = real_table()
        source = "generated" if table is None else "real"
        if table is None:
            table = written_table(folder / "few", recordings=24, cycles=168, rate=44100, seconds=20)
        seconds, store = measure_build(table, folder)
        if args.profile:
            print_profile(store, args.rounds)
            return
        hours = table.groupby("Recording")["CycleEnd"].max().sum() / 3600
        print_result(
            {
                "device": args.device,
                "threads": args.threads,
                "recordings": source,
                "audio_hours": hours,
                "build_s": seconds,
                "build_s_per_hour_of_audio": seconds / hours,
                "open_s_6898_cycles": measure_open(folder),
                **measure_throughput(store, args.device, args.rounds),
                "peak_mb_500_cycles": peak_memory(500),
                "peak_mb_5000_cycles": peak_memory(5000),
            }
        )


if __name__ == "__main__":
    main()
