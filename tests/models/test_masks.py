"""SoftFiLM's masks: temperature, regularisers, diagnostics and the two controls."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from models.config import SoftFiLMConfig
from models.masks import SoftMasks, mask_controls

FACTORS = ("device", "site", "rest")


def sigmoid_overlap(scale: float, temperature: float) -> float:
    """Overlap of three sigmoid masks that start by thirds at +-scale, in closed form."""
    low = 1 / (1 + math.exp(scale / max(temperature, 0.1)))
    return (2 * (1 - low) * low + low * low) / 3


@pytest.mark.parametrize(("scale", "tau", "expected"), [(2.0, 1.0, 0.075), (0.5, 0.2, 0.049)])
def test_overlap_at_the_start(scale, tau, expected):
    overlap = (
        SoftMasks(FACTORS, 768, SoftFiLMConfig(mask_init_scale=scale, mask_temperature=tau))
        .overlap()
        .item()
    )
    assert overlap == pytest.approx(expected, abs=6e-4)
    assert overlap == pytest.approx(sigmoid_overlap(scale, tau), rel=1e-5)


def test_regularisation_is_what_the_paper_says():
    masks = SoftMasks(
        FACTORS, 9, SoftFiLMConfig(mask_overlap_lambda=0.3, mask_coverage_lambda=0.7), n_sets=2
    )
    torch.nn.init.normal_(masks.logits)
    w = torch.sigmoid(masks.logits)
    overlap = ((w[0] * w[1]).mean() + (w[0] * w[2]).mean() + (w[1] * w[2]).mean()) / 3
    coverage = (1 - w.max(dim=0).values).mean()
    assert torch.allclose(masks.regularisation(), 0.3 * overlap + 0.7 * coverage)


def test_regularisation_reaches_the_model_output(make_model, make_spectrogram, make_metadata):
    x, metadata = make_spectrogram(2), make_metadata(2)
    soft = make_model("ast_softfilm", {"mask_overlap_lambda": 0.5})
    out = soft(x, metadata)
    assert out.regularisation.item() == pytest.approx(0.5 * sigmoid_overlap(2.0, 1.0), rel=1e-4)
    plain = make_model("ast")(x, metadata)
    assert plain.regularisation.shape == () and plain.regularisation.item() == 0


def test_annealing_keeps_one_for_five_epochs_and_ends_at_a_fifth():
    masks = SoftMasks(FACTORS, 9, SoftFiLMConfig(mask_annealing=True, mask_annealing_epochs=20))
    taus = []
    for epoch in range(25):
        masks.set_epoch(epoch)
        taus.append(float(masks.temperature))
    assert taus[:6] == [1.0] * 6
    assert taus[12] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 7 / 14)))
    assert taus[19:] == pytest.approx([0.2] * 6)
    assert all(a >= b for a, b in itertools.pairwise(taus))
    constant = SoftMasks(FACTORS, 9, SoftFiLMConfig(mask_temperature=0.7))
    constant.set_epoch(15)
    assert float(constant.temperature) == pytest.approx(0.7)


def test_annealing_is_off_by_default_and_reaches_the_masks_by_key(make_model):
    for annealing, tau in ((False, 1.0), (True, 0.2)):
        config = {"mask_annealing": annealing, "mask_annealing_epochs": 8}
        soft = make_model("ast_softfilm", config).conditioner
        soft.on_epoch(7)
        assert soft.masks.temperature.item() == pytest.approx(tau)


def test_temperature_is_never_below_a_tenth():
    masks = SoftMasks(
        FACTORS, 9, SoftFiLMConfig(mask_temperature=0.01, mask_init_scale=0.05)
    )  # not saturated
    assert torch.allclose(masks(), torch.sigmoid(masks.logits / 0.1))


def test_masks_have_their_own_learning_rate_and_no_weight_decay(make_model):
    groups = {g.name: g for g in make_model("ast_softfilm").parameter_groups()}
    assert groups["masks"].lr_multiplier == 10 and groups["masks"].weight_decay == 0
    assert [p.shape for p in groups["masks"].parameters] == [(3, 1, 48)]
    others = [g for name, g in groups.items() if name != "masks"]
    assert all(g.lr_multiplier == 1 and g.weight_decay is None for g in others)


def test_diagnostics_tell_overlaps_and_changed_owners(make_model):
    soft = make_model("ast_softfilm").conditioner
    with torch.no_grad():
        soft.masks.logits[0, 0, 20] = 5.0  # taken from site
        soft.masks.logits[2, 0, 0] = 1.0  # not enough to take it from device
    d = soft.diagnostics()
    assert d["masks/changed_owners"] == 1
    w = torch.sigmoid(soft.masks.logits)
    assert d["masks/overlap_device_site"] == pytest.approx((w[0] * w[1]).mean().item())
    assert d["masks/coverage"] == pytest.approx(w.amax(0).mean().item())
    assert d["masks/temperature"] == 1
    assert d["film/mean_abs_scale"] > 0


def test_controls_start_from_the_initial_masks_at_the_final_temperature():
    masks = SoftMasks(
        FACTORS,
        48,
        SoftFiLMConfig(mask_init_scale=0.5, mask_annealing=True, mask_annealing_epochs=10),
    )
    masks.set_epoch(9)
    with torch.no_grad():
        masks.logits += torch.randn_like(masks.logits)
    before = masks.logits.detach().clone()
    rng = torch.get_rng_state()
    result = mask_controls(masks, lr=1e-2, steps=40, steps_per_epoch=4)
    assert torch.equal(masks.logits, before) and float(masks.temperature) == pytest.approx(0.2)
    assert torch.equal(torch.get_rng_state(), rng)
    assert masks.logits.grad is None
    assert result["overlap_initial_same_temperature"] == pytest.approx(sigmoid_overlap(0.5, 0.2))
    assert result["overlap_trained"] == pytest.approx(masks.overlap().item())
    assert result["temperature"] == pytest.approx(0.2)
    only = result["overlap_regularisers_only"]
    assert 0 < only < result["overlap_initial_same_temperature"]
    # judged at the final temperature also when its own training ends at another one
    short = mask_controls(masks, lr=1e-6, steps=4, steps_per_epoch=4)
    assert short["overlap_regularisers_only"] == pytest.approx(sigmoid_overlap(0.5, 0.2), rel=1e-3)


def test_factor_effects_tell_which_factor_acts(make_model, make_metadata):
    soft = make_model("ast_softfilm").conditioner.train()
    metadata = make_metadata(6)
    with torch.no_grad():
        for g in (soft.generators["device"], soft.generators["rest"]):
            g.weight.zero_()
        soft.generators["device"].bias[1].fill_(2.0)  # a constant: no effect of the device
    effects = soft.factor_effects(metadata)
    assert effects.shape == (3, 3) and soft.training
    expected = 2.0 * soft.masks()[0, 0].repeat(2).norm()
    assert effects[0].tolist() == pytest.approx([0, expected.item(), 0])
    assert (effects[1] > 0).all() and (effects[2] == 0).all()
    centred = soft.factor_effects(metadata, centred=True)
    assert torch.allclose(centred[0], torch.zeros(3), atol=1e-5) and (centred[1] > 0).all()
    scale, shift = (soft.factor_effects(metadata, part=p)[1] for p in ("scale", "shift"))
    assert not torch.allclose(scale, shift)


def test_controls_of_a_model_are_those_of_its_masks_at_their_own_rate(make_model):
    soft = make_model("ast_softfilm", {"mask_lr_multiplier": 7.0}).conditioner
    given = {"steps": 20, "steps_per_epoch": 5, "schedule": lambda step: 1 - step / 20}
    expected = mask_controls(soft.masks, lr=7e-3, **given)
    found = soft.controls(lr=1e-3, **given)
    assert found == {f"masks/{name}": value for name, value in expected.items()}
    assert make_model("ast_film").conditioner.controls(lr=1e-3, **given) == {}
