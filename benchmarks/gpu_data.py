"""Sections of benchmarks.gpu about data and the loop: front end, overhead, cache, training.

Each function gives (name, figures) part by part, the most important first.
"""

from __future__ import annotations

import gc
import shutil
import statistics
import time
import warnings
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu_runner import Parts, Setting
from benchmarks.timing import interleave

ROOT = Path(__file__).resolve().parent.parent
#: of --quick: a transformer and clips that take no time
TINY = (
    "audio.clip_seconds=1.0",
    "backbone.freq_stride=100",
    "backbone.time_stride=100",
    "backbone.embed_dim=24",
    "backbone.depth=2",
    "backbone.num_heads=2",
)


# ---------------------------------------------------------------------- front end


def frontend(setting: Setting) -> Parts:
    """Clips/s of 10 s clips, by batch; torchaudio's call on the CPU takes its turn."""
    from benchmarks.frontend import torchaudio_log_mel
    from benchmarks.recordings import clips_for_benchmark
    from data.augment import Augmentation
    from data.frontend import AudioFrontend

    front = AudioFrontend(augmentation=Augmentation()).to(setting.device)
    seeds = count()
    for batch in (2,) if setting.quick else (64, 16, 256):
        clips, source = clips_for_benchmark(batch)
        own = clips.to(setting.device)
        length = torch.full((batch,), clips.shape[1], device=setting.device)
        times = interleave(
            {
                "log_mel": lambda own=own: front.log_mel(own),
                "front_end": lambda own=own, length=length: front(own, length),
                "augmented": lambda own=own, length=length: front(own, length, next(seeds)),
                "torchaudio_cpu": lambda clips=clips: [torchaudio_log_mel(c) for c in clips],
            },
            rounds=2 if setting.quick else 10,
            device=setting.device,
        )
        figures = {f"{name}_clips_per_s": batch / t.median for name, t in times.items()}
        # a mean: every augmented batch draws something else, and all of them must be paid
        figures["augmented_clips_per_s"] = batch / statistics.mean(times["augmented"].seconds)
        figures["times_torchaudio"] = times["front_end"].ratio(times["torchaudio_cpu"])
        figures["spread"] = times["front_end"].ratio_spread(times["torchaudio_cpu"])
        yield f"batch {batch}", {**figures, "clips": source}


# ---------------------------------------------------------------------- loop


def loop(setting: Setting) -> Parts:
    """Time per batch around a model without work; then whether a step waits for the device."""
    from benchmarks.loop_overhead import corpus, measure, stub_trainer
    from utils.training.device import Runtime

    runtime = Runtime(setting.device, "fp32", "false")
    config, data = corpus(setting.folder)
    trainer = stub_trainer(config, data, setting.folder / "stub", runtime)
    yield "stub", measure(trainer, rounds=1 if setting.quick else 10)
    if setting.device != "cuda":
        return
    yield "stub, synchronisation", _waits(trainer)
    for path in _configurations():
        for name, words in (("", ("augment.enabled=false",)), (", augmented", ())):
            trainer = _trainer(setting, path, data, "false", "backbone.depth=2", *words)
            yield f"{trainer.config.variant}{name}, synchronisation", _waits(trainer)


def _waits(trainer, warm_up: int = 3) -> dict[str, str]:
    """Places in a step's body, after the first steps, at which the host waits for the device.

    CUDA's debug mode names them; "warn" goes on after the first, so that all are listed.
    """
    from utils.training.signals import Signals

    step, found = trainer._step, set()

    def watched(parts, batches):
        if trainer.progress.step < warm_up:
            return step(parts, batches)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                return step(parts, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            for warning in caught:
                if "synchroniz" in str(warning.message):
                    found.add(f"{_short(warning.filename)}:{warning.lineno}")

    trainer._step = watched
    trainer.signals = Signals(trainer.runtime.device, 1, 1e9)
    trainer.progress.step, trainer.seen = 0, []
    trainer._train_epoch()
    steps = trainer.progress.step - warm_up
    if steps < 1:
        raise RuntimeError(f"an epoch of {trainer.progress.step} steps is too short to watch")
    return {"synchronisations": ", ".join(sorted(found)) or "none", "steps_watched": steps}


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else "/".join(path.parts[-3:])


# ---------------------------------------------------------------------- frozen cache


def frozen_cache(setting: Setting) -> Parts:
    """An epoch on a frozen backbone without and with its cached features, in turn; eager."""
    from benchmarks import frozen_cache as cache
    from benchmarks.loop_overhead import corpus
    from utils.training.device import Runtime

    runtime = Runtime(setting.device, "auto", "false")
    _, data = corpus(setting.folder)
    tiny = TINY if setting.quick else ()
    clips = 16 if setting.quick else len(data.split.train)
    for name in cache.CASES:
        figures = cache.measure(
            name, setting.folder, data, clips, 2 if setting.quick else 5, runtime, tiny
        )
        del figures[f"{name}_wanted"]  # of a CPU
        yield name, {key.removeprefix(f"{name}_"): value for key, value in figures.items()}


# ---------------------------------------------------------------------- training


def training(setting: Setting) -> Parts:
    """Some epochs of each variant with the real loop: waveforms, augmentation, step, evaluation.

    Random weights and a synthetic corpus, its training cycles repeated to a fair number: a rate,
    a memory, a loss that falls, and nothing about how well anything classifies. Compiled runs
    come last; their first epoch, with the compilation, does not count in the rate.
    """
    from benchmarks.loop_overhead import corpus
    from data.splits import Split

    _, data = corpus(setting.folder, *(TINY if setting.quick else ()))
    split = data.split
    cycles = np.resize(split.train, 32 if setting.quick else 1024)
    data = replace(data, split=Split(cycles, split.val, split.test))
    for compiled in ("false",) if setting.device == "cpu" else ("false", "true"):
        for path in _configurations():
            trainer = _trainer(
                setting,
                path,
                data,
                compiled,
                f"training.epochs={2 if setting.quick else 4}",
                "training.lr=1e-4",
                "training.warmup_epochs=0.5",
            )
            name = trainer.config.variant + (", compiled" if compiled == "true" else "")
            yield name, _train(trainer)


def _train(trainer) -> dict[str, float | bool | str]:
    """Train to the end; rate over the epochs after the first."""
    cuda, compiled = trainer.runtime.device.type == "cuda", trainer.runtime.compiled
    if compiled:  # of a function only so many versions are kept; earlier models' do not count
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    history = trainer.fit().history
    seconds = time.perf_counter() - began
    shutil.rmtree(trainer.checkpointer.folder.path)  # weights and optimiser at full size: 1.4 GB
    rates = [row["train_clips_per_s"] for row in history[1:]]
    losses = [row["train_loss"] for row in history]
    figures = {
        "clips_per_s": statistics.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "loss_falls": losses[-1] < losses[0],
        "seconds_in_all": seconds,
    }
    if cuda:
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if compiled:
        frames = torch._dynamo.utils.counters["frames"]
        figures["frames_compiled"] = f"{frames['ok']} of {frames['total']}"
    return figures


def _configurations() -> list[Path]:
    """The shipped configuration of every variant."""
    return sorted((ROOT / "configs").glob("*_config.yaml"))


def _trainer(setting: Setting, path: Path, data, compiled: str, *words: str):
    """The real loop for a shipped configuration, over `data`."""
    from utils.config.schema import load_config
    from utils.runs.run import Run
    from utils.tracking import Tracker
    from utils.training.assemble import build_inputs, build_model
    from utils.training.checkpointer import Checkpointer
    from utils.training.device import Runtime
    from utils.training.trainer import Trainer

    fixed = (
        f"dataset.data_folder={setting.folder / 'corpus'}",
        "dataset.cycle_metadata_path=null",
        f"dataset.cache_dir={setting.folder / 'cache'}",
        f"training.output_dir={setting.folder / 'runs'}",
        f"training.device={setting.device}",
        f"training.compile={compiled}",
        "backbone.weights=none",
        "mlflow.enabled=false",
        "training.warmup_epochs=0",
    )
    config = load_config([path], fixed)
    if hasattr(config.model, "conditioned_layers"):  # a list for twelve blocks
        words += (f"models.{config.variant}.conditioned_layers=all",)
    if setting.quick:
        words += TINY
    config = load_config([path], [*fixed, *words])
    runtime = Runtime(setting.device, config.training.precision, compiled)
    torch.manual_seed(0)
    model = build_model(config, data.statistics)
    inputs = build_inputs(config, data, model, runtime)
    run = Run(config, runtime)
    checkpointer = Checkpointer(run.folder, runtime, run._describe(data))
    return Trainer(config, data, model, inputs, runtime, checkpointer, Tracker())
