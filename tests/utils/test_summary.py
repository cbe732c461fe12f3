"""The end of a run: report with baselines, figures, model card; and what is printed."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from tests.utils.tiny import tiny_config, tiny_trainer
from utils.evaluation.baselines import baseline_reports
from utils.metrics.bootstrap import Interval
from utils.metrics.predictions import make_predictions
from utils.runs.end import figure_row, print_end, write_run_report
from utils.tracking import Tracker
from utils.training.assemble import describe_run
from utils.training.checkpoint import save_checkpoint
from utils.training.runfolder import RunFolder

FIGURES = {"confusion", "operating_curve", "reliability", "subgroups", "learning_curves"}


class Recorder(Tracker):
    def __init__(self):
        self.values = {}

    def metrics(self, values, step=None):
        self.values |= values


def finish(tmp_path, variant="ast_softfilm", **overrides):
    """Train a tiny model and write its report as a run does."""
    config = tiny_config(variant, **{"training.epochs": 1, **overrides})
    trainer = tiny_trainer(config, tmp_path)
    trainer.fit()
    data = trainer.data
    checkpoint = trainer.checkpoint(describe_run(config, data))
    save_checkpoint(RunFolder(tmp_path).best, checkpoint)
    frames = {
        part: make_predictions(
            data.task, data.table, rows, trainer.predict(rows), checkpoint.thresholds
        )
        for part, rows in (("val", data.split.val), ("test", data.split.test))
        if len(rows)
    }
    folder, tracker = RunFolder(tmp_path), Recorder()
    folder.write_metrics(trainer.progress.history)
    report = write_run_report(folder, checkpoint, data, frames, tracker, trainer.controls())
    return config, folder, checkpoint, data, report, tracker


def test_everything_is_there(tmp_path):
    _, folder, _, _, report, tracker = finish(tmp_path)
    assert {p.stem for p in folder.figures.glob("*.png")} == FIGURES | {"mask_analysis"}
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for part in (
        "Metadata-only baselines",
        "Subgroups",
        "Calibration",
        "Confusion",
        "Masks",
        "PARTIAL DATA",
    ):
        assert part in text
    controls = report.controls
    assert controls["masks/overlap_initial_same_temperature"] == pytest.approx(0.0747, abs=2e-4)
    assert 0 < controls["masks/overlap_regularisers_only"] < 0.0747
    assert controls.items() <= tracker.values.items()
    card = (tmp_path / "model_card.md").read_text(encoding="utf-8")
    assert "For research only" in card and "PARTIAL DATA" in card
    score = report.test.metrics["chosen"]["score"].value
    assert tracker.values["test/score"] == score
    written = json.loads(folder.report.read_text(encoding="utf-8"))
    assert written == report.to_dict()


@pytest.mark.parametrize("selection", ["validation", "fixed", "test"])
def test_the_floors_follow_the_runs_rule(selection, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.runs.end.draw_figures", lambda *_: None)
    sensitive = {"training.min_sensitivity": 0.7} if selection != "fixed" else {}
    rule = {"training.selection": selection, **sensitive}
    _, _, checkpoint, data, report, tracker = finish(tmp_path, "ast", **rule)
    expected = baseline_reports(
        data.task, data.table, data.split,
        selection=selection, pos_weight=checkpoint.pos_weight,
        min_sensitivity=sensitive.get("training.min_sensitivity", 0.0),
    )  # fmt: skip
    assert (
        report.test.to_dict()["floors"]
        == replace(report.test, baselines=expected).to_dict()["floors"]
    )
    assert report.test.protocol["selection"] == selection
    chosen = expected["class prior"].thresholds["chosen"]
    assert (chosen == (0.5, 0.5)) == (selection == "fixed")
    # figures chosen on test stand in no column of the tracker that honest ones have
    groups = {name.split("/")[0] for name in tracker.values}
    honest, chosen_there = {"test", "test_default"}, {"test_selected_on_test"}
    chosen_there |= {"test_default_selected_on_test"}
    assert groups == (chosen_there if selection == "test" else honest)


def test_only_softfilm_draws_masks(tmp_path):
    _, folder, _, _, report, _ = finish(tmp_path, "ast_tafilm")
    assert {p.stem for p in folder.figures.glob("*.png")} == FIGURES
    assert report.controls == {} and "Masks" not in (tmp_path / "report.md").read_text()


def test_a_figure_that_fails_costs_the_run_nothing_else(tmp_path, monkeypatch, caplog):
    def broken(*_):
        raise ValueError("no such font")

    monkeypatch.setattr("utils.figures.evaluation.subgroup_figure", broken)
    _, folder, *_ = finish(tmp_path, "ast")
    assert {p.stem for p in folder.figures.glob("*.png")} == FIGURES - {"subgroups"}
    assert folder.finished and "no such font" in caplog.text


def test_report_json_comes_last(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("utils.runs.end.draw_figures", killed)
    with pytest.raises(KeyboardInterrupt):
        finish(tmp_path, "ast")
    assert not RunFolder(tmp_path).finished


def test_the_end_fits_the_terminal_and_names_the_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("utils.runs.end.draw_figures", lambda *_: None)
    config, folder, *_ = finish(tmp_path)
    print_end(folder, config)
    printed = capsys.readouterr().out
    assert "checkpoints/softfilm_best.pt" in printed and "PARTIAL DATA" in printed
    assert max(len(line) for line in printed.splitlines() if str(tmp_path) not in line) <= 100
    print_end(folder, config, published=False)
    assert f"checkpoint   {folder.best}" in capsys.readouterr().out


def test_an_undefined_figure_is_a_dash():
    nothing = Interval(math.nan, math.nan, math.nan)
    row = figure_row("x", {"sp": Interval(50.0, 40.0, 60.0), "se": nothing, "score": nothing})
    assert row.split() == ["x", "50.00", "–", "–", "[–,", "–]"]
