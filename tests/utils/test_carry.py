"""What the metadata carry: information, baselines on each part, Scores by device."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from data.batch import Metadata
from data.splits import Split
from data.statistics import MetadataStatistics
from data.task import Task
from tests.utils.evaluation_tables import cycle_table, predictions
from utils.evaluation.baselines import baseline_reports
from utils.evaluation.carry import carried, information, mutual_information
from utils.evaluation.metadata_test import metadata_test
from utils.evaluation.render import to_markdown
from utils.evaluation.report import Report, evaluate_predictions
from utils.metrics.score import sp_se_score


def test_information_is_scikit_learns_in_bits():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 4, 300)
    y = (x + rng.integers(0, 2, 300)) % 3
    assert mutual_information(x, y) == pytest.approx(mutual_info_score(x, y) / np.log(2))


def test_chance_is_that_of_patients():
    """A device that is drawn per patient seems to say much about labels that patients share."""
    table = cycle_table(patients=24, recordings=2, cycles=5)
    rng = np.random.default_rng(1)
    classes = rng.integers(0, 2, 24)[table["PID"] - 101]  # one per patient, whatever the device
    table["Device"] = np.array(["a", "b", "c", "d"])[rng.integers(0, 4, 24)[table["PID"] - 101]]
    found = information(table, classes, "device")
    assert found["expected"] > 0.05 and found["p"] > 0.05
    assert found["excess"] == pytest.approx(found["bits"] - found["expected"])
    told = information(table.assign(Device=np.where(classes > 0, "a", "b")), classes, "device")
    assert told["bits"] == pytest.approx(mutual_info_score(classes, classes) / np.log(2))
    assert told["p"] == pytest.approx(1 / 201)


@pytest.fixture(scope="module")
def parts():
    table = cycle_table(patients=12, recordings=2, cycles=4)
    rows = np.arange(len(table)).reshape(3, -1)
    return table, Split(rows[0], rows[1], rows[2])


RULES = {"selection": "validation", "pos_weight": None, "thresholds": "chosen"}
RULES |= {"min_sensitivity": 0.0}


def test_baselines_of_the_test_part_are_the_reports(parts):
    found = carried(Task(4), *parts, **RULES, bootstrap=50)
    reports = baseline_reports(Task(4), *parts, bootstrap=50, **RULES)
    scores = {(row["baseline"], row["part"]): row["score"]["value"] for row in found["baselines"]}
    assert len(scores) == 6
    for name in ("metadata only, linear", "metadata only, trees"):
        expected = reports[name].metrics["chosen"]["score"].value
        assert scores[name, "test"] == pytest.approx(expected)
    assert {(r["field"], r["part"]) for r in found["information"]} >= {("age", "val")}


def test_report_says_it_after_a_round_trip(parts):
    table, split = parts
    task, cycles = Task(4), table.iloc[split.test]
    statistics = MetadataStatistics.fit(table)

    def predict(metadata: list[Metadata]):
        """Crackle where the device index is even, whatever the sound."""
        for one in metadata:
            p = (one.device % 2 == 0).double().numpy()
            yield np.stack([p, 0 * p], axis=1)

    rows = metadata_test(predict, cycles, statistics.transform, task, (0.5, 0.5), bootstrap=50)
    devices = {row["metadata"]: row.get("devices") for row in rows}
    assert devices["device unknown"] is None
    crackle, wheeze = (cycles[name].to_numpy() for name in ("Crackles", "Wheezes"))
    for device, found in devices["real"].items():
        inside = (cycles["Device"] == device).to_numpy()
        pred = np.full(inside.sum(), int(sorted(set(table["Device"])).index(device) % 2 == 0))
        true = (crackle + 2 * wheeze)[inside]
        assert found["score"] == pytest.approx(sp_se_score(true, pred).score, nan_ok=True)
    frame = predictions(task, table)
    report = evaluate_predictions(frame, task, (0.5, 0.5), selection="validation", bootstrap=50)
    report.metadata_test, report.metadata_carry = rows, carried(task, *parts, **RULES, bootstrap=50)
    text = to_markdown(Report.from_dict(report.to_dict()))
    assert "**What the metadata carry: information about the label in each part" in text
    assert "| device | train | 32 |" in text and "| duration | test | 32 |" in text
    assert "| device | patients | cycles | real | shuffled | all unknown |" in text
