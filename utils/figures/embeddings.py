"""t-SNE of two models' representations of the same cycles, and what can be measured in them.

N cycles, D width. A picture of a t-SNE map proves nothing; the captions carry the silhouette and
the accuracy of nearest-neighbour prediction in the D dimensions themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.metrics import pairwise_distances, silhouette_score

from utils.common.errors import UserError
from utils.figures import style

NEIGHBOURS = 10
SEED = 0
#: Label -> whether cycles of the same patient may be neighbours. Only for the patient itself.
LABELS: dict[str, bool] = {"class": False, "device": False, "site": False, "patient": True}


@dataclass(frozen=True)
class Measured:
    """What one label has to do with the representation.

    Attributes:
        silhouette: -1..1, mean over the cycles (Rousseeuw, 1987); NaN for a single value.
        knn: accuracy in 0..1 of the majority among the nearest neighbours.
        chance: share of the most frequent value, the best guess without the representation.
    """

    silhouette: float
    knn: float
    chance: float


def knn_accuracy(
    distance: np.ndarray, labels: Sequence, groups: Sequence | None = None, k: int = NEIGHBOURS
) -> float:
    """Share of cycles whose label is the majority among their k nearest other cycles.

    Ties go to the label of the nearest neighbour among the tied ones.

    Args:
        distance: [N, N].
        groups: cycles of the same group are never neighbours (leave one patient out); None: only
            the cycle itself is left out.
    """
    labels = np.unique(np.asarray(labels, str), return_inverse=True)[1]
    groups = np.arange(len(labels)) if groups is None else np.asarray(groups)
    barred = groups[:, None] == groups[None, :]
    order = np.argsort(np.where(barred, np.inf, distance), axis=1, kind="stable")[:, :k]
    usable = np.take_along_axis(~barred, order, axis=1)
    hits, judged = 0, 0
    for label, near, use in zip(labels, labels[order], usable, strict=True):
        near = near[use]
        if len(near) == 0:
            continue
        votes = np.bincount(near)
        winner = next(value for value in near if votes[value] == votes.max())
        hits, judged = hits + (winner == label), judged + 1
    return hits / judged if judged else float("nan")


def measure(embedding: np.ndarray, labels: Mapping[str, Sequence]) -> dict[str, Measured]:
    """Silhouette and nearest-neighbour accuracy of every label, Euclidean in the D dimensions.

    Args:
        labels: the names in `LABELS` -> value of each of the N cycles.
    """
    distance = pairwise_distances(embedding)
    patients = np.asarray(labels["patient"])
    out = {}
    for name, same_patient in LABELS.items():
        values = np.asarray(labels[name], str)
        counts = np.unique(values, return_counts=True)[1]
        silhouette = float("nan")
        if 1 < len(counts) < len(values):
            np.fill_diagonal(distance, 0.0)
            silhouette = float(silhouette_score(distance, values, metric="precomputed"))
        knn = knn_accuracy(distance, values, None if same_patient else patients)
        out[name] = Measured(silhouette, knn, float(counts.max() / len(values)))
    return out


def tsne(embedding: np.ndarray) -> np.ndarray:
    """[N, D] -> [N, 2]: scikit-learn's t-SNE, started from PCA, with a fixed seed.

    Raises:
        UserError: fewer than five cycles.
    """
    if len(embedding) < 5:
        raise UserError(f"t-SNE of {len(embedding)} cycles shows nothing; give at least five")
    perplexity = min(30.0, (len(embedding) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=SEED).fit_transform(embedding)


def tsne_figure(maps: Mapping[str, np.ndarray], labels: Mapping[str, Sequence]) -> Figure:
    """Rows: models; columns: class, device, site, each value with its colour and marker.

    Args:
        maps: model title -> [N, 2].
        labels: label -> value of each cycle.
    """
    shown = [name for name in LABELS if name != "patient"]
    figure = style.new_figure(style.PAGE, 2.25 * len(maps) + 0.5)
    axes = figure.subplots(len(maps), len(shown), squeeze=False)
    for row, (title, points) in enumerate(maps.items()):
        for column, name in enumerate(shown):
            handles = _scatter(axes[row, column], points, name, np.asarray(labels[name], str))
            if row == 0:
                axes[row, column].set_title(name)
            if row == len(maps) - 1:
                axes[row, column].legend(
                    handles.values(), handles.keys(), loc="upper center", fontsize=6, ncols=4,
                    bbox_to_anchor=(0.5, -0.02), handletextpad=0.1, columnspacing=0.7,
                    markerscale=1.8,
                )  # fmt: skip
        axes[row, 0].set_ylabel(title)
    return figure


def _scatter(axis: Axes, points: np.ndarray, name: str, values: np.ndarray) -> dict:
    palette = style.CLASS_COLOURS if name == "class" else style.colours_of(np.unique(values))
    present = [value for value in palette if value in values]
    looks = {
        value: {"c": palette[value], "marker": style.MARKERS[i % len(style.MARKERS)]}
        for i, value in enumerate(present)
    }
    order = np.random.default_rng(SEED).permutation(len(points))
    for part in np.array_split(order, min(len(order), 20)):  # no value lies on top of all
        for value, look in looks.items():
            axis.scatter(
                *points[part[values[part] == value]].T, s=4, linewidths=0, alpha=0.8, **look
            )
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(True)
    return {value: axis.scatter([], [], s=8, linewidths=0, **look) for value, look in looks.items()}


def tsne_caption(measured: Mapping[str, Mapping[str, Measured]], cycles: int) -> str:
    """The measured values of every model and label in words."""
    models = "".join(
        f"\n{title}: "
        + ", ".join(
            f"{name} {100 * m.knn:.1f} % ({100 * m.chance:.1f} %; {m.silhouette:+.3f})"
            for name, m in labels.items()
        )
        + "."
        for title, labels in measured.items()
    )
    return (
        f"t-SNE (PCA start, seed {SEED}) of what the head sees of {cycles:,} test cycles. "
        f"Measured in the representation itself, Euclidean: accuracy of the {NEIGHBOURS} nearest "
        "neighbours of other patients (for the patient: of other cycles); in brackets the share of "
        f"the most frequent value, which is chance, and the silhouette.{models}"
    )
