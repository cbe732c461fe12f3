"""Seeds and folds: which runs there are, and what they say together, computed by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest

from tests.utils.evaluation_tables import cycle_table, finish_run
from tests.utils.tiny import tiny_config
from utils.common.errors import UserError
from utils.evaluation.finished_runs import group_runs, read_runs
from utils.evaluation.result_tables import build_tables
from utils.metrics.bootstrap import patient_bootstrap, patient_tables
from utils.metrics.predictions import read_predictions
from utils.runs.cells import seeds_from
from utils.runs.group import Group, expand
from utils.runs.start import parse_arguments
from utils.training.runfolder import RunFolder

FOLDWISE = {"dataset.split_strategy": "foldwise", "training.selection": "fixed"}


def parsed(*words: str):
    options = parse_arguments("", ["--config", "x.yaml", *words])
    return options.seeds, options.folds


# -------------------------------------------------------------------- which runs


def test_one_number_is_a_count_several_are_seeds():
    assert seeds_from([3]) == [0, 1, 2]
    assert seeds_from([3, 7, 3]) == [3, 7]
    for words in ([0], [], [2, -1]):
        with pytest.raises(UserError, match="--seeds"):
            seeds_from(words)


def test_seeds_and_folds_multiply():
    config = tiny_config(**FOLDWISE, **{"training.seed": 4})
    members = expand(config, *parsed("--seeds", "2", "--folds", "all"))
    assert [(m.training.seed, m.dataset.test_fold) for m in members] == [
        (seed, fold) for seed in (0, 1) for fold in range(5)
    ]
    assert len({RunFolder.of(m).path for m in members}) == 10
    (only,) = expand(config, *parsed())
    assert only == config and only is not config
    assert [m.dataset.test_fold for m in expand(config, *parsed("--folds", "3", "1"))] == [3, 1]


@pytest.mark.parametrize("folds", [["5"], ["x"], ["all", "1"]])
def test_folds_that_are_not_there_are_refused(folds):
    with pytest.raises(UserError, match="give all, or numbers"):
        expand(tiny_config(**FOLDWISE), None, folds)


def test_folds_need_the_foldwise_split():
    with pytest.raises(UserError, match="split_strategy=foldwise, not 'official'"):
        expand(tiny_config(), None, ["all"])


# -------------------------------------------------------------------- what they say together


def finish_runs(configs, parts) -> None:
    for number, (config, table) in enumerate(zip(configs, parts, strict=True)):
        finish_run(config, table, seed=number)


@pytest.mark.parametrize("n_cls", [4, 2])
def test_over_seeds_mean_sd_and_interval(n_cls, tmp_path, capsys):
    options = {"training.output_dir": str(tmp_path), "dataset.n_cls": n_cls}
    configs = expand(tiny_config("ast_grf", **options), [3], None)
    table = cycle_table()
    finish_runs(configs, [table] * 3)
    result = Group(configs).finish()
    scores, tables = [], []
    for config in configs:
        folder = RunFolder.of(config)
        scores.append(folder.read_report()["test"]["metrics"]["chosen"]["score"]["value"])
        frame = read_predictions(folder.predictions / "test.csv", config.task)
        order = {name: i for i, name in enumerate(config.task.classes)}
        true, pred = (frame[c].map(order) for c in ("true_class", "pred_class"))
        tables.append(patient_tables(true, pred, frame["patient"], len(order))[1])
    mean = sum(scores) / 3
    sd = math.sqrt(sum((s - mean) ** 2 for s in scores) / 2)
    found = result["summary"]["score"]
    assert sd > 0.1
    assert found["n"] == 3 and found["mean"] == pytest.approx(mean)
    assert found["sd"] == pytest.approx(sd)
    interval = patient_bootstrap(np.stack(tables))["score"]
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    assert ("collapsed_score" in result["summary"]) == (n_cls == 4)
    assert f"{mean:9.2f}{sd:9.2f}{3:5}  [{interval.low:.1f}" in capsys.readouterr().out
    (written,) = tmp_path.glob("*-group-*/group.json")
    assert json.loads(written.read_text())["seeds"] == [0, 1, 2]


def test_pooled_folds_cover_every_patient_exactly_once(tmp_path, capsys):
    options = {"training.output_dir": str(tmp_path), "dataset.n_cls": 2, **FOLDWISE}
    configs = expand(tiny_config("ast_grf", **options), None, ["all"])
    table = cycle_table(patients=13)
    fold = (table["PID"] - 101) % 5
    finish_runs(configs, [table[fold == config.dataset.test_fold] for config in configs])
    group = Group(configs)
    result = group.finish()
    pooled = pd.read_csv(group.path / "predictions" / "out_of_fold-s0.csv")
    assert sorted(pooled["cycle"]) == list(range(len(table)))
    assert pooled.groupby("patient").size().to_dict() == table.groupby("PID").size().to_dict()
    # figures by hand, from all cycles at once: not the mean over folds
    correct = pooled["true_class"] == pooled["pred_class"]
    normal = pooled["true_class"] == "normal"
    score = 50 * (correct[normal].mean() + correct[~normal].mean())
    test = result["test"]["0"]
    assert test["metrics"]["chosen"]["score"]["value"] == pytest.approx(score)
    assert result["summary"]["score"]["mean"] == pytest.approx(score)
    assert test["counts"]["patients"] == 13 and len(test["patients"]) == 13
    assert result["folds"] == [0, 1, 2, 3, 4] and len(result["runs"]) == 5
    # one seed: no sd, but an interval over the patients
    found = result["summary"]["score"]
    assert found["sd"] is None and found["low"] < score < found["high"]
    # the tables have the pooled run in place of its folds, and of a smaller group of the same runs
    smaller = Group(configs[:2])
    smaller.finish()
    folders = [RunFolder.of(config).path for config in configs]
    (run,) = read_runs([*folders, group.path, smaller.path])
    assert (run.path, run.protocol.split) == (group.path, "foldwise, all folds pooled")
    (protocol, groups), *others = group_runs([run])
    assert not others and protocol.test_patients == 13 and protocol.train_cycles is None
    assert groups[0].over_seeds("score").mean == pytest.approx(score)
    (table,) = build_tables([run], ["2-class"])
    assert "split foldwise, all folds pooled" in table.title
    assert table.frame["Score, ours"][0].startswith(f"{score:.2f} [")
    assert len(read_runs([*folders, smaller.path])) == 5
    # the floors are pooled alike: 13 patients, the class prior is at 50
    text = (group.path / "report-s0.md").read_text(encoding="utf-8")
    assert "| class prior |" in text and "those of each fold" in text
    assert set(test["floors"]) == {"class prior", "metadata only, linear", "metadata only, trees"}
    assert "OF 5 FOLDS" not in text and "predictions of folds 0, 1, 2, 3, 4" in text
    assert "out-of-fold patients" in capsys.readouterr().out


def test_pooled_floors_are_those_of_all_folds_together(tmp_path):
    options = {"training.output_dir": str(tmp_path), **FOLDWISE}
    configs = expand(tiny_config("ast_grf", **options), None, ["0", "1"])
    table = cycle_table(patients=10)
    finish_runs(configs, [table[table["PID"] < 106], table[table["PID"] >= 106]])
    group = Group(configs)
    floors = group.finish()["test"]["0"]["floors"]
    text = (group.path / "report-s0.md").read_text(encoding="utf-8")
    assert (
        "2 OF 5 FOLDS" in text
        and "2 models, one per fold" in text
        and "SYNTHETIC RECORDINGS" in text
    )
    for name, floor in floors.items():
        total = np.zeros((4, 4))
        for config in configs:
            own = RunFolder.of(config).read_report()["test"]["floors"][name]
            total += np.array(own["patient_tables"]).sum(axis=0).reshape(4, 4)
        sp, se = total[0, 0] / total[0].sum(), np.diag(total)[1:].sum() / total[1:].sum()
        value = floor["metrics"]["chosen"]["score"]["value"]
        assert value == pytest.approx(50 * (sp + se)), name


def test_other_members_are_another_group(tmp_path):
    config = tiny_config(**{"training.output_dir": str(tmp_path)})
    two, three = (Group(expand(config, [n], None)) for n in (2, 3))
    assert two.path != three.path and two.path == Group(expand(config, [0, 1], None)).path
    assert two.label == "2 seeds"
    folds = Group(expand(tiny_config(**FOLDWISE), [1], ["all"]))
    assert folds.label == "1 seed, 5 folds"
