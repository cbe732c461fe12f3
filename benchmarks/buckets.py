"""What length buckets save: a step of each width, an epoch of ICBHI's lengths, and a real epoch.

    python -m benchmarks.buckets --icbhi DIR [--parts step epoch] [--depth 2] [--batch 2]
                                 [--rounds 5] [--threads 1]

* step: training steps of the plain AST of width 768 on spectrograms of 1,024, 512 and 256 frames in
  turn. Seconds per clip of each, times the cycles of each bucket among the annotations' official
  training part, dealt into batches of 16 as the loop does it, are an epoch's arithmetic.
* epoch: one epoch of the real loop over the training cycles whose recordings are there, from the
  waveform store to the update, with a single length and with buckets; the two take turns step by
  step.
"""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import interleave, options, print_result, spread
from benchmarks.loop import ROOT
from benchmarks.model_step import N_MELS, Conditioned, Size, action, our_model, some_metadata
from data.corpora.icbhi import read_cycles
from data.loader import buckets_of, epoch_order, epoch_plan
from utils.common.cli import quiet
from utils.config.schema import RunConfig, load_config
from utils.training.assemble import build_data, build_trainer
from utils.training.device import Runtime

BUCKETS, BATCH = (2.5, 5.0, 10.0), 16


def steps(
    size: Size, batch: int, rounds: int, device: str = "cpu", precision: str = "fp32"
) -> tuple[dict[str, float], np.ndarray]:
    """Figures, and seconds per clip of a training step of each bucket."""
    model = Conditioned(our_model("ast", size), some_metadata(batch, device)).to(device).train()
    calls = {}
    for seconds in BUCKETS:
        frames = round(size.n_frames * seconds / BUCKETS[-1])
        x = torch.randn(batch, 1, N_MELS, frames, device=device)
        calls[f"{seconds:g}s"] = action(model, x, "step", precision, device)
    times = interleave(calls, rounds=rounds, warmup=1)
    longest = times[f"{BUCKETS[-1]:g}s"]
    result = {}
    for name, own in times.items():
        ratio = own.faster(longest)
        result |= {f"{name}_step_s": own.clock.median, f"{name}_times_faster": ratio.median}
        result[f"{name}_spread"] = spread(ratio)
    ratios = [times[name].faster(longest).median for name in calls]
    return result, longest.clock.median / batch / np.array(ratios)


def epoch_of_icbhi(folder: str, per_clip: np.ndarray) -> dict[str, float]:
    """Batches of 16 in each bucket of the official training part, and what an epoch takes."""
    table = read_cycles(folder, require_audio=False)
    seconds = table.loc[table["Split"] == "train", "Duration"].to_numpy()
    bucket = buckets_of(seconds, BUCKETS)
    order = epoch_order(np.arange(len(seconds)), bucket, epoch=0, seed=0, sampler="shuffle")
    plan = epoch_plan(order, batch_size=BATCH, bucket=bucket)
    parts = [(bucket[part.rows[0]], len(part.rows)) for step in plan for part in step]
    counts = {f"{s:g}s_cycles": int((bucket == i).sum()) for i, s in enumerate(BUCKETS)}
    batches = np.bincount([number for number, _ in parts], minlength=len(BUCKETS))
    counts |= {f"{s:g}s_batches": int(n) for s, n in zip(BUCKETS, batches, strict=True)}
    single = len(seconds) * per_clip[-1]
    grouped = sum(n * per_clip[number] for number, n in parts)
    return counts | {
        "steps": len(plan),
        "single_epoch_s": single,
        "buckets_epoch_s": grouped,
        "epoch_times_faster": single / grouped,
    }


def configure(folder: str, cache: Path, depth: int, buckets: str) -> RunConfig:
    """The shipped plain AST without weights, of so many blocks."""
    words = (
        f"dataset.data_folder={folder}",
        f"dataset.cache_dir={cache}",
        *("dataset.cycle_metadata_path=null", "dataset.store_workers=1", "backbone.weights=none"),
        *("mlflow.enabled=false", "training.checkpoint_minutes=1e6", f"audio.buckets={buckets}"),
        *(f"backbone.depth={depth}", f"backbone.trainable_blocks={depth}"),
    )
    return load_config([ROOT / "configs" / "ast_config.yaml"], words)


def real_epoch(folder: str, depth: int, cache: Path) -> dict[str, float]:
    """Seconds by the clock and of the processor of one epoch each, step by step in turn."""
    runs = {}
    for name, buckets in (("single", "null"), ("buckets", str(list(BUCKETS)))):
        config = configure(folder, cache, depth, buckets)
        trainer = build_trainer(config, build_data(config), Runtime("cpu", "fp32", "false"))
        order = epoch_order(
            trainer.rows, trainer.classes, epoch=0, seed=0, sampler=config.training.sampler
        )
        plan = epoch_plan(order, batch_size=BATCH, bucket=trainer.data.bucket)
        batches = trainer.inputs.batches(part.rows for step in plan for part in step)
        trainer.model.train()
        runs[name] = trainer, plan, batches
    spent = {name: np.zeros(2) for name in runs}
    for number in range(len(plan)):
        for name, (trainer, plan, batches) in runs.items():
            start = np.array([time.perf_counter(), time.process_time()])
            trainer.step(plan[number], batches)
            spent[name] += np.array([time.perf_counter(), time.process_time()]) - start
    out = {"cycles": len(trainer.rows), "steps": len(plan)}
    for place, clock in enumerate(("clock", "processor")):
        out |= {f"{name}_{clock}_s": own[place] for name, own in spent.items()}
        out[f"{clock}_times_faster"] = spent["single"][place] / spent["buckets"][place]
    return out


@quiet(logging.ERROR, "")
def main() -> None:
    """Measure and print."""
    given: dict[str, Any] = {"depth": 2, "batch": 2, "rounds": 5, "threads": 1}
    args = options(__doc__, icbhi="icbhi", parts=["step", "epoch"], **given)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {key: getattr(args, key) for key in given}
    if "step" in args.parts:
        found, per_clip = steps(Size(depth=args.depth), args.batch, args.rounds)
        result |= found | epoch_of_icbhi(args.icbhi, per_clip)
    if "epoch" in args.parts:
        with tempfile.TemporaryDirectory() as cache:
            result |= real_epoch(args.icbhi, args.depth, Path(cache))
    print_result(result)


if __name__ == "__main__":
    main()
