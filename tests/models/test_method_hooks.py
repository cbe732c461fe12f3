"""Training methods in the model: where each hook acts, with every conditioner, in any precision."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from data.batch import Batch
from models.method import Method, Methods
from models.registry import METHODS, VARIANTS

CLIPS = 4
DEAF = [name for name, kind in METHODS.items() if not kind.hears]
#: methods with a loss on the features or weights of their own
OUTSIDE = {"prior_product", "group_dro"}  # of the model: they change the task loss
LEARNING = [name for name in DEAF if name not in {"structured_patchout", *OUTSIDE}]
FILTERS = {"add_rsc"}  # methods whose input filter changes every prediction


@pytest.fixture
def make_batch(make_metadata):
    def make(clips: int = CLIPS) -> Batch:
        metadata = dataclasses.replace(make_metadata(clips), device=torch.arange(clips) // 2)
        label = torch.arange(2.0 * clips).reshape(clips, 2) % 2
        rows = torch.arange(clips)
        return Batch(torch.zeros(clips, 0), rows, metadata, label, rows, rows // 2)

    return make


@pytest.fixture
def make_pair(make_model):
    """make_pair(variant, method) -> the model without and with the method, in training mode."""

    def make(variant: str, method: str, **sizes):
        config, sizes = {"dropout": 0.0}, {"device_counts": [1.0] * 5, **sizes}
        methods = {method: METHODS[method].config_class()}
        pair = [make_model(variant, config, methods=m, **sizes).train() for m in ({}, methods)]
        for model in pair:  # generators start at zero, where a wrong row's modulation is not seen
            torch.manual_seed(1)
            for parameter in model.conditioner.parameters():
                nn.init.normal_(parameter, std=0.3)
        return pair

    return make


def views(spectrogram, model):
    """Spectrograms of as many views as the model's methods want; the first is as given."""
    extra = [spectrogram + n for n in range(1, model.methods.views)]
    return torch.cat([spectrogram, *extra])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", LEARNING)
def test_logits_stay_and_the_loss_reaches_all(
    method, variant, make_pair, make_batch, make_spectrogram
):
    plain, model = make_pair(variant, method)
    batch, spectrogram = make_batch(), make_spectrogram(CLIPS)
    step = model.draw(batch, 3)
    out = model(views(spectrogram, model), batch.metadata, step)
    expected = plain(model.methods.filter(spectrogram)[0], batch.metadata).logits
    torch.testing.assert_close(out.logits, expected)
    again = model(views(spectrogram, model), batch.metadata, model.draw(batch, 3))
    assert torch.equal(out.regularisation, again.regularisation)
    loss = out.regularisation + out.logits.square().mean() * (method in FILTERS)
    loss.backward()
    learn = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    own = {f"methods.{name}" for name, _ in model.methods.named_parameters()}
    assert own | {"backbone.pos_embed", "backbone.patch_embed.proj.weight"} <= learn
    fed = {name for name in learn if name.startswith("conditioner.")}
    if method not in FILTERS:  # GRF: after pooling
        assert bool(fed) == (variant in ("ast_film", "ast_tafilm", "ast_softfilm"))


@pytest.mark.parametrize("method", [name for name in DEAF if name not in FILTERS])
def test_predictions_do_not_depend_on_its_weights(method, make_pair, make_batch, make_spectrogram):
    plain, model = (m.eval() for m in make_pair("ast_film", method))
    with torch.no_grad():
        for parameter in model.methods.parameters():
            parameter.normal_()
    spectrogram, metadata = make_spectrogram(CLIPS), make_batch().metadata
    assert torch.equal(model(spectrogram, metadata).logits, plain(spectrogram, metadata).logits)


@pytest.mark.parametrize("method", LEARNING)
def test_bfloat16_gives_the_loss_of_float32(method, make_pair, make_batch, make_spectrogram):
    _, model = make_pair("ast_softfilm", method)
    batch, spectrogram = make_batch(8), make_spectrogram(8)
    step, losses = model.draw(batch, 0), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model(views(spectrogram, model), batch.metadata, step).regularisation)
    assert losses[1].dtype == torch.float32 and not torch.equal(*losses)
    torch.testing.assert_close(*losses, rtol=2e-2, atol=0)


@pytest.mark.parametrize("method", [name for name in DEAF if name not in OUTSIDE])
def test_one_graph_serves_every_plan(method, make_pair, make_batch, make_spectrogram):
    _, model = make_pair("ast_film", method, depth=1, trainable_blocks=1)
    batch, spectrogram = make_batch(), make_spectrogram(CLIPS)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            arguments = views(spectrogram, model), batch.metadata, model.draw(batch, seed)
            torch.testing.assert_close(compiled(*arguments), model(*arguments))


# ---------------------------------------------------------------- hooks no shipped method has


class Affine(Method):
    """a x + b of the spectrogram, the logits and the task losses; five tokens stay."""

    filters = drops = True

    def __init__(self, a: float, b: float):
        super().__init__()
        self.a, self.b, self.found = nn.Parameter(torch.tensor(a)), b, None

    def filter(self, spectrogram):
        return self.a * spectrogram + self.b, self.a * torch.ones(len(spectrogram), 1)

    def keep(self, tokens, plan):
        return tokens[:, :5]

    def loss(self, features, aside, plan, evidence):
        return evidence.sum()

    def logits(self, logits, aside):
        return self.a * logits + self.b

    def weigh(self, losses, aside):
        return self.a * losses + self.b * aside.patient


@pytest.fixture
def affine(make_model):
    model = make_model("ast_film", {"dropout": 0.0}).train()
    plain = make_model("ast_film", {"dropout": 0.0}).train()
    model.methods = Methods([Affine(2.0, 0.0), Affine(1.0, 3.0)])
    return plain, model


def test_methods_act_in_their_order(affine, make_batch):
    _, model = affine
    batch = make_batch()
    step = model.draw(batch, 0)
    logits = torch.randn(CLIPS, 2)
    losses = model.methods.task_losses(lambda x, _: x.sum(dim=1), logits, batch.label, step)
    expected = 2 * (2 * logits + 3).sum(dim=1) + 3 * batch.patient
    torch.testing.assert_close(losses, expected)
    assert model.methods.filter(torch.ones(1, 1, 2, 2))[0].unique().tolist() == [5]


def test_dropped_tokens_and_evidence(affine, make_batch, make_spectrogram):
    """Blocks see what `keep` leaves, `loss` gets its own evidence; evaluation only filters."""
    plain, model = affine
    batch, spectrogram, seen = make_batch(), make_spectrogram(CLIPS), []
    model.backbone.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    out = model(spectrogram, batch.metadata, model.draw(batch, 0))
    assert seen.pop() == (CLIPS, 5, 48)
    assert out.regularisation.item() == pytest.approx(2 * CLIPS + CLIPS)
    found = model.eval()(spectrogram, batch.metadata).logits
    assert seen.pop() == (CLIPS, 2 + model.backbone.n_patches, 48)
    expected = plain.eval()(2 * spectrogram + 3, batch.metadata).logits
    torch.testing.assert_close(found, expected)
    assert not model.cacheable
