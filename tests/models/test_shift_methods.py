"""Product of experts and group DRO against a few independent lines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from data.batch import Metadata
from models.config import GroupDROConfig, PriorProductConfig
from models.method import Aside, TrainingCycles
from models.methods.group_dro import GroupDRO
from models.methods.prior_product import PriorProduct
from utils.common.errors import UserError


def cycles(n=60, patients=12, seed=0, rows=None) -> TrainingCycles:
    """n cycles of 3 devices whose crackles follow the device; every fifth device is unknown."""
    rng = np.random.default_rng(seed)
    patient = np.arange(n) % patients
    device = patient % 3
    known = torch.ones(n, 5, dtype=torch.bool)
    known[::5, 0] = False
    crackle = rng.random(n) < np.array([0.1, 0.5, 0.9])[device]
    label = torch.from_numpy(np.stack([crackle, rng.random(n) < 0.4], 1)).float()
    metadata = Metadata(
        device=torch.from_numpy(device),
        site=torch.from_numpy(rng.integers(0, 4, n)),
        rest=torch.from_numpy(rng.standard_normal((n, 3))).float(),
        known=known,
    )
    row = torch.arange(n) * 2 if rows is None else rows
    return TrainingCycles(row, metadata, label, torch.from_numpy(patient))


def aside_of(given: TrainingCycles, index) -> Aside:
    m = given.metadata
    return Aside(
        given.label[index], m.device[index], m.known[index, 0], given.patient[index],
        given.cycle[index],
    )  # fmt: skip


def test_prior_is_fitted_on_other_patients_alone():
    given = cycles()
    method = PriorProduct(PriorProductConfig(fields=["device"], strength=0.7, folds=12), False)
    method.prepare(given)
    # twelve folds of twelve patients: leave one patient out, dummies of the device by hand
    device = np.where(given.metadata.known[:, 0], given.metadata.device, 3)
    x = (device[:, None] == np.arange(4)).astype(float)
    expected = np.empty((60, 2))
    for patient in range(12):
        own = given.patient.numpy() == patient
        for k in range(2):
            fit = LogisticRegression(max_iter=2000).fit(x[~own], given.label[~own, k].numpy())
            expected[own, k] = fit.decision_function(x[own])
    expected -= expected.mean(axis=0)
    index = torch.tensor([3, 59, 0, 17])
    logits = torch.randn(4, 2)
    found = method.logits(logits, aside_of(given, index)) - logits
    np.testing.assert_allclose(found, 0.7 * expected[index], atol=1e-5)


@pytest.mark.parametrize("learner", ["linear", "trees"])
def test_a_patients_labels_do_not_reach_its_prior(learner):
    given = cycles()
    config = PriorProductConfig(learner=learner, folds=2)
    first, second = PriorProduct(config, True), PriorProduct(config, True)
    first.prepare(given)
    own = given.patient == 4
    flipped = given._replace(label=torch.where(own[:, None], 1 - given.label, given.label))
    second.prepare(flipped)
    a, b = first.prior - first.prior[own][:1], second.prior - second.prior[own][:1]
    torch.testing.assert_close(a[own], b[own])  # but for the mean that was taken out
    assert not torch.allclose(a[~own], b[~own])
    assert first.prior.mean(dim=0).abs().max() < 1e-6


def test_prior_comes_back_with_the_state():
    method, other = (PriorProduct(PriorProductConfig(), False) for _ in range(2))
    method.prepare(cycles())
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.prior, method.prior) and torch.equal(other.cycle, method.cycle)
    with pytest.raises(UserError, match="training part has one"):
        method.prepare(cycles(patients=1))


def dro(step_size=0.3, strength=1.0, adjustment=2.0):
    method, given = GroupDRO(GroupDROConfig(step_size, strength, adjustment), 3, 4), cycles()
    method.prepare(given)
    return method, given


def by_hand(given):
    """Group of each cycle as (device or None, crackle, wheeze), and its training share."""
    m = given.metadata
    names = [
        (int(d) if k else None, *map(int, y))
        for d, k, y in zip(m.device, m.known[:, 0], given.label.tolist(), strict=True)
    ]
    return names, {name: names.count(name) / len(names) for name in names}


def test_group_weights_are_the_papers():
    method, given = dro()
    names, share = by_hand(given)
    q = dict.fromkeys(share, 1 / len(share))
    rng = np.random.default_rng(3)
    for _ in range(3):
        index, losses = rng.choice(60, 16, replace=False), rng.random(16)
        parts = np.split(np.arange(16), [5])  # two micro-batches of different size
        found = [
            method.weigh(torch.from_numpy(losses[p]).float(), aside_of(given, index[p]))
            for p in parts
        ]
        expected = [losses[i] * q[names[c]] / share[names[c]] for i, c in enumerate(index)]
        np.testing.assert_allclose(torch.cat(found), expected, rtol=1e-5)
        method.after_step()
        of = {g: [losses[i] for i, c in enumerate(index) if names[c] == g] for g in q}
        raised = {
            g: q[g] * np.exp(0.3 * (np.mean(of[g]) + 2 / np.sqrt(60 * share[g]))) if of[g] else q[g]
            for g in q
        }
        q = {g: v / sum(raised.values()) for g, v in raised.items()}
    assert sorted(method.q[method.q > 0].tolist()) == pytest.approx(sorted(q.values()), rel=1e-5)


def test_expected_loss_is_the_weighted_sum_of_groups():
    method, given = dro()
    names, share = by_hand(given)
    losses = torch.rand(60)
    mean = method.weigh(losses, aside_of(given, torch.arange(60))).mean().item()
    of = {g: [v for v, n in zip(losses.tolist(), names, strict=True) if n == g] for g in share}
    assert mean == pytest.approx(sum(np.mean(v) for v in of.values()) / len(of), rel=1e-5)


def test_strength_zero_leaves_losses_and_logits():
    method, given = dro(strength=0.0)
    losses, aside = torch.rand(60), aside_of(given, torch.arange(60))
    assert torch.equal(method.weigh(losses, aside), losses)
    prior = PriorProduct(PriorProductConfig(strength=0.0), False)
    prior.prepare(given)
    logits = torch.randn(60, 2)
    assert torch.equal(prior.logits(logits, aside), logits)
