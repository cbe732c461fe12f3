"""Small trained-looking checkpoints and run folders for the tests of the figures."""

from __future__ import annotations

from pathlib import Path

import torch

from data.corpora.icbhi import DEVICES, SITES
from data.statistics import MetadataStatistics
from utils.config.schema import config_to_dict, load_config
from utils.figures.commands import SCRIPTS
from utils.training.assemble import build_model, build_split
from utils.training.checkpoint import Checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "backbone.weights=none", "backbone.embed_dim=48", "backbone.depth=3", "backbone.num_heads=2",
    "backbone.freq_stride=16", "backbone.time_stride=16", "dataset.w=64", "dataset.h=32",
    "audio.clip_seconds=2.0", "training.device=cpu", "training.epochs=3",
    "training.warmup_epochs=1", "mlflow.enabled=false",
)  # fmt: skip


def write_checkpoint(path: Path, variant: str, corpus: Path, *overrides: str) -> Checkpoint:
    """A model of the variant with random weights everywhere, saved as a trained one would be."""
    config = load_config(
        [ROOT / "configs" / f"{SCRIPTS[variant][1]}.yaml"],
        [
            *SMALL,
            f"models.{variant}.input_tdim=64",
            f"models.{variant}.input_fdim=32",
            *(
                []
                if variant in ("ast", "ast_grf")
                else [f"models.{variant}.conditioned_layers=all"]
            ),
            f"dataset.data_folder={corpus}",
            "dataset.cycle_metadata_path=null",
            f"dataset.cache_dir={path.parent / 'cache'}",
            f"training.output_dir={path.parent / 'runs'}",
            *overrides,
        ],
        variant=variant,
    )
    table, split = build_split(config)
    statistics = MetadataStatistics.fit(table.iloc[split.train], DEVICES, SITES)
    torch.manual_seed(0)
    model = build_model(config, statistics)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    checkpoint = Checkpoint(
        weights=model.state_dict(),
        config=config_to_dict(config),
        statistics=statistics.to_dict(),
        thresholds=config.task.default_thresholds,
        selection=config.training.selection,
        epoch=1,
        score=50.0,
        pos_weight=(),
        counts={
            part: {"cycles": len(getattr(split, part)), "recordings": 1, "patients": 1}
            for part in ("train", "val", "test")
        },
        partial="PARTIAL DATA: a part of 920 recordings",
        run="a-run",
        layer_norm_eps=1e-6,
    )
    save_checkpoint(path, checkpoint)
    return checkpoint
