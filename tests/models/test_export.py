"""torch.export takes the conditioners: metadata are a pytree, and no branch looks at a value."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("variant", ["ast_grf", "ast_tafilm", "ast_softfilm"])
def test_an_exported_model_is_the_model(variant, make_model, make_spectrogram, make_metadata):
    model = make_model(variant).eval()
    program = torch.export.export(model, (make_spectrogram(3), make_metadata(3)))
    other = make_spectrogram(3, seed=1), make_metadata(3, seed=1).without("age")
    with torch.no_grad():
        expected = model(*other).logits
    assert torch.allclose(program.module()(*other).logits, expected, atol=1e-5)
