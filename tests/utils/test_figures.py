"""Style, evaluation figures, learning curves, published table: what is drawn is what was given."""

from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from data.corpora.icbhi import read_cycles
from data.task import Task
from utils.common.errors import UserError
from utils.evaluation.published import PEOPLE, TABLE, read_published, systems
from utils.figures import data_overview, style
from utils.figures.evaluation import (
    confusion_figure,
    operating_figure,
    reliability_figure,
    subgroup_figure,
)
from utils.figures.sota import HONEST, OwnResult, sota_caption, sota_figure
from utils.figures.training import learning_figure, measured_part, read_metrics
from utils.metrics.calibration import calibration_report
from utils.metrics.protocol import Selection


def texts(figure: Figure) -> list[str]:
    """Everything that is written on a figure."""
    from matplotlib.text import Text

    return [t.get_text() for t in figure.findobj(Text) if t.get_text()]


# ---------------------------------------------------------------- style


def test_files_are_png_and_pdf_with_embedded_fonts(tmp_path):
    figure = style.new_figure(style.COLUMN, 1.0)
    figure.subplots().set_xlabel("time (s)")
    style.caption(figure, "Words.", style.Notice(protocol="fixed"))
    paths = style.save(figure, tmp_path / "new", "name")
    assert [p.name for p in paths] == ["name.png", "name.pdf"]
    pdf = paths[1].read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # TrueType inside, not outlines
    assert paths[0].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list((tmp_path / "new").glob(".*"))


def test_caption_stays_on_the_page_and_below_the_axes():
    figure = style.new_figure(style.COLUMN, 1.5)
    axis = figure.subplots()
    axis.set_xlabel("x")
    style.caption(figure, "Words in a caption. " * 12, style.Notice(synthetic=True))
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer() if hasattr(figure.canvas, "get_renderer") else None
    below = axis.get_tightbbox(renderer).y0
    for text in figure.texts:
        box = text.get_window_extent(renderer)
        assert box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= below


def test_notice_says_what_the_figure_is_not():
    assert style.Notice(protocol="test").grave
    assert "SELECTED ON TEST" in " ".join(style.Notice(protocol="test").lines())
    assert "PARTIAL DATA: 50 of 920." in style.Notice(partial="50 of 920").lines()
    assert style.Notice(partial="PARTIAL DATA: 50").lines() == ["PARTIAL DATA: 50."]
    assert "SYNTHETIC" in style.Notice(synthetic=True, partial="PARTIAL DATA: 3").lines()[0]
    assert "LEAKY SPLIT" in style.Notice(leaky=True).lines()[0] and style.Notice(leaky=True).grave
    assert not style.Notice(protocol="validation").grave


# ---------------------------------------------------------------- evaluation


def test_confusion_cells_carry_counts_and_row_shares():
    figure = confusion_figure(np.array([[30, 10], [5, 15]]), ["normal", "abnormal"])
    image = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(image, [[75, 25], [25, 75]])
    assert {"30\n75 %", "10\n25 %", "5\n25 %", "15\n75 %", "normal\n(40)"} <= set(texts(figure))


def test_confusion_of_a_class_without_cycles():
    figure = confusion_figure(np.array([[3, 1], [0, 0]]), ["normal", "abnormal"])
    assert np.isfinite(figure.axes[0].images[0].get_array()).all()


def test_operating_curve_is_the_given_one():
    curve = {"sp": np.array([100.0, 40.0, 0.0]), "se": np.array([0.0, 70.0, 100.0])}
    figure = operating_figure({"model": curve}, {"in use": (40.0, 70.0)})
    lines = {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}
    np.testing.assert_array_equal(lines["model"], np.stack([curve["sp"], curve["se"]], 1))
    np.testing.assert_array_equal(lines["in use: Sp 40.0, Se 70.0"], [[40.0, 70.0]])


def test_reliability_draws_every_calibration():
    rng = np.random.default_rng(0)
    probability, label = rng.random((300, 2)), (rng.random((300, 2)) < 0.4).astype(float)
    report = calibration_report(Task(4), probability, label, pos_weight=[2.0, 3.0])
    figure = reliability_figure(report)
    for axis, name in zip(figure.axes, ("crackle", "wheeze"), strict=True):
        assert axis.get_title() == name
        drawn = {line.get_label(): line.get_xydata() for line in axis.lines}
        for key, label_ in (
            ("as_trained", "as trained"),
            ("without_pos_weight", "pos_weight undone"),
        ):
            rows = [(r["predicted"], r["observed"]) for r in report[name][key]["reliability"]]
            np.testing.assert_allclose(drawn[label_], rows)
            assert f"{report[name][key]['ece']:.3f}" in [t.get_text() for t in axis.texts]


def test_subgroups_leave_out_what_rests_on_too_little():
    table = pd.DataFrame(
        {
            "group": ["device", "device", "site"], "value": ["A", "B", "Tc"],
            "patients": [3, 1, 4], "cycles": [50, 8, 58],
            "sp": [80.0, np.nan, 70.0], "se": [40.0, 60.0, 50.0], "score": [60.0, np.nan, 60.0],
        }
    )  # fmt: skip
    axis = subgroup_figure(table, 55.0).axes[0]
    labels = [t.get_text() for t in axis.get_yticklabels()]
    assert labels == ["A (50 / 3)", "B (8 / 1)", "Tc (58 / 4)"]
    height = dict(zip(labels, axis.get_yticks(), strict=True))
    on_b = [
        line.get_xdata()[0]
        for line in axis.lines
        if len(line.get_xdata()) == 1 and line.get_ydata()[0] == height["B (8 / 1)"]
    ]
    assert np.isnan(on_b).sum() == 2 and 60.0 in on_b


# ---------------------------------------------------------------- learning curves


def history(part="val", n=4):
    epochs = np.arange(n)
    return pd.DataFrame(
        {
            "epoch": epochs, "train_loss": 1.0 / (epochs + 1), "lr": 1e-4,
            f"{part}_loss": 0.9, f"{part}_sp": 80.0, f"{part}_se": 40.0 + epochs,
            f"{part}_score": 60.0 + epochs / 2,
        }
    )  # fmt: skip


def test_learning_curves_mark_the_chosen_epoch():
    table = history()
    loss, score, _ = learning_figure(table, "val", best=2).axes
    np.testing.assert_allclose(loss.lines[0].get_xydata(), np.c_[[1, 2, 3, 4], table.train_loss])
    chosen = next(line for line in score.lines if line.get_label() == "61.0 (epoch 3)")
    np.testing.assert_allclose(chosen.get_xydata(), [[3, 61.0]])
    assert score.get_title() == "validation part, after each epoch"


@pytest.mark.parametrize("part", ["val", "test_selection", "train"])
def test_measured_part_is_the_one_in_the_table(part):
    assert measured_part(history(part)) == part
    title = learning_figure(history(part), part).axes[1].get_title()
    assert ("TEST" in title) == (part == "test_selection")


def test_metrics_of_no_run_are_an_error(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.csv is missing.*run"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.csv").write_text("epoch,score\n0,1\n")
    with pytest.raises(UserError, match="lacks train_loss"):
        read_metrics(tmp_path)


# ---------------------------------------------------------------- published systems


def test_published_rows_have_sources_and_add_up():
    table = read_published()
    assert set(table.task) == {"4-class", "2-class"}
    for row in table.itertuples():
        assert row.source and row.values_from
        if not (pd.isna(row.sp) or pd.isna(row.se)):
            adds_up = abs((row.sp + row.se) / 2 - row.score) <= 0.0151
            assert adds_up or "does not add up" in row.note, row.method
    assert not {"AST"} & set(systems().method)
    tafilm = table[(table.method == "TAFiLM-AST") & (table.task == "2-class")].iloc[0]
    assert (tafilm.sp, tafilm.se, tafilm.score) == (77.80, 66.40, 71.10)  # as printed
    assert "does not add up" in tafilm.note and "72.10" in sota_caption()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("source", None, "source"),
        ("evidence", None, "needs its evidence"),
        ("task", "3-class", "task must be"),
        ("selection", "good", "selection must be"),
        ("score", 160.0, "score"),
        ("split", "80/20", "split must be"),
        ("caveat", "odd", "caveat must be"),
        ("split", "unclear", "need a note"),
    ],
)
def test_faulty_published_rows_are_named(tmp_path, column, value, message):
    table = pd.read_csv(TABLE)
    row = int(np.flatnonzero(table.selection == Selection.TEST)[0])
    table[column] = table[column].astype(object)
    table.loc[row, [column, "note"]] = value, None
    path = tmp_path / "published.csv"
    table.to_csv(path, index=False)
    with pytest.raises(UserError, match=rf"line {row + 2} .*{message}"):
        read_published(path)


def test_results_are_in_blocks_by_selection():
    table = systems()
    own = [
        OwnResult("4-class", "Ours", 80.0, 30.0, 55.0, None, "validation"),
        OwnResult("4-class", "Ours, on test", 80.0, 40.0, 60.0, 1.0, "test"),
    ]
    axis = sota_figure(own).axes[0]
    place = {t.get_text(): t.get_position()[1] for t in axis.texts}
    heads = {
        HONEST: place["Honest: test half opened once"],
        Selection.TEST: place["Selected on the test half"],
    }
    labels = {
        t.get_text(): y for t, y in zip(axis.get_yticklabels(), axis.get_yticks(), strict=True)
    }
    unknown = place["Selection not stated"]
    assert heads[HONEST] < labels["Ours (ours)"] < unknown < heads[Selection.TEST]
    assert labels["Ours, on test (ours)"] > heads[Selection.TEST]
    for row in table[(table.task == "4-class") & (table.selection == Selection.TEST)].itertuples():
        assert any(y > heads[Selection.TEST] for t, y in labels.items() if t.startswith(row.method))
    drawn = sorted(round(float(b.lines[0].get_xdata()[0]), 2) for b in axis.containers)
    of_systems = table[(table.task == "4-class") & (table.backbone != PEOPLE)]
    expected = [*of_systems.score, 55.0, 60.0]
    assert drawn == sorted(round(float(s), 2) for s in expected)


def test_split_and_caveats_are_marked_and_come_last():
    axis, other = sota_figure().axes
    labels = [label.get_text() for label in axis.get_yticklabels()]
    heads = [t.get_position()[1] for t in axis.texts if t.get_fontweight() == "bold"]
    for row in systems().query("task == '4-class' and backbone != @PEOPLE").itertuples():
        (place,) = [n for n, text in enumerate(labels) if text.startswith(f"{row.method} ’")]
        mark = {"recordings shuffled": "†", "unclear": "‡", "another Se": "§",
                "label in the input": "¶", "ensemble": "°"}  # fmt: skip
        for what in (row.split, row.caveat):
            assert mark.get(what, "") in labels[place]
        if row.split != "official" or row.caveat in ("another Se", "label in the input"):
            y = axis.get_yticks()[place]
            below = [n for n, h in enumerate(axis.get_yticks()) if h > y]
            block_ends = min([h for h in heads if h > y], default=np.inf)
            later = [n for n in below if axis.get_yticks()[n] < block_ends]
            assert all(set(labels[n]) & set("†‡§¶") for n in later)
    assert sum("†" in text for text in labels) == 3
    key = other.texts[-1].get_text()
    assert "76 patients in both parts" in key and all(mark in key for mark in "†‡§¶°*+")


def test_physicians_are_a_line():
    axis = sota_figure().axes[0]
    lines = [line for line in axis.lines if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in lines] == [47.77]
    assert any("seven senior physicians" in text.get_text() for text in axis.texts)


def test_overview_counts_what_the_table_has(synthetic_corpus, tmp_path):
    words = ["--data-folder", str(synthetic_corpus), "--output", str(tmp_path)]
    with patch.object(data_overview.style, "save", wraps=data_overview.style.save) as save:
        assert data_overview.main(words) == 0
    figure, table = save.call_args.args[0], read_cycles(synthetic_corpus)
    bars = figure.axes[1].containers[0]  # training cycles by device
    names = [label.get_text() for label in figure.axes[1].get_xticklabels()]
    train = table[table["Split"] == "train"]["Device"].value_counts()
    assert [bar.get_height() for bar in bars] == [train.get(name, 0) for name in names]
    texts = " ".join(text.get_text() for text in figure.texts)
    assert "SYNTHETIC" in texts and (tmp_path / "data_overview.pdf").is_file()
