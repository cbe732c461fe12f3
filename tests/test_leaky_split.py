"""experiments.leaky_split: what its page says, from reports of made-up runs."""

from __future__ import annotations

import numpy as np
import pytest

from data.task import Task
from experiments import leaky_split as study
from tests.utils.evaluation_tables import cycle_table, predictions
from utils.config.schema import config_hash
from utils.evaluation.report import Baseline, Report, RunReport, evaluate_predictions
from utils.metrics.protocol import LEAKY_MARK
from utils.metrics.score import metrics_of


def evaluated(patients: slice, skill: float, seed: int = 0) -> Report:
    """Report of a model on some of 20 patients."""
    table = cycle_table(20)
    frame = predictions(Task(4), table[table["PID"].isin(range(101, 121)[patients])], seed, skill)
    report = evaluate_predictions(frame, Task(4), (0.5, 0.5), selection="fixed", bootstrap=20)
    report.baselines = {
        "class prior": Baseline(
            report.metrics, patients=report.patients, patient_tables=report.patient_tables
        )
    }
    return report


def run(split: str, patients: slice, skill: float, seed: int) -> RunReport:
    test = evaluated(patients, skill, seed)
    return RunReport("ast", "AST", 4, "fixed", seed, split_strategy=split, test=test)


def test_the_leaky_split_has_tables_of_its_own():
    reports = {
        "official": [run("official", slice(0, 12), 1.0, seed) for seed in (0, 1)],
        "recordings": [run("recordings", slice(8, 20), 2.0, seed) for seed in (0, 1)],
    }
    page = study.to_markdown(
        reports, {"official": "few heard", "recordings": "all heard"}, "# Page"
    )
    heads = [line for line in page.splitlines() if line.startswith("## ")]
    assert heads == [
        "## Split official (nothing selected)",
        f"## Split recordings (nothing selected; {LEAKY_MARK})",
        f"## Difference: split recordings ({LEAKY_MARK}) minus official",
    ]
    official, leaky, difference = (section.partition("\n")[2] for section in page.split("## ")[1:])
    assert LEAKY_MARK in leaky and LEAKY_MARK not in official
    scores = [
        np.mean([r.test.metrics["chosen"]["score"].value for r in found])
        for found in reports.values()
    ]
    for section, value in ((official, scores[0]), (leaky, scores[1])):
        assert "| baseline: class prior | 1 |" in section and f"| {value:.1f} ± " in section
    assert f"| {scores[1] - scores[0]:.1f} [" in difference


def test_patients_of_another_part_count_nothing():
    one = study.Tested.of([evaluated(slice(0, 3), 1.0)])
    spread = one.among([100, 101, 102, 103, 104])
    assert spread.shape == (1, 5, 4, 4) and not spread[:, [0, 4]].any()
    whole = [metrics_of(tables.sum(axis=1))["score"] for tables in (spread, one.tables)]
    assert whole[0] == pytest.approx(whole[1])


def test_runs_differ_in_the_split_alone():
    given = {"folder": "DIR", "variant": "ast_softfilm", "seed": 1, "words": ["training.epochs=2"]}
    official, leaky = (
        study.configure(split=split, **given) for split in ("official", "recordings")
    )
    assert config_hash(official) != config_hash(leaky)
    leaky.dataset.split_strategy = "official"
    assert config_hash(official) == config_hash(leaky)
    assert leaky.training.epochs == 2 and leaky.training.selection == "fixed"
