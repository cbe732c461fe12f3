"""What FiLM, TAFiLM and SoftFiLM do to the features: gamma = 1 + dg and beta, block by block.

C conditioned blocks, D width. The parameters depend on the metadata alone, so no audio is needed.
All sums run over batches of cycles; nothing of size cycles x blocks x width is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from matplotlib.figure import Figure

from data.batch import Metadata
from models.conditioner import Conditioner
from utils.figures import style

BATCH = 256  # cycles per pass through the conditioner
TOKENS = ("all tokens", "CLS and DIST", "patches")
#: Where a value stands among its like; all others come first, in alphabetical order.
_ORDER = {"< 18": 1, "18-64": 2, ">= 65": 3, "unknown": 4}
_QUANTITIES = (("γ", 1.0), ("β", 0.0))  # name, value that changes nothing


@dataclass(frozen=True)
class FilmStatistics:
    """Moments of gamma and beta over the cycles of each group of cycles.

    Attributes:
        tokens: which tokens these parameters modulate (one of `TOKENS`).
        layers: indices of the C blocks.
        mean: grouping -> value -> [C, 2, D], mean over the value's cycles; axis 1 is (gamma, beta).
        overall: [C, 2, D], mean over all cycles.
        within: grouping -> value -> [C, 2], root of the mean squared distance of a cycle's
            parameters from the mean of its value.
        cycles: grouping -> value -> number of cycles.
    """

    tokens: str
    layers: tuple[int, ...]
    mean: dict[str, dict[str, np.ndarray]]
    overall: np.ndarray
    within: dict[str, dict[str, np.ndarray]]
    cycles: dict[str, dict[str, int]]


@dataclass(frozen=True)
class CycleMeans:
    """gamma and beta of each of N cycles, mean over blocks and dimensions.

    Attributes:
        tokens: as in `FilmStatistics`.
        values: [N, 2].
    """

    tokens: str
    values: np.ndarray


def cycle_means(conditioner: Conditioner, metadata: Metadata) -> list[CycleMeans]:
    """One entry per group of tokens that is modulated in the same way."""
    found: dict[str, list[np.ndarray]] = {}
    for batch in film_parameters(conditioner, metadata):
        for tokens, (_, parameters) in batch.items():
            found.setdefault(tokens, []).append(parameters.mean(dim=(1, 3)).numpy())
    return [CycleMeans(tokens, np.concatenate(parts)) for tokens, parts in found.items()]


def distribution_figure(means: CycleMeans, groupings: Mapping[str, Sequence[str]]) -> Figure:
    """Box plots of the cycles' gamma and beta for each value of each grouping."""
    figure = style.new_figure(style.PAGE, 3.6)
    ordered = {
        name: sorted(np.unique(np.asarray(values, str)), key=lambda v: (_ORDER.get(v, 0), v))
        for name, values in groupings.items()
    }
    axes = figure.subplots(
        2, len(ordered), sharex="col", sharey="row", squeeze=False,
        width_ratios=[len(values) + 1 for values in ordered.values()],
    )  # fmt: skip
    for column, (grouping, values) in enumerate(ordered.items()):
        own, colours = np.asarray(groupings[grouping], str), style.colours_of(values)
        for row, (quantity, neutral) in enumerate(_QUANTITIES):
            axis = axes[row, column]
            boxes = axis.boxplot(
                [means.values[own == value, row] for value in values], widths=0.6,
                patch_artist=True, medianprops={"color": style.BLACK, "linewidth": 0.9},
                flierprops={"marker": ".", "markersize": 2, "markeredgecolor": style.GREY},
            )  # fmt: skip
            for box, value in zip(boxes["boxes"], values, strict=True):
                box.set(facecolor=colours[value], alpha=0.7)
            axis.axhline(neutral, color=style.GREY, linewidth=0.6, linestyle=":", zorder=0)
            axis.grid(axis="y")
            if column == 0:
                axis.set_ylabel(f"mean {quantity} of a cycle")
        axes[0, column].set_title(grouping)
        labels = [f"{value}\n({(own == value).sum():,})" for value in values]
        axes[1, column].set_xticks(range(1, len(values) + 1), labels, fontsize=6)
    figure.align_ylabels()
    return figure


def distribution_caption(means: CycleMeans) -> str:
    """Of `distribution_figure`."""
    return (
        f"γ and β for {means.tokens}, mean over blocks and dimensions, of each of "
        f"{len(means.values):,} test cycles (counts of cycles in brackets). Box: quartiles and "
        "median; whiskers: the last cycle within 1.5 interquartile ranges; dotted: no modulation. "
        "Within a value, cycles differ by their other metadata."
    )


@torch.no_grad()
def film_parameters(conditioner: Conditioner, metadata: Metadata) -> Iterator[dict]:
    """Per batch of cycles: {tokens: (layers, parameters [B, C, 2, D])}, gamma and beta."""
    conditioner.eval()
    for start in range(0, len(metadata), BATCH):
        blocks = [
            (layer, entry)
            for layer, entry in enumerate(
                conditioner.encode(metadata[start : start + BATCH]).modulation
            )
            if entry is not None
        ]
        groups = max((entry.scale.shape[1] for _, entry in blocks), default=0)
        out = {}
        for g, tokens in enumerate(TOKENS[1:] if groups > 1 else TOKENS[:1]):
            inside = [(layer, entry) for layer, entry in blocks if g < entry.scale.shape[1]]
            pairs = [torch.stack([1 + e.scale[:, g], e.shift[:, g]], 1) for _, e in inside]
            out[tokens] = (tuple(layer for layer, _ in inside), torch.stack(pairs, 1).double())
        yield out


def film_statistics(
    conditioner: Conditioner, metadata: Metadata, groupings: Mapping[str, Sequence[str]]
) -> list[FilmStatistics]:
    """Moments for every grouping, one entry per group of tokens that is modulated in the same way.

    Args:
        metadata: of N cycles.
        groupings: name (device, site, age) -> the value of each of the N cycles.
    """
    first: dict[str, dict] = {}
    groupings = {name: np.asarray(values, str) for name, values in groupings.items()}
    position = 0
    for batch in film_parameters(conditioner, metadata):
        for tokens, (layers, parameters) in batch.items():
            sums = first.setdefault(tokens, {"layers": layers, "groups": {}})["groups"]
            rows = slice(position, position + len(parameters))
            for grouping, values in groupings.items():
                for value in np.unique(values[rows]):
                    inside = parameters[torch.from_numpy(values[rows] == value)]
                    n, total, square = sums.get((grouping, value), (0, 0.0, 0.0))
                    sums[grouping, value] = (
                        n + len(inside),
                        total + inside.sum(0).numpy(),
                        square + inside.square().sum(dim=(0, 3)).numpy(),
                    )
        position += len(parameters)
    names = list(groupings)
    return [
        _statistics(tokens, one["layers"], one["groups"], names) for tokens, one in first.items()
    ]


def _statistics(
    tokens: str, layers: tuple[int, ...], sums: dict, groupings: Sequence[str]
) -> FilmStatistics:
    mean: dict = {}
    within: dict = {}
    cycles: dict = {}
    order = {grouping: i for i, grouping in enumerate(groupings)}
    for (grouping, value), (n, total, square) in sorted(
        sums.items(), key=lambda item: (order[item[0][0]], _ORDER.get(item[0][1], 0), item[0][1])
    ):
        centre = total / n
        variance = np.maximum(square / n - np.square(centre).sum(axis=2), 0.0)
        mean.setdefault(grouping, {})[value] = centre
        within.setdefault(grouping, {})[value] = np.sqrt(variance)
        cycles.setdefault(grouping, {})[value] = n
    one = next(iter(cycles))
    weights = {value: n / sum(cycles[one].values()) for value, n in cycles[one].items()}
    overall = sum(weights[value] * centre for value, centre in mean[one].items())
    return FilmStatistics(tokens, layers, mean, overall, within, cycles)


def distances(statistics: FilmStatistics, grouping: str) -> tuple[np.ndarray, np.ndarray]:
    """Between and within: [C, 2] each.

    Between: mean distance (2-norm over D) of two values' means, over all pairs of values. Within:
    root mean squared distance of a cycle from the mean of its value, over all cycles.
    """
    means = list(statistics.mean[grouping].values())
    pairs = [np.linalg.norm(a - b, axis=2) for a, b in combinations(means, 2)]
    between = np.mean(pairs, axis=0) if pairs else np.full(means[0].shape[:2], np.nan)
    counts = statistics.cycles[grouping]
    squares = sum(counts[v] * np.square(w) for v, w in statistics.within[grouping].items())
    return between, np.sqrt(squares / sum(counts.values()))


def parameters_figure(statistics: FilmStatistics) -> Figure:
    """Mean and spread over the D dimensions of each value's gamma and beta, block by block."""
    groupings = list(statistics.mean)
    figure = style.new_figure(style.PAGE, 5.2)
    axes = figure.subplots(4, len(groupings), sharex=True, sharey="row", squeeze=False)
    blocks = np.asarray(statistics.layers) + 1
    for column, grouping in enumerate(groupings):
        colours = style.colours_of(statistics.mean[grouping])
        for i, (value, centre) in enumerate(statistics.mean[grouping].items()):
            rows = [
                f(centre[:, q] - neutral, axis=1)
                for q, (_, neutral) in enumerate(_QUANTITIES)
                for f in (np.mean, np.std)
            ]
            for axis, row in zip(axes[:, column], rows, strict=True):
                axis.plot(
                    blocks, row, color=colours[value], marker=style.MARKERS[i % 8], markersize=2.5,
                    linewidth=0.9, label=f"{value} ({statistics.cycles[grouping][value]:,})",
                )  # fmt: skip
        axes[0, column].set_title(grouping)
        axes[3, column].set_xlabel("block")
        style.whole_numbers(axes[3, column], blocks)
        axes[3, column].legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.38), ncols=2, fontsize=6, handlelength=1.4,
            columnspacing=0.8,
        )  # fmt: skip
    for row, label in enumerate(("mean of γ − 1", "spread of γ", "mean of β", "spread of β")):
        axes[row, 0].set_ylabel(label)
        for axis in axes[row]:
            axis.grid(axis="y")
            if row % 2 == 0:
                axis.axhline(0, color=style.GREY, linewidth=0.5)
            else:
                axis.set_ylim(bottom=0)
    figure.align_ylabels()
    return figure


def heatmap_figure(statistics: FilmStatistics, grouping: str = "device") -> Figure:
    """Every dimension's mean gamma - 1 and beta per block, and distances between and within."""
    figure = style.new_figure(style.PAGE, 3.6)
    panels = figure.subplot_mosaic([["γ", "dγ"], ["β", "dβ"]], width_ratios=(2.6, 1))
    blocks = np.asarray(statistics.layers) + 1
    between, within = distances(statistics, grouping)
    for q, (name, neutral) in enumerate(_QUANTITIES):
        values = statistics.overall[:, q] - neutral
        order = np.argsort(values.mean(axis=0))
        limit = max(float(np.abs(values).max()), 1e-12)
        axis = panels[name]
        image = axis.imshow(
            values[:, order], aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit,
            interpolation="nearest",
        )  # fmt: skip
        step = max(1, len(blocks) // 6)
        axis.set_yticks(range(0, len(blocks), step), blocks[::step])
        axis.set(ylabel="block", title=f"mean {name}" + (" − 1" if neutral else ""))
        axis.set_xlabel("dimension, sorted by its mean over the blocks")
        bar = figure.colorbar(image, ax=axis, pad=0.01)
        bar.outline.set_visible(False)
        side = panels[f"d{name}"]
        side.plot(blocks, between[:, q], color=style.BLUE, marker="o", label=f"between {grouping}s")
        side.plot(
            blocks, within[:, q], color=style.ORANGE, marker="s", label=f"within a {grouping}"
        )
        side.set(title=f"distance in {name}", xlabel="block", ylabel="2-norm over dimensions")
        side.set_ylim(0, 1.5 * max(np.nanmax(between[:, q]), within[:, q].max(), 1e-12))
        style.whole_numbers(side, blocks)
        side.legend(loc="upper center")  # where the limit leaves room
    style.panel_letters([panels[key] for key in ("γ", "dγ", "β", "dβ")])
    return figure


def parameters_caption(statistics: FilmStatistics, grouping: str = "device") -> str:
    """Of `parameters_figure`."""
    return (
        f"γ = 1 + Δγ and β for {statistics.tokens}; mean and spread (sd) over the dimensions of "
        "what the test cycles of each value (counts in brackets) get on average. "
        + _distances_in_words(statistics, grouping)
    )


def heatmap_caption(statistics: FilmStatistics, grouping: str = "device") -> str:
    """Of `heatmap_figure`."""
    cycles = sum(statistics.cycles[grouping].values())
    return (
        f"Left: γ = 1 + Δγ and β of every dimension for {statistics.tokens}, mean over "
        f"{cycles:,} test cycles. Right: mean distance of two {grouping}s' means, and spread "
        "within. " + _distances_in_words(statistics, grouping)
    )


def _distances_in_words(statistics: FilmStatistics, grouping: str) -> str:
    between, within = distances(statistics, grouping)
    parts = []
    for q, (name, _) in enumerate(_QUANTITIES):
        b, w = between[:, q].mean(), within[:, q].mean()
        ratio = f", ratio {b / w:.2f}" if w > 0 else ""
        parts.append(f"{name}: between {grouping}s {b:.3g}, within {w:.3g}{ratio}")
    return (
        f"Distances, mean over {len(statistics.layers)} blocks: "
        f"{'; '.join(parts)}. Within: root mean squared distance of a cycle from its {grouping}'s "
        "mean, caused by the other metadata."
    )
