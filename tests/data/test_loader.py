"""The loader: every row once, weights that make a mean, batches that hold what the store holds."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader import PREFETCH, derived_seed, epoch_order, epoch_plan, read_ahead
from tests.utils.tiny import tiny_config, tiny_data


@pytest.fixture(scope="module")
def data():
    return tiny_data(tiny_config())


sizes = {
    "n": st.integers(1, 70),
    "batch_size": st.integers(1, 20),
    "accumulation": st.integers(1, 5),
    "world": st.integers(1, 5),
}


@given(**sizes)
@settings(max_examples=150, deadline=None)
def test_every_row_once_and_weights_make_the_mean(n, batch_size, accumulation, world):
    order = np.random.default_rng(n).permutation(1000)[:n]
    plans = [
        epoch_plan(
            order, batch_size=batch_size, accumulation_steps=accumulation, rank=rank, world=world
        )
        for rank in range(world)
    ]
    assert {len(plan) for plan in plans} == {-(-n // batch_size)}
    for number, steps in enumerate(zip(*plans, strict=True)):
        expected = order[number * batch_size : (number + 1) * batch_size]
        parts = [part for step in steps for part in step]
        assert {len(step) for step in steps} == {accumulation}  # all processes keep in step
        assert all(len(part.rows) for part in parts)
        counted = np.concatenate([part.rows for part in parts if part.weight] or [[]])
        assert sorted(counted) == sorted(expected)
        total = sum(part.weight * len(part.rows) for part in parts)
        assert total == pytest.approx(1.0)
        assert {part.weight for part in parts} <= {0.0, 1 / len(expected)}


@given(**sizes)
@settings(max_examples=30, deadline=None)
def test_no_two_micro_batches_share_a_seed(n, batch_size, accumulation, world):
    seeds = [
        part.seed
        for epoch in range(2)
        for rank in range(world)
        for step in epoch_plan(
            np.arange(n),
            batch_size=batch_size,
            accumulation_steps=accumulation,
            rank=rank,
            world=world,
            epoch=epoch,
        )
        for part in step
    ]
    assert len(set(seeds)) == len(seeds)


@given(**sizes, buckets=st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_micro_batches_hold_one_bucket_each(n, batch_size, accumulation, world, buckets):
    generator = np.random.default_rng(n)
    order, bucket = generator.permutation(n), generator.integers(0, buckets, n)
    options = {"batch_size": batch_size, "accumulation_steps": accumulation, "world": world}
    plans = [epoch_plan(order, bucket=bucket, rank=rank, **options) for rank in range(world)]
    assert {len(plan) for plan in plans} == {-(-n // batch_size)}  # as without buckets
    counted = []
    for steps in zip(*plans, strict=True):
        parts = [part for step in steps for part in step]
        assert all(len(set(bucket[part.rows])) == 1 for part in parts)
        assert sum(part.weight * len(part.rows) for part in parts) == pytest.approx(1.0)
        counted += [row for part in parts if part.weight for row in part.rows]
        assert {part.weight for part in parts} - {0.0} == {
            1 / sum(len(part.rows) for part in parts if part.weight)
        }
    assert sorted(counted) == list(range(n))
    if buckets == 1:
        alone = epoch_plan(order, **options)
        assert [p.rows.tolist() for s in alone for p in s] == [
            p.rows.tolist() for s in plans[0] for p in s
        ]


def test_few_steps_of_an_epoch_mix_buckets():
    generator = np.random.default_rng(0)
    bucket = generator.choice(3, 500, p=[0.48, 0.48, 0.04])
    plan = epoch_plan(generator.permutation(500), batch_size=16, bucket=bucket)
    mixed = [number for number, step in enumerate(plan) if len(step) > 1]
    assert mixed and min(mixed) >= len(plan) - 3
    found = [int(bucket[step[0].rows[0]]) for step in plan[:20]]
    assert len(set(found)) > 1, "all short cycles come first"


def test_the_plan_is_a_pure_function_of_its_arguments():
    order = np.arange(30)
    first, second = (epoch_plan(order, batch_size=8, epoch=3, seed=5) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert [(p.rows.tolist(), p.weight, p.seed) for p in a] == [
            (p.rows.tolist(), p.weight, p.seed) for p in b
        ]
    other = epoch_plan(order, batch_size=8, epoch=4, seed=5)
    assert first[0][0].seed != other[0][0].seed
    assert derived_seed(1, 2) != derived_seed(2, 1)


@given(n=st.integers(1, 60), epoch=st.integers(0, 5), seed=st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_shuffle_is_a_permutation_of_its_own_epoch(n, epoch, seed):
    rows = np.arange(100, 100 + n)
    arguments = {"epoch": epoch, "seed": seed, "sampler": "shuffle"}
    order = epoch_order(rows, np.zeros(n, np.int64), **arguments)
    assert sorted(order) == rows.tolist()
    assert np.array_equal(order, epoch_order(rows, np.zeros(n, np.int64), **arguments))


def test_epochs_and_seeds_differ_in_order():
    rows, classes = np.arange(50), np.zeros(50, np.int64)
    orders = {
        tuple(epoch_order(rows, classes, epoch=epoch, seed=seed, sampler="shuffle"))
        for epoch in range(3)
        for seed in range(3)
    }
    assert len(orders) == 9


def test_balanced_draws_all_classes_alike():
    classes = np.repeat([0, 1, 2, 3], [700, 200, 70, 30])
    rows = np.arange(5000, 6000)
    drawn = np.concatenate(
        [epoch_order(rows, classes, epoch=e, seed=0, sampler="balanced") for e in range(20)]
    )
    share = np.bincount(classes[drawn - 5000]) / len(drawn)
    assert len(drawn) == 20 * len(rows)
    assert np.abs(share - 0.25).max() < 0.02


def test_a_batch_holds_the_samples_of_the_store(data):
    rows = np.array([7, 0, 31, 12])
    batch = data.batch(rows)
    limit = data.clip_samples[-1]
    assert batch.waveform.shape == (4, min(limit, data.store.lengths[rows].max()))
    for i, row in enumerate(rows):
        expected = data.store[row][:limit]
        assert batch.length[i] == len(expected)
        assert np.array_equal(batch.waveform[i, : len(expected)].numpy(), expected)
        assert not batch.waveform[i, len(expected) :].any()
    assert batch.cycle.tolist() == rows.tolist()
    patients = data.table["PID"].to_numpy()
    assert np.array_equal(patients[rows], patients[::4][batch.patient])  # four cycles of each
    assert torch.equal(batch.metadata.rest, data.metadata.rest[rows])
    assert torch.equal(batch.metadata.site, data.metadata.site[rows])
    events = data.table[["Crackles", "Wheezes"]].to_numpy()[rows]
    assert np.array_equal(batch.label.numpy(), events)
    assert (data.store.lengths[rows] > limit).any(), "no clip was cut: choose other rows"


def test_without_waveforms_nothing_is_read(data):
    batch = data.batch(np.array([3, 4]), waveforms=False)
    assert batch.waveform.shape == (2, 0)
    assert (
        batch.length.tolist()
        == np.minimum(data.store.lengths[[3, 4]], data.clip_samples[-1]).tolist()
    )


def test_batches_come_in_order_and_only_just_ahead(data):
    asked = []

    def read(rows):
        asked.append((rows[0], threading.current_thread() is threading.main_thread()))
        return data.batch(rows)

    parts = [np.array([i, i + 1]) for i in range(0, 20, 2)]
    found = []
    for number, batch in enumerate(read_ahead(read, iter(parts))):
        assert len(asked) <= number + 1 + PREFETCH
        found.append(batch.cycle.tolist())
    assert found == [part.tolist() for part in parts]
    assert not any(main for _, main in asked)


def test_an_error_while_reading_reaches_the_loop(data):
    def read(rows):
        if rows[0] == 2:
            raise OSError("gone")
        return data.batch(rows)

    batches = read_ahead(read, [np.array([i]) for i in range(4)])
    assert [next(batches).cycle.item() for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(batches)


def test_classes_are_the_pairs_of_events(data):
    rows = np.arange(12)
    events = data.table[["Crackles", "Wheezes"]].to_numpy()[rows]
    assert data.classes(rows).tolist() == (events[:, 0] + 2 * events[:, 1]).tolist()
