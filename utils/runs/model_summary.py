"""Parameters and floating-point operations of a configured model.

    python -m utils.runs.model_summary --config FILE [FILE ...] [key=value ...]

FLOPs count two per multiply-add of matrix products and convolutions; norms, activations and
additions are left out, as is usual.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data.batch import Metadata
from data.corpora.registry import CORPORA
from data.task import FIELDS, SCALARS
from models.ast import N_SPECIAL
from models.build import build_model
from models.conditioned_ast import ConditionedAST
from models.conditioner import Modulation
from utils.common.cli import command
from utils.config.schema import RunConfig, load_config

# ---------------------------------------------------------------------- parameters


class PartCount(NamedTuple):
    """Parameters of one part of a model."""

    part: str
    total: int
    trainable: int


def count_parameters(model: ConditionedAST) -> list[PartCount]:
    """Backbone (embedding, blocks, final LN), conditioner by its children, head, methods, total."""
    backbone = model.backbone
    embedding = [backbone.cls_token, backbone.dist_token, backbone.pos_embed]
    rows = [
        _count("backbone", backbone.parameters()),
        _count("  embedding", [*embedding, *backbone.patch_embed.parameters()]),
        _count("  blocks", backbone.blocks.parameters()),
        _count("  final LN", backbone.norm.parameters()),
        _count("conditioner", model.conditioner.parameters()),
    ]
    for name, child in model.conditioner.named_children():
        rows.append(_count(f"  {name}", child.parameters()))
    own = list(model.conditioner.parameters(recurse=False))
    if own:
        rows.append(_count("  other", own))
    rows.append(_count("head", model.head.parameters()))
    if len(model.methods):
        rows.append(_count("methods", model.methods.parameters()))
    rows.append(_count("total", model.parameters()))
    return rows


def _count(part: str, parameters: Iterable[nn.Parameter]) -> PartCount:
    parameters = list(parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return PartCount(part, sum(p.numel() for p in parameters), trainable)


def parameter_table(model: ConditionedAST) -> str:
    """`count_parameters` as text."""
    lines = [f"{'parameters':<20}{'all':>14}{'trainable':>14}{'frozen':>14}"]
    for part, total, trainable in count_parameters(model):
        lines.append(f"{part:<20}{total:>14,}{trainable:>14,}{total - trainable:>14,}")
    return "\n".join(lines)


# ---------------------------------------------------------------------- operations


class Flops(NamedTuple):
    """Floating-point operations per clip."""

    forward: float
    training: float  # forward and backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.training + other.training)


def count_flops(function: Callable[[], Tensor]) -> Flops:
    """What a function and the backward pass from its result cost, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        result = function()
        forward = counter.get_total_flops()
        if result.requires_grad:
            result.sum().backward()
    return Flops(forward, counter.get_total_flops())


def flops_of_parts(model: ConditionedAST) -> dict[str, Flops]:
    """Row of the table -> its cost, for a model on the meta device: the backbone as usual
    implementations compute it and ours, the small parts, and with a cached frozen prefix."""
    backbone, conditioner = model.backbone, model.conditioner
    with torch.device("meta"):
        known = torch.ones(1, len(FIELDS), dtype=torch.bool)
        index = torch.zeros(1, dtype=torch.long)
        metadata = Metadata(index, index, torch.zeros(1, len(SCALARS)), known)
        spectrogram = torch.zeros(1, 1, *backbone.input_size)
        pooled = torch.zeros(1, backbone.embed_dim, requires_grad=True)
    small = count_flops(lambda: model.head(conditioner.fuse(pooled, conditioner.encode(metadata))))
    # leaves in place of what the conditioner gives, so that its own cost is not counted again
    modulation = tuple(
        entry and Modulation(*(part.detach().requires_grad_() for part in entry))
        for entry in conditioner.encode(metadata).modulation
    )
    usual = count_flops(lambda: backbone.tokens(spectrogram, modulation))
    ours = count_flops(lambda: backbone(spectrogram, modulation))
    rows = {
        "backbone, all tokens in the last block": usual,
        "backbone, as computed here": ours,
        "conditioner and head": small,
    }
    if any(method.filters for method in model.methods):
        rows["input filter"] = count_flops(lambda: model.methods.filter(spectrogram)[0])
        small += rows["input filter"]
    rows["total, as computed here"] = ours + small
    if model.cacheable:
        prefix = model.frozen_prefix(spectrogram)
        cached = count_flops(lambda: backbone.resume(prefix, modulation, model.cut))
        rows["total, frozen prefix cached"] = cached + small
    return rows


def flops_table(model: ConditionedAST) -> str:
    """`flops_of_parts` as text, in GFLOP."""
    rows = flops_of_parts(model)
    lines = [f"{'GFLOP per clip':<40}{'forward':>11}{'training':>11}"]
    lines += [
        f"{name:<40}{cost.forward / 1e9:>11.2f}{cost.training / 1e9:>11.1f}"
        for name, cost in rows.items()
    ]
    usual, ours, *_ = rows.values()
    saved = [1 - a / b for a, b in zip(ours, usual, strict=True)]
    lines.append(
        f"The last block for CLS and DIST only saves {saved[0]:.1%} forward, "
        f"{saved[1]:.1%} training."
    )
    return "\n".join(lines)


# ---------------------------------------------------------------------- command


def model_for_summary(config: RunConfig) -> ConditionedAST:
    """The configured model without its weights: it takes no memory and nothing is read."""
    backbone = replace(config.backbone, weights="none", gradient_checkpointing=False)
    corpus = CORPORA[config.dataset.name]
    devices, sites = (names or ("unnamed",) for names in (corpus.devices, corpus.sites))
    with torch.device("meta"):
        return build_model(
            config.variant,
            config.model,
            backbone,
            n_mels=config.dataset.h,
            n_frames=config.dataset.w,
            n_outputs=len(config.task.outputs),
            keep_bands=config.audio.keep_bands,
            device_counts=[1.0] * len(devices) + [0.0],
            site_counts=[1.0] * len(sites) + [0.0],
            methods=config.methods,
        )


def summarise(config: RunConfig) -> str:
    """The whole summary as text."""
    model = model_for_summary(config)
    backbone = model.backbone
    f, t = backbone.grid
    return "\n\n".join(
        [
            f"{config.title} (models.{config.variant}): {backbone.depth} blocks of width "
            f"{backbone.embed_dim}, input {config.dataset.h} x {config.dataset.w}, "
            f"{f} x {t} patches, {N_SPECIAL + f * t} tokens, "
            f"{len(config.task.outputs)} logits",
            parameter_table(model),
            flops_table(model),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="utils.runs.model_summary"
    )
    parser.add_argument("--config", nargs="+", required=True, metavar="FILE")
    parser.usage = "python -m %(prog)s --config FILE [FILE ...] [key=value ...]"
    overrides = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
    options = parser.parse_args([word for word in sys.argv[1:] if word not in overrides])
    print(summarise(load_config(options.config, overrides)))


if __name__ == "__main__":
    sys.exit(command(main)())
