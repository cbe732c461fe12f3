"""The mathematics of the training methods against numbers computed with their authors' code."""

import math

import pytest
import torch
from torch.nn import functional as F

from models.config import StructuredPatchoutConfig
from models.method import Aside
from models.methods.dat import DAT, DATConfig, ReverseGradient, ganin
from models.methods.pafa import PAFA, PAFAConfig, patient_losses
from models.methods.patchmix_cl import (
    PatchMix,
    PatchMixConfig,
    mix_tokens,
    n_taken,
    patchmix_contrast,
)
from models.methods.sg_scl import SGSCL, SGSCLConfig, device_contrast
from models.methods.structured_patchout import StructuredPatchout

Z1 = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
Z2 = torch.tensor([[3.0, 4.0], [4.0, 3.0], [0.0, 2.0]])


def aside(clips, device=None, patient=None):
    device = torch.zeros(clips, dtype=torch.int64) if device is None else torch.tensor(device)
    patient = torch.arange(clips) if patient is None else torch.tensor(patient)
    known = torch.ones(clips, dtype=torch.bool)
    return Aside(torch.zeros(clips, 2), device, known, patient, torch.arange(clips))


# ---------------------------------------------------------------- Patch-Mix


def test_mixed_tokens_come_from_the_partner():
    tokens = (10.0 * torch.arange(3)[:, None] + torch.arange(5))[..., None]
    taken = torch.tensor([True, True, False, True, False])
    mixed = mix_tokens(tokens, torch.tensor([2, 0, 1]), taken)[..., 0]
    assert mixed.tolist() == [[20, 21, 2, 23, 4], [0, 1, 12, 3, 14], [10, 11, 22, 13, 24]]
    assert torch.equal(mix_tokens(tokens, torch.tensor([2, 0, 1]), taken & False), tokens)
    whole = mix_tokens(tokens, torch.tensor([2, 0, 1]), taken | True)
    assert torch.equal(whole, tokens[[2, 0, 1]])


@pytest.mark.parametrize(
    "tokens, lam, taken, kept",
    [
        (5, 1.0, 0, 1.0),
        (5, 0.4, 3, 0.4),
        (5, 0.9, 0, 1.0),  # 5 (1 - 0.9) is a little less than 0.5
        (5, 0.0, 5, 0.0),
        (10, 0.9, 0, 1.0),  # 10 (1 - 0.9) is a little less than 1
        (948, 0.9, 94, 0.900844),
        (948, 0.5, 474, 0.5),
        (948, 0.999, 0, 1.0),
        (948, 0.1, 853, 0.100211),
    ],
)
def test_taken_positions_are_rounded_down(tokens, lam, taken, kept):
    assert n_taken(tokens, lam) == taken
    assert 1 - taken / tokens == pytest.approx(kept, abs=5e-7)


@pytest.mark.parametrize(
    "order, kept, temperature, loss",
    [
        ([1, 2, 0], 1.0, 0.06, 5.990980),
        ([1, 2, 0], 0.75, 0.06, 6.153698),
        ([1, 2, 0], 0.25, 0.06, 6.479136),
        ([0, 2, 1], 1.0, 0.06, 5.990980),
        ([0, 2, 1], 0.75, 0.06, 5.042587),
        ([0, 2, 1], 0.25, 0.06, 3.145802),
        ([1, 2, 0], 0.75, 1.0, 1.228836),
    ],
)
def test_patchmix_contrast(order, kept, temperature, loss):
    found = patchmix_contrast(Z2, Z1, torch.tensor(order), torch.tensor(kept), temperature)
    assert found.item() == pytest.approx(loss, abs=2e-6)


def test_patchmix_gradients():
    clean, mixed = Z1.clone().requires_grad_(), Z2.clone().requires_grad_()
    patchmix_contrast(mixed, clean, torch.tensor([1, 2, 0]), torch.tensor(0.75), 0.06).backward()
    assert clean.grad is None
    assert (mixed.grad * mixed).sum(dim=1).abs().max() < 1e-5  # normalised: only turns


def test_patchmix_plan_is_a_pure_function():
    method = PatchMix(PatchMixConfig(), 4)
    first, again, other = (method.draw(6, 948, seed) for seed in (7, 7, 8))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["taken"], other["taken"])
    shares = []
    for seed in range(400):
        plan = method.draw(3, 20, seed)
        assert float(plan["kept"]) == pytest.approx(1 - int(plan["taken"].sum()) / 20)
        assert sorted(plan["order"].tolist()) == [0, 1, 2]
        shares.append(float(plan["kept"]))
    # lam ~ U(0, 1) and k = floor(20 (1 - lam)): the kept share is uniform on 0.05, ..., 1
    assert sum(shares) / 400 == pytest.approx(0.525, abs=0.06)
    assert min(shares) == pytest.approx(0.05) and max(shares) == 1


def test_patchmix_ce_classifies_both_labels():
    method = PatchMix(PatchMixConfig(loss="ce"), 4)
    plan = {"order": torch.tensor([1, 0]), "kept": torch.tensor(0.25)}
    label = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    (a, first), (b, second) = method.targets(label, plan)
    assert (float(a), float(b)) == (0.25, 0.75) and torch.equal(second, label[[1, 0]])
    assert torch.equal(first, label) and not method.adds_mix


# ---------------------------------------------------------------- SG-SCL


@pytest.mark.parametrize(
    "devices, temperature, loss",
    [
        ([0, 0, 1], 0.06, 5.476691),
        ([0, 0, 0], 0.06, 4.966670),
        ([0, 1, 2], 0.06, 5.772987),
        ([5, 5, 2], 0.06, 5.476691),  # the names of the devices do not matter
        ([0, 0, 1], 1.0, 1.672228),
        ([0, 0, 0], 1.0, 1.641627),
        ([0, 1, 2], 1.0, 1.690006),
    ],
)
def test_device_contrast(devices, temperature, loss):
    known = torch.ones(3, dtype=torch.bool)
    found = device_contrast(Z1, Z2, torch.tensor(devices), known, temperature)
    assert found.item() == pytest.approx(loss, abs=2e-6)


def test_device_contrast_gradient():
    first, second = Z1.clone().requires_grad_(), Z2.clone().requires_grad_()
    known = torch.ones(3, dtype=torch.bool)
    device_contrast(first, second, torch.tensor([0, 0, 1]), known, 0.06).backward()
    expected = [[0, -2.658007], [-4.318308, 0], [2.115715, -2.115715]]
    torch.testing.assert_close(first.grad, torch.tensor(expected), atol=1e-5, rtol=0)
    assert second.grad is None


def test_unknown_devices_are_left_out():
    known = torch.tensor([True, True, False])
    found = device_contrast(Z1, Z2, torch.tensor([0, 1, 2]), known, 1.0)
    rows = F.normalize(torch.cat([Z1, Z2]), dim=1)
    similarity = (rows @ rows.T).fill_diagonal_(-math.inf)
    shares = similarity.log_softmax(dim=1)
    expected = -(shares[0, 3] + shares[3, 0] + shares[1, 4] + shares[4, 1]) / 4
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------- DAT


def test_reversed_gradient():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = ReverseGradient.apply(x, torch.tensor(0.5))
    assert torch.equal(y, x)
    y.backward(torch.tensor([3.0, -1.0]))
    assert x.grad.tolist() == [-1.5, 0.5]


def test_dat_schedule():
    assert [round(ganin(epoch / 50), 3) for epoch in (0, 5, 25)] == [0, 0.462, 0.987]
    method = DAT(DATConfig(schedule="ganin"), 4, 3)
    method.on_step(0.1)
    assert method.diagnostics()["dat/alpha"] == pytest.approx(0.462, abs=1e-3)
    assert DAT(DATConfig(), 4, 3).diagnostics()["dat/alpha"] == 1


def test_dat_ignores_unknown_devices():
    method, features = DAT(DATConfig(), 4, 3), torch.randn(1, 3, 4)
    some = aside(3, device=[0, 2, 4])._replace(device_known=torch.tensor([True, True, False]))
    expected = F.cross_entropy(method.head(features[0, :2]), torch.tensor([0, 2]))
    torch.testing.assert_close(method.loss(features, some, {}, None), expected)


# ---------------------------------------------------------------- PAFA


def test_patient_losses():
    z = torch.tensor([[0.0, 0], [2, 0], [0, 4], [0, 6], [5, 5]], requires_grad=True)
    pcsl, gpal = patient_losses(z, torch.tensor([1, 1, 2, 2, 3]))
    assert pcsl.item() == pytest.approx(4 / 92, rel=1e-5)
    assert gpal.item() == pytest.approx(10.222222, rel=1e-6)
    assert (5 * pcsl + 0.005 * gpal).item() == pytest.approx(0.268502, abs=1e-6)
    assert (50 * pcsl + 0.0005 * gpal).item() == pytest.approx(2.179024, abs=1e-5)
    pcsl.backward()
    torch.testing.assert_close(z.grad[0], torch.tensor([-0.020321, 0.004726]), atol=1e-6, rtol=0)


def test_patient_losses_at_the_ends():
    z = torch.randn(5, 3)
    assert [x.item() for x in patient_losses(z, torch.zeros(5, dtype=torch.int64))] == [0, 0]
    assert patient_losses(z, torch.arange(5))[0].item() == pytest.approx(0, abs=1e-9)


# ---------------------------------------------------------------- all

ALL = pytest.mark.parametrize(
    "method, rows",
    [
        (PatchMix(PatchMixConfig(), 4), 2),
        (SGSCL(SGSCLConfig(), 4), 2),
        (DAT(DATConfig(), 4, 3), 1),
        (PAFA(PAFAConfig(), 4), 1),
    ],
    ids=lambda value: type(value).__name__,
)


@ALL
def test_one_clip_gives_a_finite_loss(method, rows):
    """The fillers of a distributed step have one clip; every parameter still gets a gradient."""
    assert method.views + method.adds_mix == rows
    features = torch.randn(rows, 1, 4, requires_grad=True)
    loss = method.loss(features, aside(1), method.draw(1, 9, 0), None)
    loss.backward()
    assert torch.isfinite(loss) and (loss == 0) == (not isinstance(method, DAT))
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.parameters())


@ALL
def test_nothing_known_of_the_devices(method, rows):
    """What looks at devices has no loss then; the others do not care."""
    features = torch.randn(rows, 6, 4, requires_grad=True)
    unknown = aside(6, patient=[0, 0, 1, 1, 2, 2])
    unknown = unknown._replace(device_known=torch.zeros(6, dtype=torch.bool))
    method.zero_grad()
    loss = method.loss(features, unknown, method.draw(6, 9, 0), None)
    loss.backward()
    assert torch.isfinite(loss) and (loss == 0) == isinstance(method, DAT | SGSCL)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.parameters())


# ---------------------------------------------------------------- structured patchout


def test_patchout_keeps_whole_rows_and_columns():
    method = StructuredPatchout(StructuredPatchoutConfig(), rows=12)
    for columns, left in ((101, 61), (25, 15)):  # 10 s and 2.5 s of the paper's size
        kept = [method.draw(4, 12 * columns, seed)["kept"] for seed in (0, 0, 1)]
        assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])
        assert kept[0][:2].tolist() == [0, 1] and len(kept[0]) == 2 + 8 * left
        grid = torch.zeros(12 * columns, dtype=torch.bool)
        grid[kept[0][2:] - 2] = True
        grid = grid.view(12, columns)
        assert (grid == grid.any(1, keepdim=True) & grid.any(0)).all()
        assert grid.any(1).sum() == 8 and grid.any(0).sum() == left


def test_patchout_leaves_the_tokens_as_they_are():
    method = StructuredPatchout(StructuredPatchoutConfig(0.5, 0.5), rows=2)
    tokens, plan = torch.randn(3, 2 + 8, 5), method.draw(3, 8, 0)
    kept = method.keep(tokens, plan)
    assert kept.shape == (3, 2 + 2, 5) and torch.equal(kept, tokens[:, plan["kept"]])
