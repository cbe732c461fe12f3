"""Parameters and floating-point operations of a configured model.

    python -m utils.runs.model_summary --config FILE [FILE ...] [key=value ...]

FLOPs count two per multiply-add of matrix products and convolutions; norms, activations and
additions are left out, as is usual. N tokens, D width, M MLP width.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data.batch import Metadata
from data.task import FIELDS, SCALARS
from models.ast import AST, N_SPECIAL, Cut
from models.build import build_model
from models.conditioned_ast import ConditionedAST
from models.registry import VARIANTS
from utils.common.cli import command
from utils.config.schema import RunConfig, load_config


class Flops(NamedTuple):
    """Floating-point operations per clip."""

    forward: float
    training: float  # forward and backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.training + other.training)


# ---------------------------------------------------------------------- parameters


class PartCount(NamedTuple):
    """Parameters of one part of a model."""

    part: str
    total: int
    trainable: int


def count_parameters(model: ConditionedAST) -> list[PartCount]:
    """Backbone (embedding, blocks, final LN), conditioner by its children, head, and the total."""
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


def block_flops(n: int, dim: int, mlp: int, n_queries: int) -> tuple[int, int]:
    """Forward FLOPs (attention half, MLP half) of a block on N tokens that gives `n_queries`.

    Keys and values of all tokens: 4 N D^2. For each of the Q tokens that are given: query and
    projection 4 D^2, scores and weighted sum 4 N D, MLP 4 D M.
    """
    attention = 4 * n * dim * dim + n_queries * (4 * dim * dim + 4 * n * dim)
    return attention, 4 * n_queries * dim * mlp


def backbone_flops(
    backbone: AST,
    cut: Cut | None = None,
    *,
    all_tokens: bool = False,
    cached: bool = False,
) -> Flops:
    """FLOPs per clip of the backbone, without gradient checkpointing.

    A backward pass costs as much as the forward pass for the gradient of the inputs and as much
    again for that of the weights (attention: twice its forward cost). The patch convolution needs
    no gradient of its input, a frozen block none of its weights, what lies before the cut neither.

    Args:
        cut: of `ConditionedAST`, or None when nothing is frozen.
        all_tokens: as if the last block were computed for all tokens, as usual implementations do.
        cached: what lies before the cut is read from a cache.
    """
    n, dim = N_SPECIAL + backbone.grid[0] * backbone.grid[1], backbone.embed_dim
    patch = backbone.patch_embed.proj
    embedding = 2 * backbone.grid[0] * backbone.grid[1] * patch.weight.numel()
    frozen = backbone.frozen_blocks
    total = Flops(embedding, 2 * embedding if frozen is None else embedding)
    if cached and cut is not None:
        total = Flops(0, 0)
    for index, block in enumerate(backbone.blocks):
        given = n if all_tokens or index < backbone.depth - 1 else N_SPECIAL
        halves = block_flops(n, dim, block.mlp.fc1.out_features, given)
        products = 4 * given * n * dim  # of activations: no weights, both inputs differentiated
        for half, cost in enumerate(halves):
            if cut is not None and (
                index < cut.block or (index == cut.block and half < cut.attended)
            ):
                total += Flops(0, 0) if cached else Flops(cost, cost)
            elif frozen is None or index >= frozen:
                total += Flops(cost, 3 * cost)
            else:
                total += Flops(cost, 2 * cost + (products if half == 0 else 0))
    return total


def small_parts_flops(model: ConditionedAST) -> Flops:
    """Conditioner and head, counted by torch's own counter on a batch of one."""
    with torch.device("meta"):
        metadata = Metadata(
            device=torch.zeros(1, dtype=torch.long),
            site=torch.zeros(1, dtype=torch.long),
            rest=torch.zeros(1, len(SCALARS)),
            known=torch.ones(1, len(FIELDS), dtype=torch.bool),
        )
        pooled = torch.zeros(1, model.backbone.embed_dim)
    with FlopCounterMode(display=False) as counter:
        state = model.conditioner.encode(metadata)
        model.head(model.conditioner.fuse(pooled, state))
    forward = counter.get_total_flops()
    return Flops(forward, 3 * forward)


def flops_table(model: ConditionedAST) -> str:
    """FLOPs per clip as text: the usual way, ours, and with a cached frozen prefix."""
    backbone, cut, small = model.backbone, model.cut, small_parts_flops(model)
    usual = backbone_flops(backbone, cut, all_tokens=True)
    ours = backbone_flops(backbone, cut)
    rows = [
        ("backbone, all tokens in the last block", usual),
        ("backbone, as computed here", ours),
        ("conditioner and head", small),
        ("total, as computed here", ours + small),
    ]
    if model.cacheable:
        rows.append(
            ("total, frozen prefix cached", backbone_flops(backbone, cut, cached=True) + small)
        )
    lines = [f"{'GFLOP per clip':<40}{'forward':>11}{'training':>11}"]
    lines += [f"{name:<40}{f.forward / 1e9:>11.2f}{f.training / 1e9:>11.1f}" for name, f in rows]
    saved = [1 - a / b for a, b in zip(ours, usual, strict=True)]
    lines.append(
        f"The last block for CLS and DIST only saves {saved[0]:.1%} forward, "
        f"{saved[1]:.1%} training."
    )
    return "\n".join(lines)


# ---------------------------------------------------------------------- command


def model_for_summary(config: RunConfig) -> ConditionedAST:
    """The configured model without its weights: it takes no memory and nothing is read."""
    backbone = replace(config.backbone, weights="none")
    with torch.device("meta"):
        return build_model(
            config.variant,
            config.model,
            backbone,
            n_mels=config.dataset.h,
            n_frames=config.dataset.w,
            n_outputs=len(config.task.outputs),
        )


def summarise(config: RunConfig) -> str:
    """The whole summary as text."""
    model = model_for_summary(config)
    backbone = model.backbone
    f, t = backbone.grid
    title = VARIANTS[config.variant].title
    return "\n\n".join(
        [
            f"{title} (models.{config.variant}): {backbone.depth} blocks of width "
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
