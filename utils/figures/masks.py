"""What SoftFiLM's masks are after training, and against which controls that must be judged.

K factors, L sets of masks (1, or one per conditioned block), C conditioned blocks, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data.batch import Metadata
from models.conditioners.softfilm import SoftFiLM
from models.masks import SoftMasks, mask_controls
from utils.figures import style

ACTIVE = 0.5  # a dimension is active for a factor whose weight is above this


@dataclass(frozen=True)
class MaskAnalysis:
    """Numbers behind the mask figure.

    Attributes:
        factors: K names.
        layers: indices of the C conditioned blocks.
        weights: [K, L, D], at the temperature in use.
        initial: [K, L, D], the untrained masks at the same temperature.
        temperature: tau in use.
        owner: [L, D], factor with the largest weight.
        active, dominant: [K, L] dimensions with w > .5, and owned ones.
        changed: [L] dimensions whose owner is another one than before training.
        overlap: name of the masks (trained, initial at the same tau, regularisers alone) ->
            [K, K] mean(w_i w_j), NaN on the diagonal.
        effect, effect_centred: [K, C] mean norm of w_k * [dg; b] over cycles; centred: of what
            differs between cycles.
        cycles: how many cycles the effects are averaged over.
    """

    factors: tuple[str, ...]
    layers: tuple[int, ...]
    weights: np.ndarray
    initial: np.ndarray
    temperature: float
    owner: np.ndarray
    active: np.ndarray
    dominant: np.ndarray
    changed: np.ndarray
    overlap: dict[str, np.ndarray]
    effect: np.ndarray
    effect_centred: np.ndarray
    cycles: int


@torch.no_grad()
def analyse_masks(
    conditioner: SoftFiLM,
    metadata: Metadata,
    *,
    lr: float,
    steps: int,
    steps_per_epoch: int,
    schedule: Callable[[int], float],
) -> MaskAnalysis:
    """Measure the masks of a trained model.

    Args:
        conditioner: the trained model's.
        metadata: of the cycles over which effects are averaged.
        lr: learning rate of the masks (multiplier included), steps, steps_per_epoch, schedule:
            of the run, for the control that trains on the regularisers alone.
    """
    masks = conditioner.masks
    untrained = copy.deepcopy(masks)
    untrained.logits.copy_(masks.initial_logits)
    weights, initial = masks().cpu().numpy(), untrained().cpu().numpy()
    owner = weights.argmax(axis=0)
    k = len(masks.factors)
    controls = mask_controls(
        masks, lr=lr, steps=steps, steps_per_epoch=steps_per_epoch, schedule=schedule
    )
    alone = np.full((k, k), controls["overlap_regularisers_only"])  # the same for all pairs: the
    np.fill_diagonal(alone, np.nan)  # start is symmetric in the factors, and so are the losses
    return MaskAnalysis(
        factors=masks.factors,
        layers=conditioner.conditioned_layers,
        weights=weights,
        initial=initial,
        temperature=float(masks.temperature),
        owner=owner,
        active=(weights > ACTIVE).sum(axis=2),
        dominant=np.stack([(owner == i).sum(axis=1) for i in range(k)]),
        changed=(owner != initial.argmax(axis=0)).sum(axis=1),
        overlap={
            "trained": _overlaps(masks),
            "untrained, same τ": _overlaps(untrained),
            "regularisers alone": alone,
        },
        effect=_effects(conditioner, metadata, centred=False),
        effect_centred=_effects(conditioner, metadata, centred=True),
        cycles=len(metadata),
    )


def _overlaps(masks: SoftMasks) -> np.ndarray:
    matrix = np.full((len(masks.factors),) * 2, np.nan)
    for (a, b), value in masks.pair_overlaps().items():
        i, j = masks.factors.index(a), masks.factors.index(b)
        matrix[i, j] = matrix[j, i] = float(value)
    return matrix


def _effects(conditioner: SoftFiLM, metadata: Metadata, centred: bool) -> np.ndarray:
    return conditioner.factor_effects(metadata, centred=centred).cpu().numpy()


def mask_figure(analysis: MaskAnalysis) -> Figure:
    """Six panels: sorted heat map, sorted curves, histograms, counts, overlaps, effect sizes."""
    figure = style.new_figure(style.PAGE, 4.9)
    panels = figure.subplot_mosaic(
        [["map"] * 6, ["curves"] * 2 + ["hist"] * 2 + ["counts"] * 2,
         ["overlap"] * 3 + ["effect"] * 3],
        height_ratios=(0.75, 1.1, 1.1),
    )  # fmt: skip
    _heat_map(figure, panels["map"], analysis)
    _curves(panels["curves"], analysis)
    _histogram(panels["hist"], analysis)
    _counts(panels["counts"], analysis)
    _overlap_panel(panels["overlap"], analysis)
    _effect_panel(panels["effect"], analysis)
    style.panel_letters(list(panels.values()))
    return figure


def mask_caption(analysis: MaskAnalysis) -> str:
    """The measured numbers in words."""
    sets, width = analysis.owner.shape
    overlaps = {name: np.nanmean(matrix) for name, matrix in analysis.overlap.items()}
    named = "; ".join(f"{name} {100 * value:.2f} %" for name, value in overlaps.items())
    per_set = f" (mean over {sets} blocks' own masks)" if sets > 1 else ""
    return (
        f"Masks at τ = {analysis.temperature:.3g}, the temperature in use; {width} dimensions"
        f"{per_set}. Mean pairwise overlap mean(wᵢ wⱼ): {named}; random masks over one third "
        f"each: 11.1 %. {analysis.changed.mean():.4g} of {width} dimensions have another owner "
        f"than before training. Effect: mean over {analysis.cycles:,} cycles of the norm of "
        "wₖ ⊙ [Δγ; β] in each block; dashed: of what differs between cycles."
    )


def sorted_weights(analysis: MaskAnalysis) -> np.ndarray:
    """[K, L, D] with the dimensions of each set sorted by owner, then by the owner's weight."""
    out = np.empty_like(analysis.weights)
    for layer in range(analysis.owner.shape[0]):
        weights = analysis.weights[:, layer]
        order = np.lexsort((-weights.max(axis=0), analysis.owner[layer]))
        out[:, layer] = weights[:, order]
    return out


def _heat_map(figure: Figure, axis: Axes, analysis: MaskAnalysis) -> None:
    k, sets, width = analysis.weights.shape
    image = axis.imshow(
        sorted_weights(analysis).reshape(k * sets, width), aspect="auto", vmin=0, vmax=1,
        interpolation="nearest",
    )  # fmt: skip
    axis.set_yticks(np.arange(k) * sets + (sets - 1) / 2, analysis.factors)
    for i in range(1, k):
        axis.axhline(i * sets - 0.5, color="white", linewidth=0.8)
    axis.set_xlabel("dimension, sorted by owner")
    axis.set_title("weight of each factor" + (", one row per block" if sets > 1 else ""))
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axis, pad=0.01)
    bar.set_label("w")
    bar.outline.set_visible(False)


def _curves(axis: Axes, analysis: MaskAnalysis) -> None:
    for i, name in enumerate(analysis.factors):
        curves = np.sort(analysis.weights[i], axis=1)[:, ::-1]
        for curve in curves:
            axis.plot(
                curve, color=style.FACTOR_COLOURS[name], linewidth=1 if len(curves) < 2 else 0.4
            )
        axis.plot([], [], color=style.FACTOR_COLOURS[name], label=name)
    start = np.sort(analysis.initial[0, 0])[::-1]
    axis.plot(start, color=style.GREY, linestyle=":", linewidth=0.9, label="untrained")
    axis.axhline(ACTIVE, color=style.PALE, linewidth=0.7, zorder=0)
    axis.set(title="sorted weights", xlabel="rank of the dimension", ylabel="w", ylim=(0, 1))
    axis.legend(frameon=True, framealpha=1, edgecolor="white", loc="upper right")


def _histogram(axis: Axes, analysis: MaskAnalysis) -> None:
    bins = np.linspace(0, 1, 41)
    sets = analysis.weights.shape[1]
    for i, name in enumerate(analysis.factors):
        axis.hist(
            analysis.weights[i].ravel(), bins, weights=np.full(analysis.weights[i].size, 1 / sets),
            histtype="step", color=style.FACTOR_COLOURS[name],
        )  # fmt: skip
    axis.set(title="histogram", xlabel="w", ylabel="dimensions", xlim=(0, 1))


def _counts(axis: Axes, analysis: MaskAnalysis) -> None:
    x = np.arange(len(analysis.factors))
    for shift, values, alpha, label in (
        (-0.2, analysis.active.mean(axis=1), 1.0, "active (w > 0.5)"),
        (0.2, analysis.dominant.mean(axis=1), 0.45, "dominant (owned)"),
    ):
        colours = [style.FACTOR_COLOURS[name] for name in analysis.factors]
        bars = axis.bar(x + shift, values, 0.38, color=colours, alpha=alpha)
        axis.bar_label(bars, [f"{value:.0f}" for value in values], fontsize=6)
        axis.bar([0], [0], color=style.GREY, alpha=alpha, label=label)
    axis.set_xticks(x, analysis.factors)
    top = max(analysis.active.mean(axis=1).max(), analysis.dominant.mean(axis=1).max(), 1)
    axis.set(title="dimensions per factor", ylabel="dimensions", ylim=(0, 1.6 * top))
    axis.legend(loc="upper center", fontsize=6)


def _overlap_panel(axis: Axes, analysis: MaskAnalysis) -> None:
    """The pairs as rows, the three masks as columns: the trained overlap next to its controls."""
    pairs = list(combinations(range(len(analysis.factors)), 2))
    names = list(analysis.overlap)
    values = np.array([[100 * analysis.overlap[n][i, j] for n in names] for i, j in pairs])
    axis.set_title("overlap mean(w$_i$ w$_j$) (%)")
    if not pairs:
        axis.text(0.5, 0.5, "one factor: no overlap", ha="center", transform=axis.transAxes)
        axis.set_axis_off()
        return
    image = axis.imshow(values, cmap="Blues", aspect="auto", vmin=0, vmax=max(11.1, values.max()))
    style.annotate_cells(axis, values, [[f"{v:.2f}" for v in row] for row in values], image)
    axis.set_yticks(
        range(len(pairs)), [f"{analysis.factors[i]}–{analysis.factors[j]}" for i, j in pairs]
    )
    axis.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _effect_panel(axis: Axes, analysis: MaskAnalysis) -> None:
    blocks = np.asarray(analysis.layers) + 1
    for i, name in enumerate(analysis.factors):
        colour = style.FACTOR_COLOURS[name]
        look = {"color": colour, "marker": style.MARKERS[i]}
        axis.plot(blocks, analysis.effect[i], label=name, **look)
        axis.plot(blocks, analysis.effect_centred[i], ls="--", markerfacecolor="white", **look)
    axis.set(title="effect size of each factor", xlabel="block", ylabel="‖w$_k$ ⊙ [Δγ; β]‖")
    axis.set_ylim(0, 1.3 * max(float(analysis.effect.max()), 1e-12))
    style.whole_numbers(axis, blocks)
    axis.legend(loc="upper center", ncols=len(analysis.factors))
