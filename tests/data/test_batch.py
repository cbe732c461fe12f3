"""Batches as one object: moved, indexed, flattened."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils import _pytree

from data.batch import Batch, Metadata


def batch(features: torch.Tensor | None = None) -> Batch:
    metadata = Metadata(
        device=torch.tensor([0, 3, 4]),
        site=torch.tensor([1, 6, 7]),
        rest=torch.randn(3, 3, generator=torch.Generator().manual_seed(0)),
        known=torch.tensor([[True] * 5, [True] * 5, [False] * 5]),
    )
    return Batch(
        waveform=torch.arange(12.0).view(3, 4),
        length=torch.tensor([4, 3, 2]),
        metadata=metadata,
        label=torch.eye(3, 2),
        cycle=torch.tensor([7, 8, 9]),
        patient=torch.tensor([0, 0, 1]),
        features=features,
    )


@pytest.mark.parametrize("features", [None, torch.ones(3, 2, 5)])
def test_indexing_and_moving_take_every_field(features):
    part = batch(features)[1:].to("cpu")
    assert len(part) == len(part.metadata) == 2
    assert part.patient.tolist() == [0, 1]
    assert part.metadata.site.tolist() == [6, 7]
    assert part.features is None if features is None else part.features.shape == (2, 2, 5)


@pytest.mark.parametrize("features", [None, torch.ones(3, 2, 5)])
def test_a_batch_is_a_pytree(features):
    whole = batch(features)
    leaves, spec = _pytree.tree_flatten(whole)
    assert len(leaves) == 9 + (features is not None)
    back = _pytree.tree_unflatten(leaves, spec)
    assert torch.equal(back.metadata.rest, whole.metadata.rest)
    assert (back.features is None) == (features is None)
    doubled = _pytree.tree_map(lambda tensor: 2 * tensor, replace(whole, features=None))
    assert doubled.length.tolist() == [8, 6, 4]
