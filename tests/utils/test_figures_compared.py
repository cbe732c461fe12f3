"""Figures of several runs: what is drawn is what an independent calculation gives."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from data.task import Task
from tests.utils.evaluation_tables import cycle_table, finish_run
from tests.utils.tiny import tiny_config
from utils.common.errors import UserError
from utils.evaluation.finished_runs import group_runs, read_runs
from utils.evaluation.report import evaluate_predictions
from utils.figures import commands, compared
from utils.figures.commands import Options
from utils.figures.runs import permutation, read_evaluation
from utils.figures.style import Notice, Output, new_figure
from utils.metrics.bootstrap import Difference
from utils.metrics.predictions import make_predictions


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs of AST (two seeds) and FiLM (two seeds, and one with one conditioned layer)."""
    folder = tmp_path_factory.mktemp("runs")
    where = {"training.output_dir": str(folder), "dataset.data_folder": "none"}
    runs = []
    for number, (variant, seed, more) in enumerate(
        [
            ("ast", 0, {}), ("ast", 1, {}), ("ast_film", 0, {}), ("ast_film", 1, {}),
            ("ast_film", 0, {"training.lr": 0.5}),
        ]
    ):  # fmt: skip
        config = tiny_config(variant, **where, **{"training.seed": seed}, **more)
        runs.append(finish_run(config, cycle_table(), seed=number).path)
    return runs


def groups_of(runs):
    ((_, groups),) = group_runs(read_runs(runs))
    return groups


def scores(path) -> float:
    frame = pd.read_csv(path / "predictions" / "test.csv")
    normal = frame.true_class == "normal"
    right = frame.true_class == frame.pred_class
    return 50 * (right[normal].mean() + right[~normal].mean())


def test_rows_are_means_over_seeds_and_their_differences(finished):
    ast, film, other = compared.forest_rows(groups_of(finished))
    assert (ast.label, film.label) == ("AST", film.label) and ast.difference is None
    assert film.label.startswith("FiLM-AST, lr=") and other.label == "FiLM-AST, lr=0.5"
    single = [scores(path) for path in finished]
    assert list(ast.runs) == pytest.approx(single[:2])
    assert ast.score.value == pytest.approx(np.mean(single[:2]))
    assert film.difference.value == pytest.approx(np.mean(single[2:4]) - np.mean(single[:2]))
    assert other.difference.value == pytest.approx(single[4] - np.mean(single[:2]))
    assert ast.score.low <= ast.score.value <= ast.score.high


def test_shared_seeds_are_resampled_too(finished):
    film = compared.forest_rows(groups_of(finished))[1].difference
    first, second = groups_of(finished)[:2]
    fixed = compared.paired_bootstrap(first.tables, second.tables)["score"]
    assert (film.low, film.high) != (fixed.low, fixed.high)


def test_other_test_patients_are_not_paired(finished, tmp_path):
    where = {"training.output_dir": str(tmp_path), "dataset.data_folder": "none"}
    fewer = finish_run(tiny_config("ast_tafilm", **where), cycle_table(patients=11)).path
    groups = [
        group for _, inside in group_runs(read_runs([finished[0], fewer])) for group in inside
    ]
    with pytest.raises(UserError, match="tested on different cycles"):
        compared.forest_rows(groups)


def test_compare_keeps_the_order_that_is_given(finished, tmp_path):
    options = Options(Output(tmp_path, ("svg",)), compared=[finished[2], finished[3], finished[0]])
    (path,) = commands.compare(options)
    assert path.name == "comparison.svg"
    text = path.read_text()
    assert text.index("FiLM-AST") < text.index(" AST ") and "minus that of FiLM-AST" in text


def test_an_ablation_has_a_value_for_each_key(finished, tmp_path):
    key, series = compared.ablation_series(groups_of(finished))
    assert key == "lr" and list(series) == ["AST", "FiLM-AST"]
    assert series["FiLM-AST"]["0.5"].value == pytest.approx(scores(finished[4]))
    axis = compared.ablation_figure(key, series).axes[0]
    assert [text.get_text() for text in axis.get_xticklabels()] == sorted(
        {value for points in series.values() for value in points}, key=float
    )
    grid = tmp_path / "ablation-x"
    grid.mkdir()
    cells = [{"run": path.name} for path in finished] + [{"run": "unfinished"}]
    (grid / "grid.json").write_text(json.dumps({"cells": cells}))
    for path in finished:
        (tmp_path / path.name).symlink_to(path)
    out = Output(tmp_path / "o", ("png",), "file")
    names = [path.name for path in commands.ablation(Options(out, grid=str(grid)))]
    assert names == ["ablation.png", "ablation.txt"]


def test_without_a_varied_key_there_is_no_ablation(finished):
    with pytest.raises(UserError, match="varies no key"):
        compared.ablation_series(groups_of(finished[:4]))
    with pytest.raises(UserError, match=r"grid\.json is missing"):
        commands.ablation(Options(grid="none"))


def test_permutation_shows_what_evaluate_measured(finished, tmp_path):
    one = read_evaluation(finished[2])
    with pytest.raises(UserError, match=r"run python evaluate\.py --checkpoint"):
        permutation(one, Output(tmp_path))
    rows = [{"metadata": "real", "sp": 80.0, "se": 60.0, "score": 70.0}]
    rows[0]["difference"] = Difference(0.0, 0.0, 0.0, 1.0)
    rows += [rows[0] | {"metadata": "shuffled", "difference": Difference(-5.0, -9.0, -1.0, 0.01)}]
    task, table = Task(4), cycle_table()
    logits = np.random.default_rng(0).normal(size=(len(table), 2))
    frame = make_predictions(task, table, np.arange(len(table)), logits, (0.5, 0.5))
    given = {"selection": "fixed", "partial_message": "", "bootstrap": 20}
    report = evaluate_predictions(frame, task, (0.5, 0.5), **given)
    report.metadata_test, report.origin = rows, one.origin
    inside = finished[2] / "evaluation" / "test"
    inside.mkdir(parents=True)
    (inside / "report.json").write_text(json.dumps(report.to_dict()))
    (path,) = permutation(one, Output(tmp_path, ("svg",)))
    assert "−5.0 [−9.0, −1.0]" in path.read_text()


@pytest.mark.parametrize(("where", "suffixes"), [("off", [".svg"]), ("file", [".svg", ".txt"])])
def test_marks_stay_without_a_caption(tmp_path, where, suffixes):
    notice = Notice("test", "READY-MADE SPECTROGRAMS: 8 cycles", synthetic=True, leaky=True)
    figure = new_figure(3, 2)
    figure.subplots()
    paths = Output(tmp_path, ("svg",), where).write(figure, "x", "What it shows.", notice)
    assert [path.suffix for path in paths] == suffixes
    text = paths[0].read_text()
    for mark in ("SYNTHETIC", "LEAKY SPLIT", "READY-MADE SPECTROGRAMS", "SELECTED ON TEST"):
        assert mark in text
    assert "What it shows." not in text
    if where == "file":
        assert paths[1].read_text().startswith("What it shows.\nSYNTHETIC recordings")
