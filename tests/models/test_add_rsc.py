"""ADD-RSC against numbers computed with its authors' code."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from models.method import Aside
from models.methods.add_rsc import (
    ADDRSC,
    ADDRSCConfig,
    DifferentialAttention,
    FrequencyFilter,
    bias_denoising,
)
from tests.utils.tiny import tiny_config
from utils.common.errors import UserError


def zero(filter_):
    with torch.no_grad():
        for parameter in filter_.parameters():
            parameter.zero_()
    return filter_


@pytest.mark.parametrize("multiply", [False, True])
def test_zero_weights_filter_nothing(multiply):
    x = torch.randn(2, 7, 16)
    assert torch.equal(zero(FrequencyFilter(16, 0.01, multiply))(x), x)


def test_frequency_filter():
    """Identity weights: the ReLU and the threshold are what is left."""
    filter_, x = zero(FrequencyFilter(8, 0.01, blocks=2)), torch.arange(32.0).reshape(1, 4, 8) / 10
    with torch.no_grad():
        filter_.w1[0], filter_.w2[0] = torch.eye(4), torch.eye(4)
        added = filter_(x) - x
    torch.testing.assert_close(added[0, :, 0], torch.tensor([1.195, 0.405, 1.195, 1.985]))
    torch.testing.assert_close(added.diff(dim=2), torch.full((1, 4, 7), 0.1), atol=1e-5, rtol=0)
    assert added.sum().item() == pytest.approx(49.44, abs=1e-4)


def test_the_filter_in_complex_numbers():
    filter_, x = FrequencyFilter(16, 0.01), torch.randn(2, 9, 16)
    with torch.no_grad():
        for parameter in filter_.parameters():
            parameter.normal_()
        w1, w2, b1, b2 = (
            torch.complex(*getattr(filter_, name)) for name in ("w1", "w2", "b1", "b2")
        )
        z = torch.fft.rfft(x, dim=1, norm="ortho").unflatten(2, (8, 2))
        z = torch.einsum("bthi,hio->btho", z, w1) + b1
        z = torch.einsum("bthi,hio->btho", torch.complex(z.real.relu(), z.imag.relu()), w2) + b2
        z = torch.complex(F.softshrink(z.real, 0.01), F.softshrink(z.imag, 0.01)).flatten(2)
        expected = x + torch.fft.irfft(z, n=9, dim=1, norm="ortho")
        torch.testing.assert_close(filter_(x), expected)


def test_the_mask_multiplies_the_spectrum():
    """A mask of one everywhere doubles the signal; one of i turns every wave by a quarter."""
    filter_, x = zero(FrequencyFilter(8, 0.0, multiply=True)), torch.randn(1, 16, 8)
    with torch.no_grad():
        filter_.b2[0] = 1.0
        torch.testing.assert_close(filter_(x), 2 * x)
        filter_.b2[0], filter_.b2[1] = 0.0, 1.0
        wave = 2 * math.pi * 3 * torch.arange(16.0)[None, :, None].expand(1, 16, 8) / 16
        turned = filter_(wave.cos()) - wave.cos()
    torch.testing.assert_close(turned, -wave.sin(), atol=1e-5, rtol=0)


def test_differential_attention():
    attention = DifferentialAttention(4, heads=2)
    names = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
    parameters = [getattr(attention, name) for name in names]
    parameters += [part.weight for part in (attention.q, attention.k, attention.v, attention.out)]
    with torch.no_grad():
        for i, p in enumerate(parameters):
            wave = torch.sin(torch.arange(p.numel()) + 1.3 * i)
            p.copy_((0.1 if i < 4 else 0.5) * wave.reshape(p.shape))
    out = attention(torch.sin(0.7 * torch.arange(12)).reshape(1, 3, 4))
    expected = [
        [0.129078, -0.104599, -0.098639, 0.133303],
        [-0.167799, -0.042881, 0.180277, -0.009579],
        [0.204106, 0.022252, -0.210581, 0.039027],
    ]
    torch.testing.assert_close(out[0], torch.tensor(expected), atol=1e-6, rtol=0)
    torch.testing.assert_close(attention.weight(), torch.tensor([0.706313, 0.698033]))


def test_equal_halves_leave_a_share_of_one_attention():
    attention, x = DifferentialAttention(8, heads=2), torch.randn(2, 5, 8)
    with torch.no_grad():
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            getattr(attention, name).zero_()
        for part in (attention.q, attention.k):
            halves = part.weight.view(2, 2, 4, 8)
            halves[:, 1] = halves[:, 0]
    q, k, v = (part(x).view(2, 5, 2, 8).transpose(1, 2)
               for part in (attention.q, attention.k, attention.v))  # fmt: skip
    share = (q[..., :4] @ k[..., :4].mT / 2).softmax(dim=-1) @ v
    torch.testing.assert_close(attention.difference(x), (1 - 0.7008207) * share)
    assert DifferentialAttention(8, layer=0).lambda_init == pytest.approx(0.2)


def test_no_matrix_of_all_frames(monkeypatch):
    """Both attentions are one call of the fused kernel, whose q, k and v are equally wide."""
    seen, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, v, **rest: seen.append((q.shape, k.shape, v.shape)) or fused(q, k, v, **rest),
    )
    DifferentialAttention(16)(torch.randn(1, 9, 16))
    assert seen == [((1, 8, 9, 4),) * 3] * 2


def test_bias_denoising_loss():
    none, one = torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])
    assert bias_denoising(torch.zeros(1, 4), none).item() == pytest.approx(0.6661695, abs=1e-6)
    logits = torch.tensor([[2.0, 0, 0, 0]])
    assert bias_denoising(logits, none).item() == pytest.approx(0.0206282, abs=1e-6)
    smoothed = F.cross_entropy(logits, torch.tensor([2]), label_smoothing=0.8 / 3)
    found = bias_denoising(logits, one)
    assert found.item() == pytest.approx(smoothed.item() - 0.720125, abs=1e-6)
    method = ADDRSC(ADDRSCConfig(weight=0.25), 16, 4)
    assert method.weigh(torch.ones(2), None).tolist() == [0.75, 0.75]
    assert method.loss(
        None, Aside(none, none, none, none, none), {}, logits
    ).item() == pytest.approx(0.25 * 0.0206282, abs=1e-6)
    best = torch.tensor([[math.log(4.0)]])  # 0.8 against 0.2
    assert bias_denoising(best, one[:, 1:]).item() == pytest.approx(0, abs=1e-6)


def test_parameters_as_many_as_theirs():
    method = ADDRSC(ADDRSCConfig(), 256, 4)
    parts = (method.first, method.attention, method.feedforward, method)
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert counts == [33_792, 525_376, 394_496, 955_204]


def test_what_the_filter_changes_and_sees():
    """Frames 0 and 1 give the evidence, or all; a second filter comes last."""
    x = torch.randn(3, 1, 16, 10)
    late = torch.cat([x[..., :2], torch.randn(3, 1, 16, 8)], dim=-1)
    for choice, equal in (("first", True), ("all", False)):
        method = ADDRSC(ADDRSCConfig(evidence=choice), 16, 2)
        zero(method.first)
        assert torch.equal(method.filter(x)[1], method.filter(late)[1]) == equal
    twice = ADDRSC(ADDRSCConfig(second_filter=True), 16, 1)
    for part in (twice.first, twice.second, twice.attention.out, twice.feedforward.down):
        zero(part)
    out, evidence = twice.filter(x)
    assert torch.equal(out, x) and evidence.shape == (3, 1)
    with torch.no_grad():
        twice.second.b2[0] = 1.0
    assert not torch.equal(twice.filter(x)[0], x)


def test_bands_must_be_divisible():
    with pytest.raises(UserError, match=r"dataset\.h=36 .*methods\.add_rsc"):
        tiny_config("ast", **{"methods.add_rsc": {}, "dataset.h": 36})
