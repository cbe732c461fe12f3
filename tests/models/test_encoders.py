"""Missing metadata, metadata dropout, and the switch that leaves fields out."""

from __future__ import annotations

import itertools

import pytest
import torch

from data.batch import Metadata
from data.corpora.icbhi import DEVICES, SITES
from data.task import FIELDS
from models.config import ConditionedConfig
from models.encoders import MetadataEmbeddings
from utils.common.errors import UserError

UNKNOWN_DEVICE, UNKNOWN_SITE = len(DEVICES), len(SITES)

CONDITIONED = ("ast_grf", "ast_film", "ast_tafilm", "ast_softfilm")
COUNTS = {"device_counts": [10, 2, 0, 4, 0], "site_counts": [1, 1, 1, 1, 1, 1, 2, 0]}


def test_unknown_and_unseen_rows_become_the_frequency_weighted_mean():
    embeddings = MetadataEmbeddings(ConditionedConfig(), **COUNTS)
    device = embeddings.device.weight.detach().clone()
    site = embeddings.site.weight.detach().clone()
    embeddings.finalise()
    mean = (10 * device[0] + 2 * device[1] + 4 * device[3]) / 16
    assert torch.allclose(embeddings.device.weight[UNKNOWN_DEVICE], mean)
    assert torch.allclose(embeddings.device.weight[2], mean)  # no training cycle has it
    assert torch.equal(embeddings.device.weight[[0, 1, 3]], device[[0, 1, 3]])
    mean = (site[:6].sum(0) + 2 * site[6]) / 8
    assert torch.allclose(embeddings.site.weight[UNKNOWN_SITE], mean)
    assert torch.equal(embeddings.site.weight[:7], site[:7])
    again = embeddings.device.weight.detach().clone()
    embeddings.finalise()
    assert torch.equal(embeddings.device.weight, again)


def test_an_unknown_row_that_was_trained_stays():
    counts = {**COUNTS, "device_counts": [10, 2, 0, 4, 3]}  # missing in 3 training cycles
    for dropout, arguments in ((0.0, counts), (0.1, COUNTS)):
        embeddings = MetadataEmbeddings(ConditionedConfig(metadata_dropout=dropout), **arguments)
        before = embeddings.device.weight.detach().clone()
        embeddings.finalise()
        assert torch.equal(embeddings.device.weight[[0, 1, 3, 4]], before[[0, 1, 3, 4]])
        assert not torch.equal(embeddings.device.weight[2], before[2])


@pytest.mark.parametrize("variant", CONDITIONED)
def test_any_combination_of_missing_fields_is_answered(
    variant, make_model, make_metadata, make_spectrogram
):
    """The value where known is False must not matter, and the answer equals that for a cycle
    which has the unknown index or z = 0 there."""
    model = make_model(variant).eval()
    with torch.no_grad():
        for parameter in model.conditioner.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.conditioner.finalise()
    table = model.conditioner.embeddings.device.weight
    assert torch.allclose(table[UNKNOWN_DEVICE], table[:UNKNOWN_DEVICE].mean(dim=0), atol=1e-6)
    metadata, x = make_metadata(4), make_spectrogram(4)
    with torch.no_grad():
        complete = model(x, metadata).logits
        for r in range(1, len(FIELDS) + 1):
            for names in itertools.combinations(FIELDS, r):
                clean = metadata.without(*names)
                dirty = Metadata(metadata.device, metadata.site, metadata.rest, clean.known)
                logits = model(x, clean).logits
                assert torch.isfinite(logits).all()
                assert torch.equal(logits, model(x, dirty).logits)
                assert not torch.allclose(logits, complete, atol=1e-6), names


@pytest.mark.parametrize("field", FIELDS)
def test_metadata_dropout_hides_each_field_at_its_rate(field):
    embeddings = MetadataEmbeddings(ConditionedConfig(metadata_dropout=0.25), **COUNTS)
    n, column = 4000, FIELDS.index(field)
    metadata = Metadata(
        torch.zeros(n, dtype=torch.long),
        torch.zeros(n, dtype=torch.long),
        torch.ones(n, 3),
        torch.ones(n, 5, dtype=torch.bool),
    )

    def hidden():
        out = embeddings(metadata)
        if field in ("device", "site"):
            unknown = getattr(embeddings, field).weight[-1]
            return (out[field] == unknown).all(dim=1)
        return out["rest"][:, column - 2] == 0

    embeddings.train()
    rate = hidden().float().mean()
    assert 0.2 < rate < 0.3
    assert not torch.equal(hidden(), hidden())
    embeddings.eval()
    assert not hidden().any()


def test_metadata_dropout_trains_the_unknown_rows(make_model, make_metadata):
    film = make_model("ast_film", {"metadata_dropout": 0.5}).conditioner.train()
    torch.nn.init.normal_(film.generators.weight)
    sum(m.scale.square().sum() for m in film.encode(make_metadata(16)).modulation).backward()
    assert film.embeddings.device.weight.grad[UNKNOWN_DEVICE].abs().sum() > 0
    assert film.embeddings.site.weight.grad[UNKNOWN_SITE].abs().sum() > 0


@pytest.mark.parametrize("variant", CONDITIONED)
@pytest.mark.parametrize("fields", [["device"], ["bmi", "age"], ["duration", "site"], FIELDS])
def test_only_enabled_fields_matter(variant, fields, make_model, make_metadata, make_spectrogram):
    model = make_model(variant, {"metadata_fields": list(fields)}).eval()
    with torch.no_grad():
        for parameter in model.conditioner.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    metadata, x = make_metadata(4), make_spectrogram(4)
    with torch.no_grad():
        logits = model(x, metadata).logits
        for name in FIELDS:
            same = torch.allclose(model(x, metadata.without(name)).logits, logits, atol=1e-7)
            assert same == (name not in fields), name


def test_wrong_settings_are_refused_by_key(make_model):
    for fields in (["device", "weight"], []):
        with pytest.raises(UserError, match=r"metadata_fields.*name at least one"):
            make_model("ast_grf", {"metadata_fields": fields})
    with pytest.raises(UserError, match="metadata_dropout"):
        make_model("ast_grf", {"metadata_dropout": 1.0})
    with pytest.raises(ValueError, match="device_counts"):
        MetadataEmbeddings(ConditionedConfig(), [0, 0, 0], [1, 1])


def test_probe_is_every_seen_device_with_every_seen_site_at_the_mean(make_model):
    probe = make_model("ast_film", **COUNTS).conditioner.probe()
    pairs = list(zip(probe.device.tolist(), probe.site.tolist(), strict=True))
    assert pairs == list(itertools.product((0, 1, 3), range(7)))
    assert (probe.rest == 0).all() and probe.known.all()
