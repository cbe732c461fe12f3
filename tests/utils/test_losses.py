"""Losses against other people's forms and against the formulas written out clip by clip."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from utils.config.schema import TrainingConfig
from utils.training.losses import build_loss, positive_weights

KEYS = {
    "focal_gamma": 2.0,
    "asymmetric_gamma_pos": 1.0,
    "asymmetric_gamma_neg": 4.0,
    "asymmetric_clip": 0.05,
    "label_smoothing": 0.1,
}


def make(name: str, pos_weight=(1.0, 1.0), **changed):
    training = TrainingConfig(loss=name, **KEYS | changed)
    return build_loss(training, torch.tensor(pos_weight))


def example(n: int = 12, k: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, k, generator=generator)
    return logits, torch.randint(0, 2, (n, min(k, 2)), generator=generator).float()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_bce_is_the_weighted_cross_entropy_of_each_output():
    logits, label = example()
    weight = (2.5, 7.0)
    expected = []
    for z, y in zip(logits.tolist(), label.tolist(), strict=True):
        terms = [
            -(w * t * math.log(sigmoid(x)) + (1 - t) * math.log(1 - sigmoid(x)))
            for x, t, w in zip(z, y, weight, strict=True)
        ]
        expected.append(sum(terms) / len(terms))
    found = make("bce", weight)(logits, label)
    assert found.shape == (12,)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_positive_weights_count_the_training_labels():
    label = torch.tensor([[1.0, 0.0], [0, 0], [0, 1], [0, 0], [1, 0]])
    expected = torch.tensor([1.5 * 3 / 2, 1.5 * 4 / 1])
    torch.testing.assert_close(positive_weights(label, 1.5), expected)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 3.5])
def test_focal_equals_torchvision(gamma):
    logits, label = example()
    expected = sigmoid_focal_loss(logits, label, alpha=-1, gamma=gamma).mean(dim=1)
    torch.testing.assert_close(make("focal", focal_gamma=gamma)(logits, label), expected)


@pytest.mark.parametrize(("positive", "negative", "clip"), [(1, 4, 0.05), (0, 2, 0.2), (2, 0, 0.0)])
def test_asymmetric_equals_the_formula(positive, negative, clip):
    logits, label = example()
    expected = []
    for z, y in zip(logits.tolist(), label.tolist(), strict=True):
        terms = []
        for x, t in zip(z, y, strict=True):
            p = sigmoid(x)
            shifted = max(p - clip, 0.0)
            loss_positive = (1 - p) ** positive * math.log(p)
            loss_negative = shifted**negative * math.log(1 - shifted)
            terms.append(-loss_positive if t else -loss_negative)
        expected.append(sum(terms) / len(terms))
    loss = make(
        "asymmetric",
        asymmetric_gamma_pos=positive,
        asymmetric_gamma_neg=negative,
        asymmetric_clip=clip,
    )
    torch.testing.assert_close(loss(logits, label), torch.tensor(expected))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ce_is_a_softmax_over_the_four_classes(smoothing):
    logits, label = example(k=4)
    expected = []
    for z, (crackle, wheeze) in zip(logits.tolist(), label.tolist(), strict=True):
        target = {(0, 0): 0, (1, 0): 1, (0, 1): 2, (1, 1): 3}[int(crackle), int(wheeze)]
        log_norm = math.log(sum(math.exp(x) for x in z))
        share = [smoothing / 4 + (1 - smoothing) * (i == target) for i in range(4)]
        expected.append(-sum(q * (x - log_norm) for q, x in zip(share, z, strict=True)))
    loss = make("ce", label_smoothing=smoothing)
    torch.testing.assert_close(loss(logits, label), torch.tensor(expected))


@pytest.mark.parametrize("gamma", [2.0, 0.5])
@pytest.mark.parametrize("name", ["bce", "focal", "asymmetric", "ce"])
def test_gradients_are_right_and_finite_far_out(name, gamma):
    logits, label = example(k=4 if name == "ce" else 2)
    gammas = {"focal_gamma": gamma, "asymmetric_gamma_pos": gamma, "asymmetric_gamma_neg": gamma}
    loss = make(name, **gammas)
    double = build_loss(TrainingConfig(loss=name, **KEYS | gammas), torch.ones(2).double())
    wide = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: double(z, label.double()).sum(), wide)
    for scale in (1e2, 1e4):
        far = (logits.sign() * scale).requires_grad_()
        value = loss(far, label)
        value.sum().backward()
        assert torch.isfinite(value).all()
        assert torch.isfinite(far.grad).all()
