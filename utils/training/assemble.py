"""From a configuration to the parts of a run. Only here are sections unpacked into plain values."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data.augment import Augmentation
from data.corpora import CORPORA, read_corpus
from data.corpora.icbhi import completeness
from data.frontend import AudioFrontend
from data.loader import Cycles
from data.splits import Split, split_cycles
from data.statistics import MetadataStatistics
from data.store_build import open_store
from models.build import ConditionedAST
from models.build import build_model as build
from utils.config.schema import RunConfig
from utils.training.device import Runtime
from utils.training.inputs import FrozenInputs, Inputs

logger = logging.getLogger(__name__)


def build_split(config: RunConfig) -> tuple[pd.DataFrame, Split]:
    """Cycle table and split of a run, without opening any sound."""
    dataset = config.dataset
    table = read_corpus(dataset)
    split = split_cycles(
        table,
        strategy=dataset.split_strategy,
        test_fold=dataset.test_fold,
        split_seed=dataset.split_seed,
        test_fraction=dataset.test_fraction,
        val_fraction=dataset.val_fraction,
        val_seed=dataset.val_seed,
        selection=config.training.selection,
    )
    return table, split


def build_data(config: RunConfig, statistics: MetadataStatistics | None = None) -> Cycles:
    """Cycle table, split, metadata and waveforms of a run.

    Args:
        statistics: those of a checkpoint; None fits them on the training part.
    """
    dataset = config.dataset
    table, split = build_split(config)
    store = open_store(
        table,
        cache_dir=dataset.cache_dir,
        sample_rate=config.audio.sample_rate,
        resampler=config.audio.resampler,
        workers=dataset.store_workers,
        on_bad_recording=dataset.on_bad_recording,
    )
    for line in store.report:
        logger.warning("%s", line)
    parts = (split.train, split.val, split.test)
    split = Split(*(rows[~np.asarray(store.bad)[rows]] for rows in parts))
    if statistics is None:
        corpus = CORPORA[dataset.name]
        statistics = MetadataStatistics.fit(table.iloc[split.train], corpus.devices, corpus.sites)
    return Cycles(
        table=table,
        split=split,
        statistics=statistics,
        metadata=statistics.transform(table),
        store=store,
        task=config.task,
        completeness=completeness(table),
        max_samples=round(config.audio.clip_seconds * config.audio.sample_rate),
    )


def build_frontend(config: RunConfig) -> AudioFrontend:
    """Log-mel front end with the run's augmentation."""
    audio, augment = config.audio, config.augment
    augmentation = Augmentation(augment, audio.sample_rate) if augment.enabled else None
    return AudioFrontend(audio, config.dataset.h, config.dataset.w, augmentation)


def build_model(
    config: RunConfig, statistics: MetadataStatistics, *, layer_norm_eps: float = 1e-6
) -> ConditionedAST:
    """The configured variant, pretrained as the configuration says."""
    return build(
        config.variant,
        config.model,
        config.backbone,
        n_mels=config.dataset.h,
        n_frames=config.dataset.w,
        n_outputs=len(config.task.outputs),
        device_counts=statistics.device_counts,
        site_counts=statistics.site_counts,
        layer_norm_eps=layer_norm_eps,
    )


def build_inputs(
    config: RunConfig, data: Cycles, model: ConditionedAST, runtime: Runtime
) -> Inputs:
    """Log-mels per batch; or stored features where a frozen backbone allows them."""
    frontend = build_frontend(config)
    wanted = config.training.frozen_cache and not config.augment.enabled
    if not (wanted and model.cacheable):
        return Inputs(frontend, runtime, data)
    settings = asdict(config.audio) | {"h": config.dataset.h, "w": config.dataset.w}
    return FrozenInputs(
        frontend,
        runtime,
        model.to(runtime.device),
        data,
        Path(config.dataset.cache_dir),
        settings=json.dumps(settings, sort_keys=True),
        batch_size=config.dataset.batch_size,
    )


def count_parts(data: Cycles) -> dict[str, Any]:
    """Cycles, recordings, patients and classes of each part, for checkpoints and reports."""
    counts = {}
    for part in ("train", "val", "test"):
        rows = getattr(data.split, part)
        table = data.table.iloc[rows]
        classes = np.bincount(data.classes(rows), minlength=len(data.task.classes))
        counts[part] = {
            "cycles": len(rows),
            "recordings": int(table["Filename"].nunique()),
            "patients": int(table["PID"].nunique()),
            **{name: int(n) for name, n in zip(data.task.classes, classes, strict=True)},
        }
    return counts
