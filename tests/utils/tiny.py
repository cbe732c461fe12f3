"""A run small enough to be trained many times in a test: configuration, cycles, model, loop.

Half-second clips of noise and tones in memory, a transformer of two blocks of width 16; one epoch
takes some hundredths of a second. The parts are the real ones, put together as a run does it.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from data.corpora.icbhi import DEVICES, SITES, completeness
from data.loader import Cycles
from data.splits import Split
from data.statistics import MetadataStatistics
from utils.config.schema import RunConfig, config_from_dict, config_to_dict
from utils.tracking import Tracker
from utils.training.assemble import build_trainer, describe_run
from utils.training.build import build_model
from utils.training.checkpoint import Checkpoint, save_checkpoint
from utils.training.checkpointer import Checkpointer
from utils.training.device import Runtime
from utils.training.fingerprint import fingerprint
from utils.training.runfolder import RunFolder
from utils.training.trainer import Trainer

RATE = 16000  # Hz

#: What makes any run tiny; also as command line words, see `words`.
TINY: dict[str, Any] = {
    "dataset.batch_size": 8,
    "dataset.h": 32,
    "dataset.w": 48,
    "audio.clip_seconds": 0.5,
    "augment.freq_mask_width": 8,
    "augment.time_mask_width": 8,
    "backbone.weights": "none",
    "backbone.embed_dim": 16,
    "backbone.depth": 2,
    "backbone.num_heads": 2,
    "backbone.mlp_ratio": 2.0,
    "backbone.freq_stride": 16,
    "backbone.time_stride": 16,
    "backbone.trainable_blocks": 2,
    "training.epochs": 3,
    "training.lr": 1e-3,
    "training.warmup_epochs": 1,
    "training.device": "cpu",
    "mlflow.enabled": False,
}
#: Augmentation that touches most clips, so that a test of exactness would notice it.
LIVELY: dict[str, Any] = {
    f"augment.{name}_probability": 0.5
    for name in ("noise", "speed", "loudness", "vtlp", "specaugment")
}
#: Clips of three lengths, 3, 4 and 5 patches long; each holds some of the cycles.
BUCKETS: dict[str, Any] = {
    "dataset.w": 80,
    "audio.clip_seconds": 0.8,
    "audio.buckets": [0.48, 0.64, 0.8],
}
#: Nothing random apart from the order of the cycles.
QUIET: dict[str, Any] = {"augment.enabled": False, "models.*.dropout": 0.0}


def tiny_config(variant: str = "ast_softfilm", **overrides: Any) -> RunConfig:
    """Checked configuration; keys are dotted (`**{"training.epochs": 5}`), `models.*` any model."""
    values: dict[str, Any] = {"models": {variant: {}}, "dataset": {"data_folder": "nowhere"}}
    conditioned = {} if variant in ("ast", "ast_grf") else {"models.*.conditioned_layers": "all"}
    for key, value in {**TINY, **conditioned, **overrides}.items():
        *sections, leaf = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return config_from_dict(values)


def words(**overrides: Any) -> list[str]:
    """`TINY` and more as command line words for the scripts."""
    shown = {**TINY, **overrides}
    return [f"{key}={str(v).lower() if isinstance(v, bool) else v}" for key, v in shown.items()]


def cycle_table(cycles: int = 40, seed: int = 0) -> pd.DataFrame:
    """Cycle table of `cycles` rows, four per recording, one recording per patient; all classes."""
    generator = np.random.default_rng(seed)
    patients = np.arange(cycles) // 4
    devices = np.array(["AKGC417L", "Meditron", "LittC2SE", "Litt3200"])[patients % 4]
    sites = np.array(["Al", "Ar", "Pl", "Pr", "Tc"])[patients % 5]
    classes = generator.permutation(np.arange(cycles) % 4)
    duration = generator.uniform(0.2, 0.9, cycles).round(3)
    start = (np.arange(cycles) % 4).astype(float)
    return pd.DataFrame(
        {
            "PID": [str(101 + p) for p in patients],
            "Filename": [
                f"{101 + p}_1b1_{s}_sc_{d}"
                for p, s, d in zip(patients, sites, devices, strict=True)
            ],
            "CycleIndex": np.arange(cycles) % 4,
            "CycleStart": start,
            "CycleEnd": start + duration,
            "Crackles": classes & 1,
            "Wheezes": classes >> 1,
            "Split": np.where(patients < 0.7 * patients.max(), "train", "test"),
            "Device": devices,
            "Fold": patients % 5,
            "Age": generator.uniform(3, 80, len(set(patients)))[patients].round(),
            "Sex": np.where(patients % 2, "F", "M"),
            "BMI": np.nan,
            "CW": np.nan,
            "CH": np.nan,
            "Disease": "Healthy",
            "AuscLoc": sites,
            "Duration": duration,
            "BMIDerived": generator.uniform(15, 35, len(set(patients)))[patients].round(1),
            "Recording": "",
        }
    )


class MemoryStore:
    """What the loop asks of a `data.store.WaveformStore`, without files."""

    def __init__(self, clips: list[np.ndarray]):
        self.clips = clips
        self.lengths = np.array([len(clip) for clip in clips], np.int64)
        self.folder = Path(f"memory-{hashlib.sha256(np.concatenate(clips)).hexdigest()[:12]}")

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, cycle: int) -> np.ndarray:
        return self.clips[cycle]

    def read(self, cycles: np.ndarray, out: np.ndarray) -> None:
        for row, cycle in zip(out, cycles, strict=True):
            clip = self.clips[cycle][: len(row)]
            row[: len(clip)] = clip


def tiny_data(config: RunConfig, table: pd.DataFrame | None = None, seed: int = 0) -> Cycles:
    """Cycles of a table: crackles are clicks, wheezes a tone, in noise. The last fifth of the
    training patients is the validation part where the selection has one."""
    table = cycle_table() if table is None else table
    generator = np.random.default_rng([seed, 1])
    clips = []
    for row in table.itertuples():
        time = np.arange(int(row.Duration * RATE)) / RATE
        sound = 0.05 * generator.standard_normal(len(time))
        sound += row.Wheezes * 0.3 * np.sin(2 * np.pi * 600 * time)
        sound += row.Crackles * 0.8 * (generator.random(len(time)) < 3e-3)
        clips.append(sound.astype(np.float32))
    store = MemoryStore(clips)
    train, test = (np.flatnonzero(table["Split"] == part) for part in ("train", "test"))
    val = train[:0]
    if config.training.selection == "validation":
        held = 4 * (len(train) // 20)  # whole patients
        train, val = train[:-held], train[-held:]
    statistics = MetadataStatistics.fit(table.iloc[train], DEVICES, SITES)
    return Cycles(
        table=table,
        split=Split(train, val, test),
        statistics=statistics,
        metadata=statistics.transform(table),
        store=store,
        task=config.task,
        completeness=completeness(table),
        clip_samples=config.audio.clip_samples,
    )


def tiny_trainer(
    config: RunConfig, folder: Path, data: Cycles | None = None, tracker: Tracker | None = None
) -> Trainer:
    """Model, inputs, checkpointer and loop of a run that keeps its files in `folder`."""
    data = data or tiny_data(config)
    runtime = Runtime(config.training.device, config.training.precision, config.training.compile)
    checkpointer = Checkpointer(RunFolder(folder), config_to_dict(config), fingerprint(data.table))
    return build_trainer(config, data, runtime, checkpointer=checkpointer, tracker=tracker)


def random_checkpoint(config: RunConfig, data: Cycles, path: Path) -> Path:
    """A checkpoint of random weights, in which the metadata count, as if trained on the data."""
    data = replace(data, task=config.task)
    torch.manual_seed(0)
    model = build_model(config, data.statistics)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    rule = {"thresholds": (0.45,) * config.task.n_thresholds, "epoch": 0, "score": 50.0}
    weights = {"weights": model.state_dict(), "layer_norm_eps": 1e-6}
    pos_weight = tuple(2.0 + k for k in range(len(config.task.outputs)))
    save_checkpoint(
        path, Checkpoint(**weights, **rule, pos_weight=pos_weight, **describe_run(config, data))
    )
    return path


def step_losses(trainer: Trainer) -> list[float]:
    """Train, and give the mean task loss of every optimiser step."""
    losses, step = [], trainer.step

    def recorded(parts, batches):
        flag = step(parts, batches)
        records = [record for _, record in trainer.seen[-len(parts) :]]
        losses.append(torch.cat(records)[:, 0].mean().item())
        return flag

    trainer.step = recorded
    trainer.fit()
    return losses


def gradient_norms(trainer: Trainer) -> list[list[float]]:
    """Fills, while training, with each step's gradient norm of every parameter group.

    Adam divides by the size of the gradient, so weights alone would hide a wrong factor.
    """
    norms, update = [], trainer.runtime.update

    def recorded(optimizer, *rest):
        groups = [group["params"] for group in optimizer.param_groups]
        norms.append([torch.cat([p.grad.flatten() for p in g]).norm().item() for g in groups])
        return update(optimizer, *rest)

    trainer.runtime.update = recorded
    return norms


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copy of the model's state."""
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def comparable(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """History rows without the one figure that depends on the clock; NaN compares equal."""
    return [
        {k: "nan" if v != v else v for k, v in row.items() if k != "train_clips_per_s"}
        for row in history
    ]
