"""A sample of the corruption matrix: a damaged file is rebuilt or refused, never believed."""

from __future__ import annotations

import pytest

from benchmarks.corruption import FILES, WAYS, Cell, Matrix, cells

REFUSED = [
    ("start", "cache/waveforms-*/samples.f32", "zeroed block"),
    ("resume", "runs/*/checkpoints/last.pt", "bit flipped"),
    ("resume", "corpus/1*.wav", "other run's"),
    ("end", "runs/*/report.json", "bit flipped"),
    ("end", "runs/*/checkpoints/best.pt", "other run's"),
    ("end", "runs/*/predictions/test.csv", "truncated"),
]
IDENTICAL = [
    ("resume", "runs/*/checkpoints/last.pt", "deleted"),
    ("resume", "runs/*/metrics.csv", "other type"),
    ("end", "runs/*/tracking.json", "empty"),
]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    return Matrix(tmp_path_factory.mktemp("matrix"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "expected, moment, pattern, way",
    [("refused", *cell) for cell in REFUSED] + [("identical", *cell) for cell in IDENTICAL],
)
def test_a_damaged_file_is_never_believed(matrix, expected, moment, pattern, way):
    outcome, text = matrix.outcome(Cell("plain", moment, pattern, way))
    assert outcome == expected, text


def test_every_way_changes_a_file():
    old = bytes(range(256)) * 8
    new = {name: way(old, b"other") for name, way in WAYS.items()}
    assert len(set(new.values())) == len(WAYS) and old not in new.values()
    assert len(list(cells())) == len(WAYS) * sum(map(len, FILES.values()))
