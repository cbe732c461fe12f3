"""What torch.compile costs and gives: not at all, the whole model, each block by itself.

    python -m benchmarks.compile [--device cpu|cuda] [--depth 2] [--width 768] [--frames 1024]
                                 [--batch 1] [--rounds 5] [--threads 1]

`first_step_s` is a model's first training step (forward, backward, update) with the compilation,
whose caches are off; then the three take turns.
"""

from __future__ import annotations

import json
import time

import torch
from torch._inductor import config as inductor

from benchmarks.harness import interleave, options, rounded, spread, table
from benchmarks.model_step import N_MELS, Conditioned, Size, action, our_model, some_metadata
from utils.training.device import Runtime

MODES = ("false", "true", "blocks")


def main() -> None:
    """Measure and print."""
    given = {"depth": 2, "width": 768, "heads": 12, "frames": 1024, "batch": 1, "rounds": 5}
    args = options(
        __doc__, device="cuda" if torch.cuda.is_available() else "cpu", threads=1, **given
    )
    torch.set_num_threads(args.threads)
    inductor.force_disable_caches = True
    size = Size(args.depth, args.width, args.heads, args.frames)
    x = torch.randn(args.batch, 1, N_MELS, args.frames, device=args.device)
    calls, rows = {}, {}
    for mode in MODES:
        torch.manual_seed(0)
        runtime = Runtime(args.device, "fp32", mode)
        model = runtime.prepare(our_model("ast_film", size))
        metadata = some_metadata(args.batch, args.device)
        calls[mode] = action(Conditioned(model, metadata).train(), x, "step", "fp32", args.device)
        start = time.perf_counter()
        calls[mode]()
        if args.device == "cuda":
            torch.cuda.synchronize()
        rows[mode] = {"first_step_s": time.perf_counter() - start}
    times = interleave(calls, rounds=args.rounds, warmup=1)
    for mode, own in times.items():
        ratio = times["false"].faster(own)
        rows[mode] |= {"step_s": own.clock.median, "time_over_eager": ratio.median}
        rows[mode]["spread"] = spread(ratio)
    print(table(rows))
    print(json.dumps(rounded({**{key: getattr(args, key) for key in given}, **rows})))


if __name__ == "__main__":
    main()
