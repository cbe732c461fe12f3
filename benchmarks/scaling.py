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
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.frozen_cache import frozen_trainer
from benchmarks.loop_overhead import corpus
from benchmarks.timing import interleave, print_result

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 3


def worker(args: argparse.Namespace) -> None:
    """Train some epochs in this process (and its peers); the first process writes the rate."""
    torch.set_num_threads(1)
    config, data = corpus(
        args.folder,
        "augment.enabled=false",
        "backbone.weights=none",
        f"backbone.embed_dim={args.width}",
        f"backbone.depth={args.depth}",
        "training.frozen_cache=false",
    )
    trainer = frozen_trainer(
        config, data, args.folder / "run", np.resize(data.split.train, args.clips)
    )
    seconds = []
    for _ in range(EPOCHS):
        trainer.progress.step, trainer.seen = 0, []
        trainer.runtime.barrier()
        began = time.perf_counter()
        trainer._train_epoch()
        trainer.runtime.barrier()
        seconds.append(time.perf_counter() - began)
    if trainer.runtime.is_main:
        rate = args.clips * (EPOCHS - 1) / sum(seconds[1:])
        content = {"processes": trainer.runtime.world, "clips_per_s": rate}
        (args.folder / "rate.json").write_text(json.dumps(content))
    if trainer.runtime.world > 1:
        torch.distributed.destroy_process_group()


def run(processes: int, args: argparse.Namespace, rates: list[float]) -> None:
    """One contestant's turn; its rate is appended to `rates`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", "-m", "benchmarks.scaling"]
    command += ["--folder", str(args.folder), "--clips", str(args.clips)]
    command += ["--width", str(args.width), "--depth", str(args.depth)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stderr=subprocess.DEVNULL)
    found = json.loads((args.folder / "rate.json").read_text())
    if found["processes"] != processes:
        raise RuntimeError(f"{found['processes']} processes trained, not {processes}")
    rates.append(found["clips_per_s"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--width", type=int, default=384, help="of the transformer (paper: 768)")
    parser.add_argument("--depth", type=int, default=6, help="blocks (paper: 12)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:  # started by `run`
        worker(args)
        return
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        corpus(args.folder)  # the store is built once
        interleave(
            {str(n): lambda n=n: run(n, args, rates[n]) for n in rates},
            rounds=args.rounds,
            warmup=0,
        )
    speed_ups = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    print_result(
        {
            "clips_per_s_one": float(np.median(rates[1])),
            "clips_per_s_two": float(np.median(rates[2])),
            "speed_up": float(np.median(speed_ups)),
            "efficiency": float(np.median(speed_ups)) / 2,
            "spread": float(np.ptp(speed_ups) / np.median(speed_ups)),
            "cores": os.cpu_count() or 1,
        }
    )


if __name__ == "__main__":
    main()
