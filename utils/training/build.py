"""From a configuration to the front end and the model."""

from __future__ import annotations

from data.augment import Augmentation
from data.frontend import AudioFrontend
from data.statistics import MetadataStatistics
from models.build import ConditionedAST
from models.build import build_model as build
from models.fusion import FusionModel, GatedFusion, MeanFusion
from utils.config.schema import RunConfig


def build_frontend(config: RunConfig) -> AudioFrontend:
    """Log-mel front end with the run's augmentation."""
    audio, augment = config.audio, config.augment
    augmentation = Augmentation(augment, audio.sample_rate) if augment.enabled else None
    return AudioFrontend(audio, config.dataset.h, config.dataset.w, augmentation)


def build_model(
    config: RunConfig, statistics: MetadataStatistics, *, layer_norm_eps: float = 1e-6
) -> ConditionedAST | FusionModel:
    """The configured variant, pretrained as the configuration says; or the fusion of several."""
    if config.fusion.members:
        return build_fusion(config)
    return build(
        config.variant,
        config.model,
        config.backbone,
        n_mels=config.dataset.h,
        n_frames=config.dataset.w,
        n_outputs=len(config.task.outputs),
        keep_bands=config.audio.keep_bands,
        device_counts=statistics.device_counts,
        site_counts=statistics.site_counts,
        methods=config.methods,
        layer_norm_eps=layer_norm_eps,
    )


def build_fusion(config: RunConfig) -> FusionModel:
    """What is trained on the features of `fusion.members`."""
    members = len(config.fusion.members)
    if config.fusion.kind == "mean":
        return MeanFusion(members, config.task.exclusive)
    return GatedFusion(members, config.backbone.embed_dim, len(config.task.outputs))
