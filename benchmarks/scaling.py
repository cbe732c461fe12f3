"""Training throughput of one process and of two, at the same global batch.

    python -m benchmarks.scaling [--rounds 3] [--clips 32] [--width 384] [--depth 6]

Each process computes with one thread (gloo, CPU), so two processes have twice the cores of one.
`efficiency` is the speed-up over two: 1 would be ideal. The figure says what data parallelism
itself costs (the exchange of gradients, the flags, the shared batch), and needs two idle cores.
One and two processes take turns; each reports the mean over the epochs after its first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.harness import interleave, options, print_result, spread
from benchmarks.loop import ROOT, configure, corpus, rates, some_rows
from utils.training.assemble import build_data, build_trainer
from utils.training.device import Runtime


def worker(args: argparse.Namespace) -> None:
    """Train some epochs in this process (and its peers); the first process writes the rate."""
    torch.set_num_threads(1)
    words = ("augment.enabled=false", "training.epochs=3", f"backbone.embed_dim={args.width}")
    config = configure("ast", Path(args.folder), *words, f"backbone.depth={args.depth}")
    runtime = Runtime("cpu", "fp32", "false")
    found = rates(build_trainer(config, some_rows(build_data(config), args.clips), runtime))
    if runtime.is_main:
        content = {"processes": runtime.world, "clips_per_s": statistics.harmonic_mean(found)}
        Path(args.folder, "rate.json").write_text(json.dumps(content))
    if runtime.world > 1:
        torch.distributed.destroy_process_group()


def seconds_per_clip(processes: int, args: argparse.Namespace) -> float:
    """One contestant's turn."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", "-m", "benchmarks.scaling"]
    for name in ("folder", "clips", "width", "depth"):
        command += [f"--{name}", str(getattr(args, name))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stderr=subprocess.DEVNULL)
    found = json.loads(Path(args.folder, "rate.json").read_text())
    if found["processes"] != processes:
        raise RuntimeError(f"{found['processes']} processes trained, not {processes}")
    return 1 / found["clips_per_s"]


def main() -> None:
    """Measure and print; --folder: called by `seconds_per_clip`."""
    args = options(__doc__, rounds=3, clips=32, width=384, depth=6, folder="")
    if args.folder:
        worker(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        corpus(configure("ast", Path(folder)))  # the store is built once
        calls = {str(n): lambda n=n: seconds_per_clip(n, args) for n in (1, 2)}
        times = interleave(calls, rounds=args.rounds, warmup=0)
    speed_up = times["2"].faster(times["1"])
    print_result(
        {
            "clips_per_s_one": 1 / times["1"].clock.median,
            "clips_per_s_two": 1 / times["2"].clock.median,
            "speed_up": speed_up.median,
            "efficiency": speed_up.median / 2,
            "spread": spread(speed_up),
            "cores": os.cpu_count() or 1,
        }
    )


if __name__ == "__main__":
    main()
