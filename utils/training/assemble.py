"""From a configuration to the parts of a run: data, front end, model, inputs, trainer."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from data.augment import Augmentation
from data.corpora.registry import CORPORA, read_corpus
from data.corpora.spectrograms import SpectrogramStore
from data.loader import Cycles
from data.splits import Split, split_by
from data.statistics import MetadataStatistics
from data.store import WaveformStore
from data.store_build import open_store
from data.synthetic.corpus import is_synthetic
from models.build import ConditionedAST
from utils.common.errors import UserError
from utils.config.schema import RunConfig, config_to_dict
from utils.tracking import Tracker
from utils.training.build import build_frontend, build_model
from utils.training.checkpointer import Checkpointer
from utils.training.device import Runtime
from utils.training.fingerprint import fingerprint
from utils.training.inputs import FrozenInputs, Inputs, SpectrogramInputs
from utils.training.runfolder import run_name
from utils.training.trainer import Trainer

logger = logging.getLogger(__name__)


def build_split(config: RunConfig, *, judged: bool = False) -> tuple[pd.DataFrame, Split]:
    """Cycle table and split of a run, without opening any sound.

    Args:
        judged: nothing is trained on this corpus: `test` is its own test part, which may be
            empty, and `train` stands for every other cycle.
    """
    dataset = config.dataset
    table = read_corpus(dataset)
    if judged:
        test = (table["Split"] == "test").to_numpy()
        return table, Split(np.flatnonzero(~test), np.zeros(0, np.int64), np.flatnonzero(test))
    return table, split_by(dataset, table, config.training.selection)


def build_data(
    config: RunConfig, statistics: MetadataStatistics | None = None, *, judged: bool = False
) -> Cycles:
    """Cycle table, split, metadata and waveforms of a run.

    Args:
        statistics: those of a checkpoint; None fits them on the training part.
        judged: as for `build_split`.
    """
    dataset = config.dataset
    table, split = build_split(config, judged=judged)
    corpus, ready_made = CORPORA[dataset.name], dataset.ready_made
    if not ready_made:
        store, split = _waveforms(config, table, split)
    if statistics is None:
        statistics = MetadataStatistics.fit(table.iloc[split.train], corpus.devices, corpus.sites)
    if ready_made:
        store, statistics = _spectrograms(config, table, split, statistics)
    return Cycles(
        table=table,
        split=split,
        statistics=statistics,
        metadata=statistics.transform(table),
        store=store,
        task=config.task,
        completeness=corpus.completeness(table),
        clip_samples=config.audio.clip_samples,
    )


def _waveforms(config: RunConfig, table: pd.DataFrame, split: Split) -> tuple[WaveformStore, Split]:
    """The store of a table, and the split without the recordings that had to be left out."""
    dataset = config.dataset
    store = open_store(
        table,
        cache_dir=dataset.cache_dir,
        sample_rate=config.audio.sample_rate,
        resampler=config.audio.resampler,
        workers=dataset.store_workers,
        on_bad_recording=dataset.on_bad_recording,
        full_hash=dataset.full_hash,
    )
    for line in store.report:
        logger.warning("%s", line)
    parts = (split.train, split.val, split.test)
    return store, Split(*(rows[~np.asarray(store.bad)[rows]] for rows in parts))


def _spectrograms(
    config: RunConfig, table: pd.DataFrame, split: Split, statistics: MetadataStatistics
) -> tuple[SpectrogramStore, MetadataStatistics]:
    """The store of ready-made spectrograms, and the statistics with the training rows' level."""
    dataset = config.dataset
    store = SpectrogramStore.of(table)
    if store.shape != (dataset.h, dataset.w):
        h, w = store.shape
        if statistics.level is not None:
            raise UserError(
                f"the model takes spectrograms of {dataset.h} x {dataset.w}, those of "
                f"{dataset.data_folder} are {h} x {w}; give it a corpus of its own size"
            )
        raise UserError(
            f"dataset.h={dataset.h} and dataset.w={dataset.w} cannot be: the spectrograms of "
            f"{dataset.data_folder} are {h} x {w}; set dataset.h={h} dataset.w={w}"
        )
    if statistics.level is None:
        statistics = replace(statistics, level=store.level(split.train))
    return replace(store, mean=statistics.level[0], std=statistics.level[1]), statistics


def build_inputs(
    config: RunConfig, data: Cycles, model: ConditionedAST, runtime: Runtime
) -> Inputs:
    """Log-mels per batch; or stored features where a frozen backbone allows them."""
    if config.dataset.ready_made:
        augment = config.augment
        masking = Augmentation(augment, config.audio.sample_rate) if augment.enabled else None
        return SpectrogramInputs(masking, runtime, data)
    frontend = build_frontend(config)
    enabled = config.training.frozen_cache and not config.augment.enabled
    if not (enabled and model.cacheable):
        return Inputs(frontend, runtime, data, model.methods.hears)
    settings = asdict(config.audio) | {"h": config.dataset.h, "w": config.dataset.w}
    if config.audio.buckets:
        settings["bucket_positions"] = config.backbone.bucket_positions
    settings = {k: v for k, v in settings.items() if v is not None}  # older stores keep their names
    return FrozenInputs(
        frontend,
        runtime,
        model.to(runtime.device),
        data,
        Path(config.dataset.cache_dir),
        settings=json.dumps(settings, sort_keys=True),
        batch_size=config.dataset.batch_size,
    )


def build_trainer(
    config: RunConfig,
    data: Cycles,
    runtime: Runtime,
    *,
    model: ConditionedAST | None = None,
    inputs: Inputs | None = None,
    checkpointer: Checkpointer | None = None,
    tracker: Tracker | None = None,
) -> Trainer:
    """Everything between a configuration and its training.

    Args:
        model: None builds the configured one from the run's seed alone.
        inputs: None builds the configured ones.
        checkpointer: keeps the run's folder; None keeps nothing.
        tracker: receives the metrics of each epoch.
    """
    if model is None:
        torch.manual_seed(config.training.seed)
        model = build_model(config, data.statistics)
    return Trainer(
        config.training,
        data,
        model,
        inputs or build_inputs(config, data, model, runtime),
        runtime,
        batch_size=config.dataset.batch_size,
        checkpointer=checkpointer,
        tracker=tracker,
    )


def describe_run(config: RunConfig, data: Cycles) -> dict[str, Any]:
    """The fields of a `Checkpoint` that the training does not change."""
    return {
        "config": config_to_dict(config),
        "statistics": data.statistics.to_dict(),
        "selection": config.training.selection,
        "counts": count_parts(data) | {"data": data.completeness.counts},
        "partial": data.completeness.message if data.completeness.partial else "",
        "synthetic": is_synthetic(*config.dataset.folders),
        "fingerprint": fingerprint(data.table, config.dataset.full_hash),
        "run": run_name(config),
    }


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
