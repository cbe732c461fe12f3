"""Frequency band selection (a reconstruction): which bands, patches and positions are left."""

from __future__ import annotations

import pytest
import torch

from data.batch import Batch
from models.ast import AST
from models.config import BackboneConfig
from models.method import Methods
from models.methods.patchmix_cl import PatchMix, PatchMixConfig
from tests.utils.tiny import tiny_config
from utils.common.errors import UserError
from utils.config.schema import config_hash


@pytest.mark.parametrize(("stop", "rows"), [(128, 12), (76, 7), (67, 6), (64, 5)])
def test_grids_of_kept_bands(stop, rows):
    """67 of 128 bands are exactly half of the patches of an 8 s clip."""
    ast = AST(BackboneConfig(embed_dim=8, depth=0, num_heads=1), n_mels=128, n_frames=798)
    before = ast.pos_embed.detach().clone()
    ast.keep_bands(0, stop)
    assert ast.grid == (rows, 79) and ast.n_patches == rows * 79
    assert torch.equal(ast.pos_embed, before[:, : 2 + rows * 79])
    assert ast.patches(torch.zeros(1, 1, 128, 798)).shape == (1, rows * 79, 8)


def test_all_bands_are_the_model_without(make_model, make_metadata, make_spectrogram):
    plain, kept = (make_model("ast_film", keep_bands=k).eval() for k in (None, [0, 32]))
    arguments = make_spectrogram(3), make_metadata(3)
    assert torch.equal(plain(*arguments).logits, kept(*arguments).logits)


def test_tokens_are_those_of_the_whole(make_model, make_spectrogram):
    """Bands 20 to 47 of 48: rows 2 and 3 of the 4 rows of patches, with their own positions."""
    plain, kept = (
        make_model("ast", n_mels=48, keep_bands=k).backbone.eval() for k in (None, [20, 48])
    )
    spectrogram = make_spectrogram(2, 48)
    whole = plain.embed(spectrogram)
    rows = whole[:, 2:].unflatten(1, plain.grid)[:, 2:4].flatten(1, 2)
    torch.testing.assert_close(kept.embed(spectrogram), torch.cat([whole[:, :2], rows], dim=1))
    changed = spectrogram.clone()
    changed[:, :, :20] = 5.0
    assert torch.equal(kept(changed), kept(spectrogram))


def test_methods_see_the_kept_patches(make_model, make_metadata, make_spectrogram):
    model = make_model("ast", {"dropout": 0.0}, keep_bands=[10, 32]).train()
    model.methods = Methods([PatchMix(PatchMixConfig(), 48)])
    metadata, rows = make_metadata(4), torch.arange(4)
    batch = Batch(torch.zeros(4, 0), rows, metadata, torch.zeros(4, 2), rows, rows)
    step = model.draw(batch, 0)
    assert step.plans[0]["taken"].shape == (5,)
    spectrogram = make_spectrogram(4)
    torch.testing.assert_close(
        model(spectrogram, metadata, step).logits, model(spectrogram, metadata).logits
    )
    with pytest.raises(ValueError, match="expected"):
        model.backbone.patches(make_spectrogram(2, 22))


def test_bands_that_cannot_be_kept_are_refused():
    config = tiny_config("ast", **{"audio.keep_bands": [0, 20]})
    assert config.title == "AST + frequency band selection (reconstruction)"
    assert config_hash(config) != config_hash(tiny_config("ast"))
    for bands, match in (
        ([4, 32], "multiple of backbone.freq_stride=16"),
        ([0, 40], "dataset.h=32"),
        ([16, 24], "at least one patch"),
        ([0], r"\[low, high\]"),
    ):
        with pytest.raises(UserError, match=match):
            tiny_config("ast", **{"audio.keep_bands": bands})
