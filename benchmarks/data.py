"""The data path from recordings to log-mels: building, opening, throughput, memory.

    python -m benchmarks.data [--device cpu|cuda] [--threads 2] [--rounds 20] [--profile]

* build: decode, resample and store the available recordings, per hour of audio;
* open: a finished store of 920 recordings and 6,898 cycles (ICBHI's size, generated);
* clips/s: batches of 16 from the store through padding and log-mel, plain and augmented in turn
  (augmentation at its default probabilities), and the processor time per clip;
* memory: largest resident size of a process that builds a store of 500 or of 5,000 cycles and
  sends every cycle through the augmented front end.

--profile prints instead the processor time of plain and of augmented batches, operation by
operation, on one thread. Real recordings are taken from ICBHI_ROOT or ../shared/icbhi where there
are any, noise otherwise.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

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


def print_profile(store: WaveformStore, rounds: int) -> None:
    """Milliseconds per clip of each torch operation itself, largest first."""
    torch.set_num_threads(1)  # the profiler sees its own thread only
    frontend, random = paper_frontend(augmented=True), np.random.default_rng(0)
    for name, augmented in (("plain", False), ("augmented", True)):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for seed in range(rounds):
                rows = random.choice(len(store), BATCH, replace=False)
                frontend(*batch_of(store, rows), seed if augmented else None)
        averages = profiler.key_averages()
        spent = {e.key: e.self_cpu_time_total / 1000 / rounds / BATCH for e in averages}
        print(f"\n{name}: {sum(spent.values()):.2f} ms per clip in torch operations")
        for key, milliseconds in sorted(spent.items(), key=lambda item: -item[1])[:12]:
            print(f"  {key:36}{milliseconds:8.3f}")


def peak_memory(cycles: int) -> float:
    """MB that a fresh process needs at most for a store of so many cycles, read to the end."""
    command = [sys.executable, "-m", "benchmarks.data", "--memory-of", str(cycles)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])["peak_mb"]


def memory_child(cycles: int) -> None:
    """What `peak_memory` starts."""
    torch.set_num_threads(1)
    frontend = paper_frontend(augmented=True)
    with tempfile.TemporaryDirectory() as name:
        sound = Path(name) / "sound"
        table = written_table(sound, recordings=cycles // 5, cycles=cycles, rate=8000)
        store = open_store(table, cache_dir=name, workers=1, progress=False)
        for start in range(0, len(store), BATCH):
            rows = np.arange(start, min(start + BATCH, len(store)))
            # both sizes get the same draws, including the rare accumulations of them
            frontend(*batch_of(store, rows), start % (20 * BATCH))
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
        folder, table, source = Path(name), real_table(), "real"
        if table is None:
            few = {"recordings": 24, "cycles": 168, "rate": 44100, "seconds": 20}
            table, source = written_table(folder / "few", **few), "generated"
        stores: list[WaveformStore] = []

        def build() -> None:
            stores.append(open_store(table, cache_dir=folder, progress=False))

        seconds = interleave({"build": build}, rounds=1, warmup=0)["build"].clock.median
        if args.profile:
            print_profile(stores[0], args.rounds)
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
                **throughput(stores[0], args.device, args.rounds),
                "peak_mb_500_cycles": peak_memory(500),
                "peak_mb_5000_cycles": peak_memory(5000),
            }
        )


if __name__ == "__main__":
    main()
