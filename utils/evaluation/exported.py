"""What `utils.export` exports: a model as a function of plain tensors, and what it must agree with.

B clips, S samples, F mel bands, T frames, K outputs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from data.audio import read_recording, resample
from data.batch import Metadata
from data.cycle_table import SCALAR_COLUMNS
from data.frontend import AudioFrontend
from data.loader import batches_of, buckets_of
from data.statistics import MetadataStatistics
from data.task import SCALARS, Task
from models.build import ConditionedAST
from utils.evaluation.trained_model import TrainedModel

logger = logging.getLogger(__name__)

REAL_CYCLES = 4  # that are compared when no recordings are named
#: Not "device": an exported program has a function of that name.
METADATA = ("device_index", "site_index", "scalars")


class FromLogMel(nn.Module):
    """Normalised log-mel [B, 1, F, T] and metadata in their own units -> probability [B, K].

    device_index, site_index: [B] int64, positions in the vocabularies; any other number: unknown.
    scalars: [B, 3] float32, age (years), BMI (kg/m2), duration of the cycle (s). NaN means unknown:
    training's median stands in for age and BMI, as in training; a duration becomes z = 0.
    """

    def __init__(self, model: ConditionedAST, task: Task, statistics: MetadataStatistics):
        super().__init__()
        self.model, self.exclusive = model, task.exclusive
        self.sizes = (len(statistics.devices), len(statistics.sites))
        values = np.array([statistics.medians, statistics.mean, statistics.scale])
        median, mean, std = torch.from_numpy(values)
        missing = (median - mean) / std
        missing[SCALARS.index("duration")] = 0.0
        for name, value in (("mean", mean), ("std", std), ("missing", missing)):
            self.register_buffer(name, value)

    def forward(
        self, log_mel: Tensor, device_index: Tensor, site_index: Tensor, scalars: Tensor
    ) -> Tensor:
        z = (scalars.double() - self.mean) / self.std
        rest = torch.where(scalars.isnan(), self.missing, z).float()
        named = [
            (i >= 0) & (i < n) for i, n in zip((device_index, site_index), self.sizes, strict=True)
        ]
        known = torch.cat([torch.stack(named, dim=1), torch.ones_like(rest, dtype=torch.bool)], 1)
        logits = self.model(log_mel, Metadata(device_index, site_index, rest, known)).logits
        return logits.softmax(dim=1) if self.exclusive else logits.sigmoid()


class FromWaveform(nn.Module):
    """Samples [B, S] and how many of each count, length [B] int64 -> as `FromLogMel`, padded to
    `samples`."""

    def __init__(self, frontend: AudioFrontend, rest: FromLogMel, samples: int):
        super().__init__()
        self.frontend, self.rest, self.samples = frontend, rest, samples

    def forward(
        self,
        waveform: Tensor,
        length: Tensor,
        device_index: Tensor,
        site_index: Tensor,
        scalars: Tensor,
    ) -> Tensor:
        log_mel = self.frontend.traced(waveform, length, self.samples)
        return self.rest(log_mel, device_index, site_index, scalars)


class Form(NamedTuple):
    """One way into the model: its module, and its inputs' names with their dynamic axes."""

    module: nn.Module
    axes: dict[str, dict[int, str]]


def forms_of(model: TrainedModel, bucket: int = -1) -> dict[str, Form]:
    """Name -> `Form` for cycles of a bucket; a model of ready-made spectrograms has no way in for a
    waveform."""
    core = FromLogMel(model.model, model.task, model.statistics).eval()
    metadata = {name: {0: "batch"} for name in METADATA}
    forms = {"log_mel": Form(core, {"log_mel": {0: "batch"}} | metadata)}
    if model.config.dataset.ready_made:
        logger.warning("trained on ready-made spectrograms: there is no waveform form")
    else:
        samples = model.frontend.clip_samples[bucket]
        axes = {"waveform": {0: "batch", 1: "samples"}, "length": {0: "batch"}} | metadata
        forms["waveform"] = Form(FromWaveform(model.frontend, core, samples).eval(), axes)
    return forms


# ---------------------------------------------------------------------- what is compared


class Case(NamedTuple):
    """Inputs of every form by name, and the probability [B, K] that evaluation gives for them."""

    inputs: dict[str, Tensor]
    probability: np.ndarray


@torch.no_grad()
def case(model: TrainedModel, clips: Sequence[np.ndarray], table: pd.DataFrame) -> Case:
    """clips: samples of B cycles; table: their Device, AuscLoc and `SCALAR_COLUMNS`."""
    waveform = torch.zeros(len(clips), max(map(len, clips)))
    for row, clip in zip(waveform, clips, strict=True):
        row[: len(clip)] = torch.from_numpy(clip)
    length = torch.tensor([len(clip) for clip in clips])
    log_mel = model.frontend(waveform, length)
    return _case(model, log_mel, table, waveform=waveform, length=length)


@torch.no_grad()
def _case(model: TrainedModel, log_mel: Tensor, table: pd.DataFrame, **sound: Tensor) -> Case:
    statistics = model.statistics
    metadata = statistics.transform(table, warn=False)
    hidden = torch.tensor(table["Duration"].isna().tolist())  # as predictions of windows
    metadata.known[hidden, -1] = False
    logits = model.model(log_mel, metadata).logits
    names = ((table["Device"], statistics.devices), (table["AuscLoc"], statistics.sites))
    device, site = (torch.from_numpy(pd.Index(n).get_indexer(c)).long() for c, n in names)
    scalars = torch.tensor(table[list(SCALAR_COLUMNS)].to_numpy(np.float32))
    inputs = {**sound, "log_mel": log_mel, "scalars": scalars}
    inputs |= {"device_index": device, "site_index": site}
    return Case(inputs, model.task.probabilities(logits.numpy()))


def random_case(model: TrainedModel, clips: int, seconds: float, seed: int) -> Case:
    """Noise of any loudness and length up to `seconds`, with any metadata, some of it unknown."""
    generator, audio = np.random.default_rng(seed), model.config.audio
    longest = max(2, round(seconds * audio.sample_rate))
    lengths = [longest, *generator.integers(longest // 8, longest, clips - 1, endpoint=True)]
    loud = 10 ** generator.uniform(-3, -0.5, clips)
    sounds = [
        (a * generator.standard_normal(n)).astype(np.float32)
        for a, n in zip(loud, lengths, strict=True)
    ]
    statistics = model.statistics
    z = generator.standard_normal((clips, len(SCALARS)))
    scalars = np.array(statistics.mean) + z * np.array(statistics.std)
    scalars = np.where(generator.random(scalars.shape) < 0.25, np.nan, scalars).astype(np.float32)
    table = pd.DataFrame(scalars.astype(np.float64), columns=list(SCALAR_COLUMNS))
    for column, names in (("Device", statistics.devices), ("AuscLoc", statistics.sites)):
        table[column] = generator.choice(np.array([*names, None], object), clips)
    if model.config.dataset.ready_made:
        size = (clips, 1, *model.model.backbone.input_size)
        noise = torch.from_numpy(generator.standard_normal(size).astype(np.float32))
        return _case(model, noise / 2, table)
    return case(model, sounds, table)


def real_cases(model: TrainedModel, recordings: Sequence[str]) -> dict[int, Case]:
    """Bucket -> the first clip of each recording, without metadata; or cycles of the checkpoint's
    own data with theirs, where the data are still there."""
    audio = model.config.audio
    if model.config.dataset.ready_made:
        return {}
    if recordings:
        table = pd.DataFrame(
            index=range(len(recordings)), columns=list(SCALAR_COLUMNS), dtype=float
        )
        table = table.assign(Device=None, AuscLoc=None, Recording=list(recordings), CycleStart=0.0)
        table["CycleEnd"] = audio.clip_seconds
    elif all(Path(folder).exists() for folder in model.config.dataset.folders):
        whole, split = model.corpus
        rows = split.test[:: max(1, len(split.test) // REAL_CYCLES)][:REAL_CYCLES]
        table = whole.iloc[rows].reset_index(drop=True)
    else:
        return {}
    clips = []
    for row in table.itertuples():
        samples, rate = read_recording(row.Recording)
        samples = resample(samples, rate, audio.sample_rate, audio.resampler)
        edges = (round(seconds * audio.sample_rate) for seconds in (row.CycleStart, row.CycleEnd))
        clips.append(samples[slice(*edges)][: audio.clip_samples[-1]])
    bucket = buckets_of(np.array([len(clip) for clip in clips], np.int64), audio.clip_samples)
    parts = batches_of(np.arange(len(clips)), bucket, len(clips))
    return {int(bucket[p[0]]): case(model, [clips[i] for i in p], table.iloc[p]) for p in parts}
