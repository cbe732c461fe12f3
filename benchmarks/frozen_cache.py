"""Epochs on a frozen backbone with and without its cached features, at the paper's model size.

    python -m benchmarks.frozen_cache [--clips 4] [--rounds 3] [--threads 2]

For AST and GRF with every block frozen, and for FiLM and SoftFiLM with every block frozen and the
last two conditioned: the time of one training epoch (`Trainer`'s own, the front end included where
it runs) over a few clips, without the cache and, in turn with it, with the cache filled. The first
epoch, which fills it, costs as much as one without.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.loop_overhead import corpus
from benchmarks.timing import interleave, print_result
from data.loader import Cycles
from utils.config.schema import RunConfig, load_config
from utils.tracking import Tracker
from utils.training.assemble import build_inputs, build_model
from utils.training.checkpointer import Checkpointer
from utils.training.device import Runtime
from utils.training.inputs import FrozenInputs
from utils.training.runfolder import RunFolder
from utils.training.signals import Signals
from utils.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
#: name: configuration file, further words, how much faster it has to be
CASES = {
    "ast": ("ast_config", (), 20.0),
    "grf": ("ast_fus_config", (), 20.0),
    "film_last_2": ("ast_film_config", ("models.ast_film.conditioned_layers=last_2",), 4.0),
    "softfilm_last_2": (
        "ast_film_soft_config",
        ("models.ast_softfilm.conditioned_layers=last_2",),
        4.0,
    ),
}
FROZEN = (
    "augment.enabled=false",
    "backbone.weights=none",  # speed does not depend on them
    "backbone.trainable_blocks=0",
    "training.precision=fp32",
    "training.device=cpu",
    "training.warmup_epochs=0",
    "dataset.cycle_metadata_path=null",
)


def frozen_trainer(
    config: RunConfig,
    data: Cycles,
    folder: Path,
    rows: np.ndarray,
    runtime: Runtime | None = None,
) -> Trainer:
    """The loop over `rows` only; on the CPU in fp32, or on another runtime."""
    runtime = runtime or Runtime("cpu", "fp32", "false")
    torch.manual_seed(0)
    model = build_model(config, data.statistics)
    inputs = build_inputs(config, data, model, runtime)
    checkpointer = Checkpointer(RunFolder(folder), runtime, {})
    trainer = Trainer(config, data, model, inputs, runtime, checkpointer, Tracker())
    trainer.rows, trainer.classes = rows, data.classes(rows)
    trainer.steps_per_epoch = -(-len(rows) // config.dataset.batch_size)
    trainer.signals = Signals(runtime.device, 1, 1e9)
    return trainer


def measure(
    name: str,
    folder: Path,
    data: Cycles,
    clips: int,
    rounds: int,
    runtime: Runtime | None = None,
    overrides: tuple[str, ...] = (),
) -> dict[str, float]:
    """Seconds per epoch without and with the cache, and their ratio."""
    file, words, _ = CASES[name]
    rows = data.split.train[:clips]
    epochs = {}
    for kind, cached in (("uncached", "false"), ("cached", "true")):
        config = load_config(
            [ROOT / "configs" / f"{file}.yaml"],
            [
                *FROZEN,
                *words,
                f"dataset.data_folder={folder / 'corpus'}",
                f"dataset.cache_dir={folder / 'cache'}",
                f"training.frozen_cache={cached}",
                *overrides,
            ],
        )
        trainer = frozen_trainer(config, data, folder / "run", rows, runtime)
        if isinstance(trainer.inputs, FrozenInputs) != (kind == "cached"):
            raise RuntimeError(f"{name}: the cache is not what was asked for")
        trainer.inputs.prepare(rows)

        def epoch(trainer: Trainer = trainer) -> None:
            trainer.progress.step, trainer.seen = 0, []
            trainer._train_epoch()

        epochs[kind] = epoch
    times = interleave(epochs, rounds=rounds, warmup=1, device=trainer.runtime.device)
    return {
        f"{name}_uncached_s": times["uncached"].median,
        f"{name}_cached_s": times["cached"].median,
        f"{name}_times_faster": times["cached"].ratio(times["uncached"]),
        f"{name}_spread": times["cached"].ratio_spread(times["uncached"]),
        f"{name}_wanted": CASES[name][2],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    result: dict[str, float] = {"clips": args.clips, "threads": args.threads}
    with tempfile.TemporaryDirectory() as folder:
        _, data = corpus(Path(folder))
        for name in args.cases:
            result |= measure(name, Path(folder), data, args.clips, args.rounds)
    print_result(result)


if __name__ == "__main__":
    main()
