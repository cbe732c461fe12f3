"""Bins of the metadata fields, and weights that make classes independent of them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest

from data.fields import balancing_weights, binned, field_values


def test_bins_are_the_documented_ones():
    def names(field, *values):
        return binned(pd.Series(values, dtype=float), field).tolist()

    nan = float("nan")
    assert names("age", 17.99, 18, 64, 65, 93, nan) == [
        *["< 18", "18-64", "18-64", ">= 65", ">= 65", "unknown"]
    ]
    assert names("bmi", 18.4, 18.5, 25, 30, nan) == [
        *["< 18.5", "18.5-25", "25-30", ">= 30", "unknown"]
    ]
    assert names("duration", 1.49, 1.5, 2.5, 3.5) == ["< 1.5", "1.5-2.5", "2.5-3.5", ">= 3.5"]
    table = pd.DataFrame({"Device": ["a", None], "Age": [5.0, nan]})
    assert field_values(table, ["device", "age"]).tolist() == ["a, < 18", "unknown, unknown"]


def test_weights_are_the_formula_where_no_bound_is_met():
    rng = np.random.default_rng(0)
    values = np.array(list("aabbc"))[rng.integers(0, 5, 400)].astype(object)
    classes = (rng.random(400) < np.where(values == "a", 0.7, 0.3)).astype(int)
    weight = balancing_weights(values, classes, [0.01, 100])
    n, pairs = Counter(classes.tolist()), Counter(zip(values, classes.tolist(), strict=True))
    of = Counter(values)
    expected = [n[y] / 400 / (pairs[v, y] / of[v]) for v, y in zip(values, classes, strict=True)]
    np.testing.assert_allclose(weight, expected, rtol=1e-9)
    for value in "abc":  # under the weights the share of a class is the same in every group
        inside = values == value
        share = weight[inside & (classes == 1)].sum() / weight[inside].sum()
        assert share == pytest.approx(classes.mean())


def test_bounded_weights_have_mean_one():
    values = np.array(["a"] * 95 + ["b"] * 5, object)
    classes = np.array([0] * 90 + [1] * 5 + [0] + [1] * 4)
    for bounds in ([0.5, 2.0], [1.0, 1.0], [0.9, 30.0]):
        weight = balancing_weights(values, classes, bounds)
        assert weight.min() >= bounds[0] and weight.max() <= bounds[1]
        assert weight.mean() == pytest.approx(1, abs=1e-9)
    free = balancing_weights(values, classes, [1e-6, 1e6])
    assert free[-1] < 1 < free[-5]  # abnormal is common in b, and normal rare
