"""Predictions -> report -> Markdown, model card and the README's tables."""

import csv
import io
import json
import logging

import numpy as np
import pandas as pd
import pytest
import yaml

from data.task import Task
from tests.utils.evaluation_tables import cycle_table, predictions
from utils.common.errors import UserError
from utils.evaluation.finished_runs import read_runs
from utils.evaluation.published import AUTHORS, read_published
from utils.evaluation.render import model_card, to_markdown
from utils.evaluation.report import (
    Baseline,
    Origin,
    Report,
    RunReport,
    compare_predictions,
    evaluate_predictions,
    read_report,
)
from utils.evaluation.result_tables import build_tables, main, to_csv, to_latex
from utils.metrics.bootstrap import Difference
from utils.metrics.predictions import (
    class_numbers,
    labels,
    logits,
    probabilities,
    read_predictions,
    write_predictions,
)
from utils.metrics.protocol import (
    LEAKY_MARK,
    LEAKY_NOTE,
    PARTIAL_MARK,
    SYNTHETIC_MARK,
    Selection,
)
from utils.metrics.score import sp_se_score
from utils.metrics.subgroups import age_group, subgroup_table

TASKS = (Task(4), Task(2), Task(4, exclusive=True))


def report_of(task, *, selection="validation", seed=0, thresholds=None, patients=12, **options):
    frame = predictions(task, cycle_table(patients), seed)
    thresholds = task.default_thresholds if thresholds is None else thresholds
    return evaluate_predictions(
        frame, task, thresholds, selection=selection, bootstrap=100, **options
    )


# --- predictions table ---------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_predictions_survive_the_file(task, tmp_path):
    frame = predictions(task, cycle_table())
    path = write_predictions(frame, tmp_path / "new" / "test.csv")
    back = read_predictions(path, task)
    pd.testing.assert_frame_equal(back, frame, check_dtype=False)
    assert probabilities(back, task) == pytest.approx(task.probabilities(logits(back, task)))
    assert (task.true_classes(labels(back, task)) == class_numbers(back, task)).all()
    assert [p.name for p in path.parent.iterdir()] == ["test.csv"]


def test_wrong_predictions_are_named(tmp_path):
    path = write_predictions(predictions(Task(2), cycle_table()), tmp_path / "test.csv")
    with pytest.raises(UserError, match="p_crackle"):
        read_predictions(path, Task(4))
    with pytest.raises(UserError, match=r"nothing\.csv"):
        read_predictions(tmp_path / "nothing.csv", Task(2))
    frame = read_predictions(path, Task(2))
    write_predictions(frame.assign(pred_class="rhonchus"), path)
    with pytest.raises(UserError, match="rhonchus"):
        read_predictions(path, Task(2))


# --- report --------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_report_is_json_and_holds_the_metrics(task):
    table = cycle_table()
    frame = predictions(task, table)
    thresholds = (0.4,) * task.n_thresholds
    report = evaluate_predictions(frame, task, thresholds, selection="validation", bootstrap=200)
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content == report.to_dict() == Report.from_dict(content).to_dict()
    true = class_numbers(frame, task)
    rules = {"chosen": thresholds, "default": task.default_thresholds}
    for rule, values in rules.items():
        pred = task.predicted_classes(probabilities(frame, task), values)
        expected = sp_se_score(true, pred)
        found = report.metrics[rule]
        assert [found[k].value for k in ("sp", "se", "score")] == pytest.approx(expected)
        assert found["score"].low < expected.score < found["score"].high
        assert np.trace(report.confusion[rule]) == (true == pred).sum()
    assert report.counts["cycles"] == len(table) == np.sum(report.patient_tables)
    assert report.counts["patients"] == len(report.patients) == 12
    assert report.thresholds["chosen"] == thresholds
    assert set(report.calibration) == set(task.outputs)


def test_without_thresholds_the_table_decides():
    task, frame = Task(2), predictions(Task(2), cycle_table())
    frame["pred_class"] = frame["true_class"]
    report = evaluate_predictions(frame, task, None, selection="validation", bootstrap=20)
    assert report.metrics["chosen"]["score"].value == 100
    assert report.metrics["default"]["score"].value < 100
    assert report.thresholds["chosen"] is None and "those of each fold" in to_markdown(report)


@pytest.mark.parametrize("task", TASKS)
def test_part_with_one_class_reports_nothing_undefined(task):
    frame = predictions(task, cycle_table().assign(Crackles=0, Wheezes=0))
    report = evaluate_predictions(
        frame, task, task.default_thresholds, selection="fixed", bootstrap=20
    )
    score = report.to_dict()["metrics"]["chosen"]["score"]
    assert score == {"value": None, "low": None, "high": None}
    assert report.operating_curve["se"] == []
    text = to_markdown(report)
    assert "nan" not in text.lower().split() and "| Score | – | – |" in text


@pytest.mark.parametrize("selection", ["validation", "fixed", "test"])
@pytest.mark.parametrize("partial", ["", "PARTIAL: 50 of 920 recordings"])
@pytest.mark.parametrize("synthetic", [False, True])
@pytest.mark.parametrize("split", ["official", "recordings"])
def test_every_table_carries_rule_and_marks(selection, partial, synthetic, split):
    report = report_of(Task(4), selection=selection, partial_message=partial, synthetic=synthetic)
    report.origin = Origin(
        run="ast_film-4cls-s3", variant="ast_film", title="FiLM-AST", n_cls=4,
        split_strategy=split, selection=selection, seed=3, epoch=6, revision="abc123",
    )  # fmt: skip
    report.baselines = {"class prior": Baseline(report_of(Task(4)).metrics)}
    difference = Difference(-3.0, -5.0, -1.0, 0.004)
    row = {"metadata": "shuffled", "sp": 50.0, "se": 40.0, "score": 45.0, "difference": difference}
    report.metadata_test = [row]
    assert Report.from_dict(report.to_dict()).metadata_test == [row]
    text = to_markdown(report)
    captions = [
        line for line in text.splitlines() if line.startswith("**") and line.endswith(")**")
    ]
    assert len(captions) == text.count("\n|---") == 7  # one caption for each table
    for line in captions:
        assert Selection(selection).label in line and (PARTIAL_MARK in line) == bool(partial)
        assert (SYNTHETIC_MARK in line) == synthetic
        assert (LEAKY_MARK in line) == (split == "recordings")
    assert f"Run `ast_film-4cls-s3`: FiLM-AST, 4-class, split `{split}`, seed 3, epoch 7." in text
    assert Selection(selection).statement in text and (partial in text)
    assert "| shuffled | 50.00 | 40.00 | 45.00 | -3.00 [-5.00, -1.00] | 0.004 |" in text
    nobody = dict.fromkeys(report.counts, 0)
    counts = {"train": report.counts, "val": nobody}
    card = model_card(report, corpora=["icbhi"], training_counts=counts)
    rule = Selection(selection)
    for needed in (
        rule.label,
        rule.statement,
        "research only",
        "12 patients",
        partial,
    ):
        assert needed in card
    assert (PARTIAL_MARK in card) == bool(partial)
    assert (LEAKY_MARK in card) == (split == "recordings")
    assert ("Physiol. Meas." in card) == (not synthetic) and (SYNTHETIC_MARK in card) == synthetic
    assert "seed 3, epoch 7; run `ast_film-4cls-s3`, code revision `abc123`" in card
    assert "| baseline: class prior | " in card and "Training: 144 cycles" in card
    assert "Validation" not in card
    val = {"train": report.counts, "val": report.counts}
    card = model_card(report, corpora=["manifest", "sprsound"], training_counts=val)
    assert "Validation: 144 cycles" in card
    assert ("own table and SPRSound (Zhang" in card) == (not synthetic) and "Rocha" not in card
    assert "156 and 218" not in card, "they are ICBHI's"
    assert ("halves are the corpus's own" in card) == (split == "official")


# --- subgroups -----------------------------------------------------------------------------------


def test_age_groups_by_hand():
    ages = pd.Series([0.25, 17.9, 18, 64.9, 65, 93, np.nan])
    assert list(age_group(ages)) == [
        "< 18", "< 18", "18-64", "18-64", ">= 65", ">= 65", "unknown"
    ]  # fmt: skip
    frame = predictions(Task(2), cycle_table(patients=7)).assign(age=lambda f: f["patient"].map(
        dict(zip(range(101, 108), ages, strict=True))))  # fmt: skip
    table = subgroup_table(frame, Task(2))
    shown = table[table["group"] == "age"]["value"].to_list()
    assert shown == ["< 18", "18-64", ">= 65", "unknown"], "in the order of age"


@pytest.mark.parametrize("task", TASKS)
def test_subgroups_cover_all_and_hide_small_rates(task):
    frame = predictions(task, cycle_table())
    frame.loc[:4, "sex"] = None  # five cycles of unknown sex
    table = subgroup_table(frame, task)
    for group, rows in table.groupby("group"):
        assert rows["cycles"].sum() == len(frame), group
        assert (rows["normal"] + rows["abnormal"] == rows["cycles"]).all()
    unknown = table[(table["group"] == "sex") & (table["value"] == "unknown")].iloc[0]
    assert unknown["cycles"] == 5 and unknown[["sp", "se", "score"]].isna().all()
    assert (table["sp"].isna() == (table["normal"] < 10)).all()
    assert (table["se"].isna() == (table["abnormal"] < 10)).all()
    device = table[(table["group"] == "device") & table["score"].notna()].iloc[0]
    rows = frame[frame["device"] == device["value"]]
    expected = sp_se_score(class_numbers(rows, task), class_numbers(rows, task, "pred_class"))
    assert device[["sp", "se", "score"]].to_list() == pytest.approx(expected)
    known = table[(table["group"] == "bmi") & (table["value"] == "unknown")].iloc[0]
    assert known["patients"] == 1


def test_comparison_is_second_minus_first():
    table = cycle_table(patients=20)
    named = {
        name: predictions(Task(2), table, seed, skill)
        for name, seed, skill in (("poor", 0, 0.0), ("good", 1, 2.0), ("fair", 2, 0.6))
    }
    rows = compare_predictions(named, Task(2), bootstrap=500)
    score = {(r.first, r.second): r for r in rows if r.figure == "score"}
    assert list(score) == [("poor", "good"), ("poor", "fair"), ("good", "fair")]
    assert score["poor", "good"].low > 0 > score["good", "fair"].high
    assert score["poor", "good"].p < 0.01


# --- tables of runs ------------------------------------------------------------------------------


TITLES = ["AST", "GRF-AST", "FiLM-AST", "TAFiLM-AST", "SoftFiLM-AST"]
NAMES = ["ast", "ast_grf", "ast_film", "ast_tafilm", "ast_softfilm"]


@pytest.fixture
def run_folder(tmp_path):
    """Maker of finished run folders."""

    def make(variant="ast_film", *, seed=0, n_cls=4, selection="validation", blocks=12,
             layers="all", partial="", lr=3e-5, patients=12, synthetic=False,
             split="official", method=""):  # fmt: skip
        task = Task(n_cls)
        test = report_of(
            task, selection=selection, seed=seed, partial_message=partial, patients=patients
        )
        test.baselines = {"class prior": Baseline(report_of(task, seed=9).metrics)}
        title = TITLES[NAMES.index(variant)] if variant in NAMES else variant
        title += f" + {method}" if method else ""
        report = RunReport(
            variant, title, n_cls, selection, seed, partial=bool(partial), partial_message=partial,
            synthetic=synthetic, counts={"train": test.counts}, test=test, split_strategy=split,
        )  # fmt: skip
        layers = layers if isinstance(layers, str) else list(layers)
        section = {} if variant in ("ast", "ast_grf") else {"conditioned_layers": layers}
        config = {
            "variant": variant,
            "dataset": {"split_strategy": split, "n_cls": n_cls, "cache_dir": "cache"},
            "backbone": {"depth": 12, "trainable_blocks": blocks},
            "models": {variant: section, "other": {"x": seed}},
            "training": {"seed": seed, "selection": selection, "lr": lr, "output_dir": "runs"},
            "mlflow": {"enabled": False},
        }
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps(report.to_dict()))
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return folder

    return make


def row_of(table, **values):
    """The row with these cells, by heading; `_` for a space or a sign in it."""
    frame = table.frame
    for name, value in values.items():
        (column,) = [c for c in frame if c.replace(" ", "_").split(".")[-1] == name]
        frame = frame[frame[column] == value]
    assert len(frame) == 1, frame
    return frame.iloc[0]


def test_seeds_are_averaged_next_to_the_paper(run_folder):
    runs = read_runs([run_folder(seed=s) for s in (0, 1, 2)])
    (table,) = build_tables(runs, ["4-class"])
    row = row_of(table, Method="FiLM-AST")
    values = [r.report.test.metrics["chosen"]["score"].value for r in runs]
    assert row["Score, ours"].startswith(f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} [")
    assert row["Score, ours"].endswith("n = 3")
    assert row["Score, paper"] == "62.37 ± 1.05" and row["Se, paper"] == "47.49 ± 0.95"
    assert row_of(table, Method="SoftFiLM-AST")["Score, ours"] == "–"
    assert list(table.frame["Method"]) == [*TITLES, "Baseline: class prior"]
    assert list(table.frame)[1] == "Sp, ours", "no key differs"
    one = runs[0].report.test.baselines["class prior"].metrics["chosen"]["score"]
    expected = f"{one.value:.2f} [{one.low:.1f}, {one.high:.1f}]"
    assert row_of(table, Method="Baseline: class prior")["Score, ours"] == expected
    assert any("Test: 144 cycles" in note for note in table.notes)


def test_protocols_never_share_a_table(run_folder):
    folders = [
        run_folder(),
        run_folder(selection="test"),
        run_folder(partial="PARTIAL: 50 of 920 recordings"),
        run_folder(patients=11),
        run_folder(synthetic=True),
        run_folder(split="recordings"),
    ]
    tables = build_tables(read_runs(folders), ["4-class"])
    assert len(tables) == 6
    marks = [Selection.TEST.label in t.title for t in tables]
    assert marks == [False, False, False, False, False, True]  # honest rules first
    marked = [t for t in tables if PARTIAL_MARK in t.title]
    assert len(marked) == 1 and "50 of 920 recordings" in marked[0].notes[0]
    (invented,) = [t for t in tables if SYNTHETIC_MARK in t.title]
    assert SYNTHETIC_MARK in invented.notes[0]
    (leaky,) = [t for t in tables if LEAKY_MARK in t.title]
    assert leaky.notes[0] == LEAKY_NOTE and "split recordings" in leaky.title
    assert not any("paper" in text.lower() for text in (*leaky.frame, *leaky.notes))
    assert list(leaky.frame["Method"]) == ["FiLM-AST", "Baseline: class prior"]
    assert LEAKY_MARK in to_latex(leaky) and ",True," in to_csv(leaky)
    assert all(row_of(t, Method="FiLM-AST")["Score, ours"].endswith("n = 1") for t in tables)


def test_a_key_that_differs_is_a_column(run_folder):
    folders = [run_folder(seed=0), run_folder(seed=1), run_folder(seed=0, lr=1e-4)]
    (table,) = build_tables(read_runs(folders), ["4-class"])
    assert list(table.frame)[:2] == ["Method", "training.lr"]
    for lr, n in (("3e-05", 2), ("0.0001", 1)):
        row = row_of(table, Method="FiLM-AST", lr=lr)
        assert row["Score, ours"].endswith(f"n = {n}")
    assert row_of(table, Method="AST")["training.lr"] == "–"


def test_the_same_run_twice_is_refused(run_folder):
    folders = [run_folder(), run_folder()]
    with pytest.raises(UserError, match="same seed"):
        build_tables(read_runs(folders))
    assert len(read_runs([folders[0], folders[0]])) == 1


def test_two_class_table_keeps_collapsed_metrics_apart(run_folder):
    folders = [run_folder("ast_tafilm", n_cls=2), run_folder("ast_tafilm", n_cls=4)]
    (table,) = build_tables(read_runs(folders), ["2-class"])
    assert row_of(table, Method="TAFiLM-AST")["Score, paper"] == "71.10 ± 0.95"
    collapsed = row_of(table, Method="TAFiLM-AST (4-class model, collapsed)")
    assert collapsed["Score, paper"] == "–" and collapsed["Score, ours"] != "–"
    mark = " (4-class model, collapsed)"
    own, other = (row_of(table, Method=f"Baseline: class prior{m}") for m in ("", mark))
    assert list(own)[1:4] != list(other)[1:4]
    assert any("72.10, printed 71.10" in note for note in table.notes)


def test_freezing_and_layers_tables(run_folder):
    folders = [run_folder(blocks=b) for b in (0, 12)]
    folders += [run_folder("ast_softfilm", layers=ls) for ls in ("all", (10, 11), (0, 5))]
    tables = build_tables(read_runs(folders))
    by_title = {t.title.split(",")[0].split(" (")[0]: t for t in tables}
    freezing, layers = by_title["Backbone freezing"], by_title["Conditioned layers"]
    assert list(freezing.frame)[:2] == ["Method", "backbone.trainable_blocks"]
    assert list(dict.fromkeys(freezing.frame.iloc[:, 1])) == ["0", "4", "8", "12"]
    row = row_of(freezing, Method="FiLM-AST", trainable_blocks="0")
    assert row["Score, paper"] == "53.09" and row["Score, ours"] != "–"
    row = row_of(freezing, Method="FiLM-AST", trainable_blocks="4")
    assert row["Score, paper"] == "58.73" and row["Score, ours"] == "–"
    soft = layers.frame[layers.frame.Method == "SoftFiLM-AST"]
    assert list(soft.iloc[:, 1]) == ["0, 5", "last 2", "last 6", "all"]
    row = row_of(layers, Method="SoftFiLM-AST", conditioned_layers="last 2")
    assert row["Score, paper"] == "62.45" and row["Score, ours"] != "–"
    # a partly conditioned or frozen model is not in the main table, and the table says so
    main_table = by_title["4-class evaluation"]
    assert row_of(main_table, Method="SoftFiLM-AST")["Score, ours"].endswith("n = 1")
    assert (
        main_table.notes[-1].startswith("Left out") and "run0, run3, run4" in main_table.notes[-1]
    )


def test_methods_are_columns_of_their_own_table(run_folder):
    folders = [
        run_folder(variant, method=method, lr=1e-4 if method else 3e-5)
        for variant in ("ast_softfilm", "ast")
        for method in ("PAFA", "")
    ]
    main_table, table = build_tables(read_runs(folders), ["4-class", "methods"])
    assert list(table.frame) == ["Variant", "none", "PAFA"]
    assert list(table.frame["Variant"]) == ["AST", "SoftFiLM-AST"]
    assert "–" not in table.frame.to_numpy()
    assert table.notes[-1] == "PAFA: training.lr=0.0001, unlike the runs without a method."
    assert not any("Paper:" in note for note in table.notes), "it holds no value of the paper"
    titles = [title for title in main_table.frame["Method"] if title.startswith("AST")]
    assert titles == ["AST", "AST + PAFA"]
    assert row_of(main_table, Method="AST + PAFA")["Score, paper"] == "–"
    # what differs among the runs of one method makes a row of its own
    folders.append(run_folder("ast", method="PAFA", lr=1e-3))
    (table,) = build_tables(read_runs(folders), ["methods"])
    assert list(table.frame)[:2] == ["Variant", "training.lr"]
    row = row_of(table, Variant="AST", lr="0.001")
    assert row["none"] == "–" and row["PAFA"].endswith("n = 1")
    assert build_tables(read_runs(folders[1::2]), ["methods"]) == []


def test_command_prints_each_format(run_folder, capsys):
    folders = [str(run_folder("ast_tafilm", n_cls=2, partial="PARTIAL: 7 patients"))]
    assert main([*folders, "--table", "2-class"]) == 0
    assert "### 2-class evaluation (selected on validation patients; PARTIAL DATA)" in (
        capsys.readouterr().out
    )
    assert main([*folders, "--format", "latex"]) == 0
    latex = capsys.readouterr().out
    assert r"\toprule" in latex and r"71.10 $\pm$ 0.95" in latex and "PARTIAL DATA" in latex
    body = latex[latex.index(r"\midrule") : latex.index(r"\bottomrule")].strip().splitlines()[1:]
    assert all(line.count(" & ") == 7 and line.endswith(r"\\") for line in body)
    assert main([*folders, "--format", "csv"]) == 0
    text = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    rows = list(csv.DictReader(io.StringIO("\n".join(text))))
    assert len(rows) == 5 and {row["selection"] for row in rows} == {"validation"}
    assert {row["partial"] for row in rows} == {"True"}


def test_command_names_what_is_wrong(run_folder, tmp_path, caplog):
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2
    assert "no config.yaml" in caplog.text and "fill no table" in caplog.text
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "no folder" in caplog.text
    caplog.clear()
    unfinished = run_folder()
    (unfinished / "report.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert main([str(unfinished)]) == 2
    assert "is not finished" in caplog.text and "fill no table" in caplog.text
    (tmp_path / "empty" / "group.json").write_text("{}")  # runs/* holds groups as well
    caplog.clear()
    assert main([str(tmp_path / "empty"), str(run_folder())]) == 0
    assert "left out" not in caplog.text
    assert main([]) == 2
    assert "no run folders given" in caplog.text


# --- report.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: text.replace('"n_cls"', '"classes"', 1),
        lambda text: text.replace('"confusion": {', '"confusion": [], "x": {', 1),
        lambda text: text.replace('"metrics": {', '"metrics": 3, "y": {', 1),
    ],
)
def test_a_damaged_report_is_one_sentence(damage, run_folder):
    path = run_folder() / "report.json"
    assert read_report(path).test.counts["patients"] == 12
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=r"report\.json .*evaluate the run again") as error:
        read_report(path)
    assert "\n" not in str(error.value)


def test_the_papers_scores_are_the_means_but_for_one():
    table = read_published()
    table = table[(table.authors == AUTHORS) & table.sp.notna()]
    wrong = table[((table.sp + table.se) / 2 - table.score).abs() > 0.011]
    assert len(table) == 8 and list(wrong.method + wrong.task) == ["TAFiLM-AST2-class"]
