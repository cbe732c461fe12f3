"""The command: the README's lines work, wrong input is refused with the line that would work."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import visualize
from data.task import CLASSES, Task
from tests.utils.figure_data import write_checkpoint
from utils.common.errors import UserError
from utils.evaluation.report import evaluate_predictions
from utils.evaluation.trained_model import TrainedModel
from utils.figures import commands
from utils.figures.commands import Options, own_results
from utils.figures.runs import read_evaluation, run_figures
from utils.figures.spectrograms import log_mels, typical_cycles
from utils.figures.style import Output
from utils.metrics.predictions import make_predictions


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, synthetic_corpus):
    """Folder with one small checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for variant, short in (
        ("ast", "ast"), ("ast_softfilm", "softfilm"), ("ast_tafilm", "tafilm"), ("ast_grf", "grf"),
    ):  # fmt: skip
        write_checkpoint(folder / f"{short}_best.pt", variant, synthetic_corpus)
    return folder


def run(*arguments) -> int:
    """Exit status of visualize.py."""
    import sys
    from unittest.mock import patch

    with patch.object(sys, "argv", ["visualize.py", *map(str, arguments)]):
        return visualize.main()


def written(folder):
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- models


def test_readme_commands_write_png_and_pdf(checkpoints, tmp_path, capsys):
    soft, base = checkpoints / "softfilm_best.pt", checkpoints / "ast_best.pt"
    out = ("--output-dir", tmp_path)
    assert run("--mask-analysis", "--checkpoint", soft, *out) == 0
    first = " ".join(capsys.readouterr().out.split()[:40])
    for said in ("SoftFiLM-AST, 4-class", "validation patients", "SYNTHETIC", "epoch 2 of 3", "20"):
        assert said in first
    assert run("--film-params", "--checkpoint", soft, *out) == 0
    assert run("--tsne", "--baseline-ckpt", base, "--softfilm-ckpt", soft, *out) == 0
    names = ("film_params", "film_params_cycles", "film_params_map", "mask_analysis", "tsne")
    assert written(tmp_path) == [f"{name}.{f}" for name in names for f in ("pdf", "png")]


def test_figures_of_models_say_what_they_rest_on(checkpoints, tmp_path, monkeypatch):
    said = {}

    def note(self, figure, name, text="", notice=None):
        said[name] = text, notice
        return []

    monkeypatch.setattr(Output, "write", note)
    options = Options(Output(tmp_path), checkpoint=str(checkpoints / "softfilm_best.pt"))
    commands.mask_analysis(options)
    text, notice = said["mask_analysis"]
    assert notice.synthetic and notice.grave and notice.protocol == "validation"
    assert notice.partial.startswith("PARTIAL DATA") and "a-run, epoch 2" in notice.source
    _, split = TrainedModel.open(checkpoints / "softfilm_best.pt").corpus
    assert f"over {len(split.test)} cycles" in text


def test_paths_in_a_checkpoint_must_exist(synthetic_corpus, tmp_path):
    metadata, cache = tmp_path / "there.csv", tmp_path / "cache"
    write_checkpoint(
        tmp_path / "soft.pt", "ast_softfilm", synthetic_corpus,
        f"dataset.cycle_metadata_path={metadata}",
    )  # fmt: skip
    metadata.unlink()
    dataset = TrainedModel.open(tmp_path / "soft.pt").config.dataset
    assert (dataset.cycle_metadata_path, dataset.cache_dir) == (None, "cache")
    metadata.touch(), cache.mkdir()
    dataset = TrainedModel.open(tmp_path / "soft.pt").config.dataset
    assert (dataset.cycle_metadata_path, dataset.cache_dir) == (str(metadata), str(cache))
    other = TrainedModel.open(tmp_path / "soft.pt", data_folder="elsewhere").config
    assert (other.dataset.data_folder, other.dataset.cycle_metadata_path) == ("elsewhere", None)


def test_embeddings_and_logits_are_the_trained_models(checkpoints):
    model = TrainedModel.open(checkpoints / "grf_best.pt")
    for name, value in model.checkpoint.weights.items():
        assert torch.equal(model.model.state_dict()[name], value), name
    rows = np.array([4, 1, 2])
    vectors = torch.from_numpy(model.embeddings(rows))
    assert vectors.shape == (3, 48)
    logits = model.logits(model.data.batch(rows))  # any batch, no data needed
    torch.testing.assert_close(model.model.head(vectors), logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.predictor(rows), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (
            ("--mask-analysis", "--checkpoint", "tafilm_best.pt"),
            ("holds TAFiLM-AST", "--mask-analysis --checkpoint checkpoints/softfilm_best.pt",
             "python ast_film_soft.py --config configs/ast_film_soft_config.yaml"),
        ),
        (
            ("--film-params", "--checkpoint", "grf_best.pt"),
            ("holds GRF-AST", "no gamma", "--film-params --checkpoint checkpoints/softfilm_best"),
        ),
        (
            ("--tsne", "--baseline-ckpt", "tafilm_best.pt", "--softfilm-ckpt", "softfilm_best.pt"),
            ("holds TAFiLM-AST", "--baseline-ckpt checkpoints/ast_best.pt", "python ast_train.py"),
        ),
        (
            ("--tsne", "--baseline-ckpt", "ast_best.pt", "--softfilm-ckpt", "ast_best.pt"),
            ("holds AST", "--softfilm-ckpt checkpoints/softfilm_best.pt"),
        ),
        (
            ("--film-params", "--checkpoint", "film_best.pt"),
            ("no checkpoint", "film_best.pt", "python ast_film_train.py"),
        ),
        (
            ("--mask-analysis", "--checkpoint", "softfilm_best.pt", "--data-folder", "nowhere"),
            ("data folder nowhere", "--data-folder"),
        ),
    ],
)  # fmt: skip
def test_wrong_input_is_refused_with_the_right_command(
    checkpoints, tmp_path, caplog, arguments, messages
):
    arguments = [checkpoints / a if a.endswith(".pt") else a for a in arguments]
    assert run(*arguments, "--output-dir", tmp_path / "figs") == 2
    for message in messages:
        assert message in caplog.text
    assert not (tmp_path / "figs").exists()


def test_other_test_cycles_are_not_compared(checkpoints, synthetic_corpus, tmp_path):
    other = tmp_path / "softfilm_best.pt"
    write_checkpoint(other, "ast_softfilm", synthetic_corpus, "dataset.split_strategy=random")
    options = Options(baseline=str(checkpoints / "ast_best.pt"), softfilm=str(other))
    with pytest.raises(UserError, match="tested on different cycles"):
        commands.tsne(options)


def test_missing_things_are_named_and_the_rest_is_made(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert run("--all", "--output-dir", "out", "--formats", "png") == 2
    assert written(tmp_path / "out") == ["icbhi_sota_comparison.png"]
    for name in ("softfilm_best.pt", "ast_best.pt"):
        assert name in caplog.text


def test_a_figure_must_be_asked_for(capsys):
    with pytest.raises(SystemExit):
        run("--output-dir", "x")
    assert "--mask-analysis" in capsys.readouterr().err


# ---------------------------------------------------------------- runs


@pytest.fixture
def finished(tmp_path):
    """A run folder with the report of 120 invented cycles."""
    rng = np.random.default_rng(0)
    task, n = Task(4), 120
    table = pd.DataFrame(
        {
            "PID": rng.integers(101, 113, n), "Filename": [f"r{i // 4}" for i in range(n)],
            "CycleIndex": np.arange(n) % 4, "Device": rng.choice(["Meditron", "AKGC417L"], n),
            "AuscLoc": rng.choice(["Al", "Tc"], n), "Age": rng.uniform(3, 90, n),
            "Sex": rng.choice(["F", "M"], n), "BMIDerived": 22.0, "BMI": 22.0, "Split": "test",
            "Crackles": rng.integers(0, 2, n), "Wheezes": rng.integers(0, 2, n),
        }
    )  # fmt: skip
    frame = make_predictions(task, table, np.arange(n), rng.normal(size=(n, 2)), (0.5, 0.4))
    test = evaluate_predictions(
        frame, task, (0.5, 0.4), selection="fixed", partial_message="", bootstrap=20
    )
    report = {
        "title": "FiLM-AST", "n_cls": 4, "selection": "fixed", "split_strategy": "official",
        "variant": "ast_film", "epoch": 1, "seed": 0, "test": test.to_dict(),
    }  # fmt: skip
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "metrics.csv").write_text("epoch,train_loss,lr\n0,1.0,1e-4\n1,0.5,0\n")
    return folder


def test_figures_of_a_run(finished, tmp_path):
    flags = ("--confusion", "--operating-curve", "--reliability", "--subgroups")
    assert run(*flags, "--learning-curves", "--run", finished, "--output-dir", tmp_path / "o") == 0
    names = ("confusion", "learning_curves", "operating_curve", "reliability", "subgroups")
    assert written(tmp_path / "o") == [f"{n}.{f}" for n in names for f in ("pdf", "png")]


def test_synthetic_is_marked_without_the_corpus(finished):
    path = finished / "report.json"
    assert not read_evaluation(finished).report.synthetic
    path.write_text(json.dumps(json.loads(path.read_text()) | {"synthetic": True}))
    assert read_evaluation(finished).notice().grave


def test_a_run_draws_itself(finished):
    paths = run_figures(read_evaluation(finished))
    assert {p.parent for p in paths} == {finished / "figures"}
    assert {p.suffix for p in paths} == {".png"} and len(paths) == 5


def test_several_runs_get_folders_of_their_own(finished, tmp_path):
    import shutil

    other = shutil.copytree(finished, tmp_path / "other")
    target = tmp_path / "o"
    assert run("--confusion", "--run", finished, other, "--output-dir", target) == 0
    assert written(target) == ["other", "run"]


def test_the_part_that_was_not_evaluated_is_named(finished, tmp_path, caplog):
    assert run("--confusion", "--run", finished, "--part", "val", "--output-dir", tmp_path) == 2
    assert "no evaluation of the val part (there: test)" in caplog.text
    assert run("--confusion", "--run", tmp_path / "none") == 2
    assert "report.json is missing" in caplog.text
    assert run("--confusion", "--output-dir", tmp_path) == 2
    assert "--run DIR" in caplog.text


def test_own_results_are_means_over_seeds(finished):
    one, two = (read_evaluation(finished) for _ in range(2))
    value = one.report.metrics["chosen"]["score"].value
    better = replace(two.report.metrics["chosen"]["score"], value=value + 2)
    two.report.metrics["chosen"]["score"] = better
    four, collapsed = own_results([one, two])
    assert (four.task, four.name, four.protocol) == ("4-class", "FiLM-AST, 2 seeds", "fixed")
    assert four.score == pytest.approx(value + 1) and four.score_sd == pytest.approx(2**0.5)
    assert (collapsed.task, collapsed.score_sd) == ("2-class", 0.0)
    one.report.partial = True
    with pytest.raises(UserError, match="cannot be shown with published"):
        own_results([one])


# ---------------------------------------------------------------- spectrograms


def test_log_mel_of_each_class_is_the_front_ends(synthetic_corpus, tmp_path):
    assert run("--log-mel", "--data-folder", synthetic_corpus, "--output-dir", tmp_path) == 0
    assert written(tmp_path) == ["log_mel.pdf", "log_mel.png"]
    from utils.config.schema import RunConfig
    from utils.training.assemble import build_frontend, build_split

    config = RunConfig()
    config.dataset.data_folder = str(synthetic_corpus)
    table, _ = build_split(config)
    rows = typical_cycles(table)
    assert list(rows) == list(CLASSES)
    for name, row in rows.items():
        events = (table.Crackles[row], table.Wheezes[row])
        assert CLASSES[events[0] + 2 * events[1]] == name and table.Split[row] == "train"
    mels = log_mels(table, rows, build_frontend(config), config.audio)
    for name, row in rows.items():
        assert mels[name].energy.shape == (128, 1024)
        assert mels[name].duration == pytest.approx(table.Duration[row], abs=1e-3)
        assert mels[name].energy.min() > -16 and mels[name].energy.max() < 12  # nat, not z-scores


def test_log_mel_needs_recordings(caplog):
    assert run("--log-mel") == 2
    assert "--data-folder DIR" in caplog.text
