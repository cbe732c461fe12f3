"""A grid whose cells and controllers are killed: nothing is lost, nothing is done twice."""

from __future__ import annotations

import pytest

from benchmarks.kill_grid import Place, kill_and_count, sound
from benchmarks.tracking_scale import measure
from tests.benchmarks.test_kill_resume import SHORT


@pytest.mark.slow
def test_a_killed_grid_ends_as_its_cells_alone(tmp_path):
    result = kill_and_count(Place(tmp_path, 1, *SHORT), kills=2, workers=2, seed=1)
    assert sound(result), result
    assert result["cells"] == 3 and result["kills"] >= 1
    for name in ("two owners at once", "finished cells started again"):
        assert not sound(result | {name: 1})
    for name in ("finished", "bit-equal to a run alone", "MLflow children"):
        assert not sound(result | {name: 2})


@pytest.mark.slow
def test_no_tracked_run_is_lost(tmp_path):
    found = measure(tmp_path, runs=4, processes=2)
    assert found["children found"] == found["FINISHED"] == found["with their file"] == 4
    assert found["values of epochs, found"] == found["values of epochs, expected"] == 200
    assert found["parents found"] == 1 and found["found twice"] == 0
