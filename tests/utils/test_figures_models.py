"""Masks, FiLM parameters and embeddings: the numbers behind the figures are the model's own."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import pairwise_distances

from data.batch import Metadata
from data.corpora.icbhi import DEVICES
from models.conditioners.film import FiLM
from models.conditioners.softfilm import SoftFiLM
from models.conditioners.tafilm import TAFiLM
from models.config import FiLMConfig, SoftFiLMConfig
from models.encoders import MetadataEmbeddings
from utils.common.errors import UserError
from utils.figures.embeddings import (
    Measured,
    knn_accuracy,
    measure,
    tsne,
    tsne_caption,
    tsne_figure,
)
from utils.figures.film import (
    cycle_means,
    distances,
    distribution_figure,
    film_statistics,
    heatmap_caption,
    heatmap_figure,
    parameters_caption,
    parameters_figure,
)
from utils.figures.masks import analyse_masks, mask_caption, mask_figure, sorted_weights

WIDTH, DEPTH = 24, 3
COUNTS = (1.0,) * 4 + (0.0,), (1.0,) * 7 + (0.0,)  # of devices and of sites


def sigmoid_overlap(scale: float, temperature: float) -> float:
    """Overlap of three sigmoid masks that start by thirds at +-scale, in closed form."""
    low = 1 / (1 + math.exp(scale / max(temperature, 0.1)))
    return (2 * (1 - low) * low + low * low) / 3


def metadata(n=40, seed=0) -> Metadata:
    g = torch.Generator().manual_seed(seed)
    return Metadata(
        device=torch.randint(0, 4, (n,), generator=g),
        site=torch.randint(0, 7, (n,), generator=g),
        rest=torch.randn(n, 3, generator=g),
        known=torch.ones(n, 5, dtype=torch.bool),
    )


def randomise(module):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return module.eval()


def soft(n_sets=1, temperature=1.0):
    config = SoftFiLMConfig(mask_temperature=temperature, per_layer_masks=n_sets > 1)
    embeddings = MetadataEmbeddings(config, *COUNTS)
    return randomise(SoftFiLM(embeddings, config, embed_dim=WIDTH, depth=DEPTH))


def analyse(conditioner, steps=4, **changes):
    options = {"lr": 1e-2, "steps": steps, "steps_per_epoch": 2, "schedule": lambda step: 1.0}
    return analyse_masks(conditioner, metadata(), **{**options, **changes})


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("n_sets", [1, DEPTH])
def test_plotted_masks_are_the_models(n_sets):
    conditioner = soft(n_sets, temperature=0.4)
    expected = torch.sigmoid(conditioner.masks.logits / 0.4).detach().numpy()
    analysis = analyse(conditioner)
    assert analysis.temperature == pytest.approx(0.4)
    np.testing.assert_allclose(analysis.weights, expected, rtol=1e-5)
    drawn = np.asarray(mask_figure(analysis).axes[0].images[0].get_array())
    assert drawn.shape == (3 * n_sets, WIDTH)
    np.testing.assert_allclose(
        np.sort(drawn, 1), np.sort(expected.reshape(3 * n_sets, -1), 1), 1e-5
    )


def test_heat_map_is_sorted_by_owner():
    analysis = analyse(soft())
    ordered = sorted_weights(analysis)[:, 0]
    columns = {tuple(c) for c in analysis.weights[:, 0].T}
    assert {tuple(c) for c in ordered.T} == columns
    assert (np.diff(ordered.argmax(axis=0)) >= 0).all()


def test_counts_and_changed_owners():
    conditioner = soft()
    masks = conditioner.masks
    with torch.no_grad():
        masks.logits.copy_(masks.initial_logits)
        masks.logits[1, 0, 0] = 9.0  # the site takes the first dimension from the device
    analysis = analyse(conditioner)
    assert analysis.changed.tolist() == [1]
    assert analysis.dominant[:, 0].tolist() == [WIDTH // 3 - 1, WIDTH // 3 + 1, WIDTH // 3]
    assert analysis.active[:, 0].tolist() == [WIDTH // 3, WIDTH // 3 + 1, WIDTH // 3]


def test_overlaps_stand_next_to_their_controls():
    conditioner = soft(temperature=0.5)
    before = conditioner.masks.logits.detach().clone()
    analysis = analyse(conditioner, steps=200, lr=0.05)
    w = analysis.weights[:, 0]
    trained = analysis.overlap["trained"]
    assert trained[0, 2] == pytest.approx((w[0] * w[2]).mean(), rel=1e-5)
    untrained = analysis.overlap["untrained, same τ"]
    assert untrained[0, 1] == pytest.approx(sigmoid_overlap(2.0, 0.5), rel=1e-5)
    alone = analysis.overlap["regularisers alone"]
    assert 0 < alone[0, 1] < untrained[0, 1]
    assert np.isnan(np.diag(trained)).all()
    assert torch.equal(conditioner.masks.logits, before)  # the analysis leaves the model alone
    named = f"trained {100 * np.nanmean(trained):.2f} %"
    assert named in mask_caption(analysis)


def test_effect_is_the_norm_of_the_modulation():
    conditioner = soft()
    parts = conditioner.contributions(metadata()).detach()  # [K, B, L, 2, D]
    expected = parts.flatten(3).norm(dim=-1).mean(dim=1)
    np.testing.assert_allclose(analyse(conditioner).effect, expected, rtol=1e-5)


# ---------------------------------------------------------------- FiLM parameters


def film(kind=FiLM):
    config = FiLMConfig()
    return randomise(
        kind(MetadataEmbeddings(config, *COUNTS), config, embed_dim=WIDTH, depth=DEPTH)
    )


def groupings(cycles):
    return {"device": [DEVICES[i] for i in cycles.device], "age": ["< 18", ">= 65"] * 20}


def test_statistics_are_those_of_gamma_and_beta(monkeypatch):
    monkeypatch.setattr("utils.figures.film.BATCH", 7)  # the sums run over several batches
    conditioner, cycles = film(), metadata()
    (found,) = film_statistics(conditioner, cycles, groupings(cycles))
    modulation = conditioner.encode(cycles).modulation
    gamma = torch.stack([1 + m.scale[:, 0] for m in modulation], 1).detach().double().numpy()
    beta = torch.stack([m.shift[:, 0] for m in modulation], 1).detach().double().numpy()
    close = {"rtol": 1e-5, "atol": 1e-5}
    for number, name in enumerate(DEVICES):
        rows = cycles.device.numpy() == number
        np.testing.assert_allclose(found.mean["device"][name][:, 0], gamma[rows].mean(0), **close)
        np.testing.assert_allclose(found.mean["device"][name][:, 1], beta[rows].mean(0), **close)
        spread = np.sqrt(((beta[rows] - beta[rows].mean(0)) ** 2).sum(2).mean(0))
        np.testing.assert_allclose(found.within["device"][name][:, 1], spread, **close)
    np.testing.assert_allclose(found.overall[:, 0], gamma.mean(0), **close)
    assert sum(found.cycles["device"].values()) == len(cycles)


def test_distances_between_and_within():
    conditioner, cycles = film(), metadata()
    (found,) = film_statistics(conditioner, cycles, groupings(cycles))
    between, within = distances(found, "device")
    means = list(found.mean["device"].values())
    pairs = [np.linalg.norm(a - b, axis=2) for i, a in enumerate(means) for b in means[:i]]
    np.testing.assert_allclose(between, np.mean(pairs, axis=0))
    assert within.shape == between.shape == (DEPTH, 2) and (within > 0).all()
    hidden = cycles.without("site", "age", "bmi", "duration")  # only the device is left
    (alone,) = film_statistics(conditioner, hidden, groupings(cycles))
    np.testing.assert_allclose(distances(alone, "device")[1], 0, atol=1e-5)


def test_lines_show_mean_and_spread():
    cycles = metadata()
    (found,) = film_statistics(film(), cycles, groupings(cycles))
    figure = parameters_figure(found)
    mean_gamma, _, _, spread_beta = (figure.axes[row * 2] for row in range(4))
    lines = {line.get_label().split(" (")[0]: line.get_ydata() for line in mean_gamma.lines}
    centre = found.mean["device"]["Meditron"]
    np.testing.assert_allclose(lines["Meditron"], centre[:, 0].mean(axis=1) - 1)
    lines = {line.get_label().split(" (")[0]: line.get_ydata() for line in spread_beta.lines}
    np.testing.assert_allclose(lines["Meditron"], centre[:, 1].std(axis=1))
    image = np.asarray(heatmap_figure(found).axes[0].images[0].get_array())
    expected = found.overall[:, 0] - 1
    np.testing.assert_allclose(np.sort(image, 1), np.sort(expected, 1))
    between, _ = distances(found, "device")
    for caption in (parameters_caption(found), heatmap_caption(found)):
        assert f"γ: between devices {between[:, 0].mean():.3g}" in caption


def test_boxes_hold_each_cycle_under_its_value(monkeypatch):
    monkeypatch.setattr("utils.figures.film.BATCH", 7)
    conditioner, cycles = film(), metadata()
    (found,) = cycle_means(conditioner, cycles)
    modulation = conditioner.encode(cycles).modulation
    gamma = torch.stack([1 + m.scale[:, 0] for m in modulation]).mean((0, 2)).detach().numpy()
    np.testing.assert_allclose(found.values[:, 0], gamma, rtol=1e-5)
    figure = distribution_figure(found, groupings(cycles))
    labels = [text.get_text() for text in figure.axes[2].get_xticklabels()]  # beta by device
    place = [label.split("\n")[0] for label in labels].index("Meditron")
    rows = cycles.device.numpy() == DEVICES.index("Meditron")
    assert labels[place].endswith(f"({rows.sum()})")
    median = [line for line in figure.axes[0].lines if line.get_linewidth() == 0.9][place]
    assert median.get_ydata()[0] == pytest.approx(np.median(gamma[rows]), rel=1e-5)


def test_tafilm_has_parameters_for_both_tokens():
    cycles = metadata()
    special, patches = film_statistics(film(TAFiLM), cycles, groupings(cycles))
    assert (special.tokens, patches.tokens) == ("CLS and DIST", "patches")
    assert special.layers == (0, 1, 2) and patches.layers == (0, 1)  # none in the last block
    assert not np.allclose(special.overall[0], patches.overall[0])


# ---------------------------------------------------------------- embeddings


def test_nearest_neighbours_by_hand():
    x = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]])
    distance = pairwise_distances(x)
    assert knn_accuracy(distance, ["a"] * 3 + ["b"] * 3, k=2) == 1.0
    assert knn_accuracy(distance, ["a", "b", "a", "b", "a", "b"], k=1) == 0.0
    # leaving the own group out, only cycles of the other cluster are left to ask
    groups = [0, 0, 0, 1, 1, 1]
    assert knn_accuracy(distance, ["a"] * 3 + ["b"] * 3, groups, k=2) == 0.0
    assert np.isnan(knn_accuracy(distance, ["a"] * 6, [0] * 6, k=2))


def test_a_patient_is_not_its_own_neighbour():
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(20), 6)
    x = rng.normal(size=(20, 8))[patient] * 10 + rng.normal(size=(120, 8))
    device = np.array(["A", "B"])[rng.integers(0, 2, 20)[patient]]  # one per patient, else noise
    labels = {"class": device, "device": device, "site": device, "patient": patient}
    found = measure(x, labels)
    assert found["patient"].knn > 0.95 and found["patient"].chance == pytest.approx(1 / 20)
    assert found["patient"].silhouette > 0.3
    assert found["device"].knn < 0.75  # with the own patient it would be 1
    assert knn_accuracy(pairwise_distances(x), device) > 0.95


def test_maps_are_reproducible_and_drawn_as_they_are():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 6))
    first = tsne(x)
    np.testing.assert_array_equal(first, tsne(x))
    labels = {
        "class": np.array(["normal", "both"] * 15), "device": np.array(["Meditron"] * 30),
        "site": np.array(["Al", "unknown", "Tc"] * 10), "patient": np.arange(30),
    }  # fmt: skip
    figure = tsne_figure({"AST": first, "SoftFiLM-AST": first[::-1]}, labels)
    parts = [np.asarray(part.get_offsets()) for part in figure.axes[3].collections]
    assert {tuple(p) for p in np.concatenate(parts)} == {tuple(p) for p in first}
    normal, both = (part.get_paths()[0].vertices for part in figure.axes[3].collections[:2])
    assert normal.shape != both.shape  # a marker of its own
    assert figure.axes[0].get_ylabel() == "AST" and figure.axes[1].get_title() == "device"
    text = tsne_caption({"AST": {"class": Measured(0.1, 0.5, 0.25)}}, 30)
    assert text.splitlines()[1:] == ["AST: class 50.0 % (25.0 %; +0.100)."]
    with pytest.raises(UserError, match="at least five"):
        tsne(x[:4])
