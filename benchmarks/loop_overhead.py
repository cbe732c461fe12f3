"""What the training loop costs beside the model: milliseconds per batch of 16.

    python -m benchmarks.loop_overhead [--rounds 15] [--threads 1]

The loop runs as in training (order, plan, reading ahead from a waveform store, loss, backward,
clipping, fused AdamW, schedule, flags, records, progress), but the model is a stub with one vector
of parameters and the front end is left out. In turn with it, `bare` does only what any loop does
with that stub: forward, loss, backward, clipping, AdamW on a batch that lies in memory. The CPU
figures are the loop's processor time in its own thread and in the one that reads ahead; they hold
on a busy machine too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.timing import interleave, print_result
from data.batch import Metadata
from data.loader import Cycles
from data.synthetic.corpus import write_corpus
from models.conditioner import Conditioner, Features, ModelOutput, ParameterGroup
from utils.config.schema import RunConfig, load_config
from utils.tracking import Tracker
from utils.training.assemble import build_data
from utils.training.checkpointer import Checkpointer
from utils.training.device import Runtime
from utils.training.inputs import Inputs
from utils.training.optim import build_optimizer
from utils.training.runfolder import RunFolder
from utils.training.signals import Signals
from utils.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
STEPS = 60  # batches per measured epoch


class Stub(nn.Module):
    """A model without work: the logits are two parameters."""

    def __init__(self):
        super().__init__()
        self.conditioner = Conditioner()
        self.bias = nn.Parameter(torch.zeros(2))

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("stub", [self.bias])]

    def forward(self, features: Features, metadata: Metadata) -> ModelOutput:
        batch = len(features.values)
        return ModelOutput(self.bias.expand(batch, 2), self.conditioner.regularisation())


def corpus(folder: Path, *overrides: str) -> tuple[RunConfig, Cycles]:
    """A small synthetic corpus at the paper's settings, its store built."""
    write_corpus(folder / "corpus", patients=10, seed=0)
    config = load_config(
        [ROOT / "configs" / "ast_config.yaml"],
        [
            f"dataset.data_folder={folder / 'corpus'}",
            "dataset.cycle_metadata_path=null",
            f"dataset.cache_dir={folder / 'cache'}",
            "dataset.store_workers=1",
            "training.device=cpu",
            "training.warmup_epochs=0",
            *overrides,
        ],
    )
    return config, build_data(config)


def stub_trainer(
    config: RunConfig, data: Cycles, folder: Path, runtime: Runtime | None = None
) -> Trainer:
    """The real loop around the stub, with epochs of `STEPS` batches."""
    runtime = runtime or Runtime("cpu", "fp32", "false")
    inputs = Inputs(nn.Identity(), runtime, data)
    inputs.frontend = lambda waveform, length, seed: length
    checkpointer = Checkpointer(RunFolder(folder), runtime, {})
    trainer = Trainer(config, data, Stub(), inputs, runtime, checkpointer, Tracker())
    size = config.dataset.batch_size * STEPS
    trainer.rows = np.resize(trainer.rows, size)
    trainer.classes = np.resize(trainer.classes, size)
    trainer.steps_per_epoch = STEPS
    trainer.signals = Signals(runtime.device, 1, 1e9)
    return trainer


def measure(trainer: Trainer, rounds: int) -> dict[str, float]:
    """Milliseconds per batch of the loop around the stub, and of what any loop does with it."""
    processor: list[tuple[float, float]] = []  # s of this thread and of all threads

    def loop() -> None:
        trainer.progress.step, trainer.seen = 0, []
        own, every = time.thread_time(), time.process_time()
        trainer._train_epoch()
        processor.append((time.thread_time() - own, time.process_time() - every))

    device, data = trainer.runtime.device, trainer.data
    stub = Stub().to(device)
    optimizer = build_optimizer(stub.parameter_groups(), lr=1e-3, weight_decay=0.01)
    batch = data.batch(data.split.train[: trainer.config.dataset.batch_size]).to(device)

    def bare() -> None:
        for _ in range(STEPS):
            output = stub(Features(batch.length), batch.metadata)
            trainer.loss(output.logits, batch.label).mean().backward()
            nn.utils.clip_grad_norm_([stub.bias], 1.0)
            optimizer.step()
            optimizer.zero_grad()

    times = interleave({"loop": loop, "bare": bare}, rounds=rounds, warmup=2, device=device)
    per_batch = {name: 1000 * timing.median / STEPS for name, timing in times.items()}
    own, every = (
        1000 * statistics.median(column) / STEPS for column in zip(*processor, strict=True)
    )
    return {
        "loop_ms_per_batch": per_batch["loop"],
        "bare_ms_per_batch": per_batch["bare"],
        "added_ms_per_batch": per_batch["loop"] - per_batch["bare"],
        "loop_cpu_ms_per_batch": own,
        "reading_cpu_ms_per_batch": every - own,
        "spread": times["loop"].spread,
        "limit_ms": 1.0,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        config, data = corpus(Path(folder))
        trainer = stub_trainer(config, data, Path(folder) / "run")
        figures = measure(trainer, args.rounds)
    print_result({"threads": args.threads, "batch": config.dataset.batch_size, **figures})


if __name__ == "__main__":
    main()
