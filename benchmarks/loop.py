"""What the training loop costs in addition to the model, and what a cached frozen backbone saves.

    python -m benchmarks.loop [--parts overhead cache] [--rounds N] [--threads 1] [--clips 4]

* overhead: milliseconds per batch of 16. The loop runs as in training (order, plan, reading ahead
  from a waveform store, loss, backward, clipping, fused AdamW, schedule, flags, records), but the
  model is a stub with one vector of parameters and the front end is left out. In turn with it,
  `bare` does only what any loop does with that stub, on a batch that is already in memory.
* cache: AST and GRF with every block frozen, FiLM and SoftFiLM with every block frozen and the last
  two conditioned: seconds per training epoch of the real loop over a few clips, without the cache
  and, in turn with it, with the cache filled. The epoch that fills it costs as much as one without.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.harness import interleave, options, print_result, spread
from data.loader import Cycles
from data.splits import Split
from data.synthetic.corpus import write_corpus
from models.conditioner import Conditioner, Features, ModelOutput, ParameterGroup
from models.method import Methods
from utils.common.cli import quiet
from utils.config.schema import RunConfig, load_config
from utils.training.assemble import build_data, build_trainer
from utils.training.device import Runtime
from utils.training.optim import build_optimizer
from utils.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
STEPS = 60  # batches per epoch of the stub
#: shipped configuration and further words of each case
CACHE_CASES = {
    "ast": ("ast",),
    "grf": ("ast_fus",),
    "film_last_2": ("ast_film", "models.ast_film.conditioned_layers=last_2"),
    "softfilm_last_2": ("ast_film_soft", "models.ast_softfilm.conditioned_layers=last_2"),
}
FROZEN = ("augment.enabled=false", "backbone.trainable_blocks=0")


class Stub(nn.Module):
    """A model without work: the logits are two parameters."""

    cacheable = False

    def __init__(self):
        super().__init__()
        self.conditioner, self.methods = Conditioner(), Methods()
        self.bias = nn.Parameter(torch.zeros(2))

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("stub", [self.bias])]

    def draw(self, *_: Any) -> None:
        """No methods, nothing to draw."""

    def forward(self, features: Features, *_: Any) -> ModelOutput:
        logits = self.bias.expand(len(features.values), 2)
        return ModelOutput(logits, self.conditioner.regularisation())


def configure(name: str, folder: Path, *words: str) -> RunConfig:
    """A shipped configuration on the synthetic corpus in `folder`, without weights or tracking;
    speed does not depend on weights."""
    fixed = (
        f"dataset.data_folder={folder / 'corpus'}",
        f"dataset.cache_dir={folder / 'cache'}",
        *("dataset.cycle_metadata_path=null", "dataset.store_workers=1", "backbone.weights=none"),
        *("mlflow.enabled=false", "training.selection=fixed", "training.warmup_epochs=0"),
        *("training.epochs=2", "training.checkpoint_minutes=1e6"),
    )
    return load_config([ROOT / "configs" / f"{name}_config.yaml"], [*fixed, *words])


def corpus(config: RunConfig) -> Cycles:
    """A small synthetic corpus, its store built."""
    shape = {"patients": 10, "recordings_per_patient": 2, "cycles_per_recording": 5}
    write_corpus(Path(config.dataset.data_folder), seed=0, **shape)
    return build_data(config)


def some_rows(data: Cycles, n: int) -> Cycles:
    """The same corpus with n training cycles, as many of each class, repeated if necessary."""
    rows = data.split.train
    classes = data.classes(rows)
    present = np.unique(classes)
    each = [np.resize(rows[classes == c], -(-n // len(present))) for c in present]
    chosen = np.stack(each, axis=1).ravel()[:n]
    return replace(data, split=Split(chosen, data.split.val, data.split.test))


def rates(trainer: Trainer) -> list[float]:
    """Train; clips/s of each epoch after the first."""
    return [row["train_clips_per_s"] for row in trainer.fit().history[1:]]


def overhead(config: RunConfig, data: Cycles, runtime: Runtime, rounds: int) -> dict[str, float]:
    """Milliseconds per batch of the loop around the stub, and of what any loop does with it."""
    size = config.dataset.batch_size
    data = some_rows(data, STEPS * size)
    stub = Stub().to(runtime.device)
    optimizer = build_optimizer(stub.parameter_groups(), config.training)
    batch = data.batch(data.split.train[:size]).to(runtime.device)

    def loop() -> float:
        trainer = build_trainer(config, data, runtime, model=Stub())
        trainer.inputs.frontend = lambda waveform, length, seed: length
        return STEPS * size / rates(trainer)[-1]

    def bare() -> None:
        for _ in range(STEPS):
            logits = stub(Features(batch.length)).logits
            nn.functional.binary_cross_entropy_with_logits(logits, batch.label).backward()
            nn.utils.clip_grad_norm_([stub.bias], 1.0)
            optimizer.step()
            optimizer.zero_grad()

    times = interleave({"loop": loop, "bare": bare}, rounds=rounds, warmup=1)
    result = {f"{k}_ms_per_batch": 1000 * t.clock.median / STEPS for k, t in times.items()}
    result["added_ms_per_batch"] = result["loop_ms_per_batch"] - result["bare_ms_per_batch"]
    return result | {"spread": spread(times["loop"].clock)}


def cache(
    name: str, folder: Path, data: Cycles, runtime: Runtime, clips: int, rounds: int
) -> dict[str, float]:
    """Seconds per epoch without and with the cache, and their ratio."""
    file, *words = CACHE_CASES[name]
    data = some_rows(data, clips)

    def epoch(cached: str) -> float:
        config = configure(file, folder, *FROZEN, *words, f"training.frozen_cache={cached}")
        return clips / rates(build_trainer(config, data, runtime))[-1]

    calls = {"uncached": lambda: epoch("false"), "cached": lambda: epoch("true")}
    times = interleave(calls, rounds=rounds, warmup=0)
    ratio = times["cached"].faster(times["uncached"])
    result = {f"{name}_{kind}_s": own.clock.median for kind, own in times.items()}
    return result | {f"{name}_times_faster": ratio.median, f"{name}_spread": spread(ratio)}


@quiet(logging.ERROR, "")
def main() -> None:
    """Measure and print."""
    args = options(
        __doc__,
        parts=["overhead", "cache"],
        cases=list(CACHE_CASES),
        **{"rounds": 9, "threads": 1, "clips": 4},
    )
    torch.set_num_threads(args.threads)
    runtime = Runtime("cpu", "fp32", "false")
    result: dict[str, Any] = {"threads": args.threads}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = configure("ast", folder)
        data = corpus(config)
        if "overhead" in args.parts:
            result |= overhead(config, data, runtime, args.rounds)
        for case in args.cases if "cache" in args.parts else ():
            result |= cache(case, folder, data, runtime, args.clips, args.rounds)
    print_result(result)


if __name__ == "__main__":
    main()
