"""The five scripts as a user starts them, on a small synthetic corpus."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from models.registry import VARIANTS
from utils import tracking
from utils.common.lock import held
from utils.config.schema import load_config
from utils.training.checkpoint import load_checkpoint
from utils.training.runfolder import RunFolder

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "ast": ("ast_train.py", "ast_config.yaml"),
    "ast_grf": ("ast_meta_fus_train.py", "ast_fus_config.yaml"),
    "ast_film": ("ast_film_train.py", "ast_film_config.yaml"),
    "ast_tafilm": ("ast_tafilm_train.py", "ast_tafilm_config.yaml"),
    "ast_softfilm": ("ast_film_soft.py", "ast_film_soft_config.yaml"),
}
TINY = (
    "backbone.embed_dim=32",
    "backbone.num_heads=2",
    "audio.clip_seconds=2",
    "dataset.w=64",
    "models.*.input_tdim=64",
    "training.epochs=2",
    "training.warmup_epochs=0",
    "dataset.store_workers=1",
)
ARTIFACTS = (
    "config.yaml",
    "run.log",
    "metrics.csv",
    "report.json",
    "report.md",
    "model_card.md",
    "checkpoints/best.pt",
    "predictions/val.csv",
    "predictions/test.csv",
)


@pytest.fixture
def here(tmp_path, monkeypatch, tmp_path_factory) -> Path:
    """A working folder of its own; the waveform store is shared by the session's runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave a run's figures out: they cost seconds, and the MLflow test looks at them."""
    monkeypatch.setattr("utils.runs.end.draw_figures", lambda *_: None)


def words(variant: str, corpus: Path, *overrides: str) -> list[str]:
    script, config = SCRIPTS[variant]
    return [
        str(ROOT / script),
        "--config",
        str(ROOT / "configs" / config),
        str(ROOT / "configs" / "demo.yaml"),
        f"dataset.data_folder={corpus}",
        "dataset.cycle_metadata_path=null",
        f"dataset.cache_dir={corpus.parent / 'cache'}",
        *TINY,
        *overrides,
    ]


def run(monkeypatch, variant: str, corpus: Path, *overrides: str) -> int:
    """Start a script in this process: importing everything again takes longer than training."""
    arguments = words(variant, corpus, *overrides)
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(arguments[0], run_name="__main__")
    return end.value.code


def only_run(folder: Path) -> Path:
    (found,) = (folder / "runs").iterdir()
    return found


@pytest.mark.parametrize(("variant", "n_cls"), [*((name, 4) for name in SCRIPTS), ("ast", 2)])
def test_a_script_trains_tests_and_writes_everything(
    variant, n_cls, here, monkeypatch, synthetic_corpus, capsys, no_pictures
):
    arguments = (f"dataset.n_cls={n_cls}", "mlflow.enabled=false")
    assert run(monkeypatch, variant, synthetic_corpus, *arguments) == 0
    folder = only_run(here)
    assert folder.name.startswith(f"{variant}-{n_cls}cls-validation-s0-")
    for name in ARTIFACTS:
        assert (folder / name).stat().st_size > 0, name
    left = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert left == ["best.pt"], "the optimiser's state goes when the run has finished"
    checkpoint = load_checkpoint(here / "checkpoints" / f"{VARIANTS[variant].short}_best.pt")
    assert checkpoint.selection == "validation" and checkpoint.partial
    report = json.loads((folder / "report.json").read_text())
    predictions = pd.read_csv(folder / "predictions" / "test.csv")
    assert (
        report["test"]["counts"]["cycles"] == len(predictions) == report["counts"]["test"]["cycles"]
    )
    assert len(pd.read_csv(folder / "metrics.csv")) == 2
    printed = capsys.readouterr()
    assert str(folder.name) in printed.out and "PARTIAL DATA" in printed.out
    for text in (printed.out, printed.err, (folder / "run.log").read_text()):
        assert "SYNTHETIC RECORDINGS" in text and "PARTIAL DATA" in text
    lines = (printed.out + printed.err).splitlines()
    fixed = [line for line in lines if str(here) not in line and "/pytest-" not in line]
    assert max(map(len, fixed)) <= 100, max(fixed, key=len)  # paths may be of any length
    assert sum(line.startswith("epoch ") for line in lines) == 2


def test_the_same_command_again_shows_the_finished_run(
    here, monkeypatch, synthetic_corpus, capsys, no_pictures
):
    assert run(monkeypatch, "ast", synthetic_corpus, "mlflow.enabled=false") == 0
    best = only_run(here) / "checkpoints" / "best.pt"
    written = best.stat().st_mtime_ns
    capsys.readouterr()
    assert run(monkeypatch, "ast", synthetic_corpus, "mlflow.enabled=false") == 0
    assert best.stat().st_mtime_ns == written
    assert "Score" in capsys.readouterr().out
    again = ("mlflow.enabled=false", "training.resume=never")
    assert run(monkeypatch, "ast", synthetic_corpus, *again) == 0
    assert best.stat().st_mtime_ns > written


@pytest.fixture
def finished(here, monkeypatch, synthetic_corpus, no_pictures, tmp_path) -> Path:
    """The folder of a finished AST run on a corpus that may be changed."""
    corpus = shutil.copytree(synthetic_corpus, tmp_path / "own" / "corpus")
    assert run(monkeypatch, "ast", corpus, "mlflow.enabled=false") == 0
    return only_run(here)


def again(monkeypatch, here: Path, *overrides: str) -> int:
    return run(monkeypatch, "ast", here / "own" / "corpus", "mlflow.enabled=false", *overrides)


def test_each_finished_run_is_published_once(finished, here, monkeypatch, capsys):
    copy, record = here / "checkpoints" / "ast_best.pt", finished / "record.json"
    best = (finished / "checkpoints" / "best.pt").read_bytes()
    assert copy.read_bytes() == best
    assert copy.with_suffix(".md").read_text().startswith("# Model card: AST")
    copy.write_bytes(b"of a later run")
    assert again(monkeypatch, here) == 0
    assert copy.read_bytes() == b"of a later run"
    record.write_text('{"started": "when it was killed, before it was published"}')
    for half in (finished / ".report.json.1.tmp", copy.with_name(f".{copy.name}.1.tmp")):
        half.touch()
    assert again(monkeypatch, here) == 0
    assert copy.read_bytes() == best
    assert not [*here.rglob(".*.tmp")], "what a killed process left is removed"
    assert "was replaced; it was a file that is no checkpoint" in flat(capsys.readouterr().out)
    copy.unlink()
    assert again(monkeypatch, here, "--member-of", str(here)) == 0
    assert not copy.exists(), "members do not replace the plain run's copy"


def flat(text: str) -> str:
    return " ".join(text.split())


def swap_labels(file: Path) -> None:
    rows = [line.split("\t") for line in file.read_text().splitlines()]
    file.write_text("".join("\t".join([*r[:2], str(1 - int(r[2])), r[3]]) + "\n" for r in rows))


def louder(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[5000:6000] = bytes(1000)
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("pattern", "change", "words"),
    [
        ("*_sc_*.txt", swap_labels, "differs in Crackles"),
        ("*.wav", louder, "differs in audio"),
        ("*.wav", lambda file: (file.unlink(), file.with_suffix(".txt").unlink()), "is missing"),
    ],
)
def test_changed_data_are_noticed_after_the_end(
    pattern, change, words, finished, here, monkeypatch, capsys
):
    file = sorted((here / "own" / "corpus").glob(pattern))[0]
    change(file)
    for generated in ("icbhi_metadata.csv", "synthetic_cycles.csv"):
        (here / "own" / "corpus" / generated).unlink(missing_ok=True)
    assert again(monkeypatch, here) == 2
    said = flat(capsys.readouterr().err)
    assert f"holds now: {file.stem} {words}" in said and "training.resume=never" in said


def test_a_run_folder_has_one_owner(here, monkeypatch, synthetic_corpus, capsys):
    words = ("mlflow.enabled=false", "--print-config")
    assert run(monkeypatch, "ast", synthetic_corpus, *words) == 0
    (here / "x.yaml").write_text(capsys.readouterr().out)
    folder = RunFolder.of(load_config([here / "x.yaml"]))
    with held(folder.path):
        assert run(monkeypatch, "ast", synthetic_corpus, "mlflow.enabled=false") == 73
    assert f"in use by process {os.getpid()} on" in flat(capsys.readouterr().err)
    assert not folder.path.exists()


@pytest.mark.parametrize("place", ["utils.runs.start.load_config", "utils.runs.group.Group.finish"])
def test_sigterm_outside_the_loop_ends_with_75(
    place, here, monkeypatch, synthetic_corpus, no_pictures
):
    monkeypatch.setattr(place, lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    words = ("--seeds", "2", "mlflow.enabled=false", "training.epochs=1")
    assert run(monkeypatch, "ast", synthetic_corpus, *words) == 75


def test_seeds_and_folds_are_grouped(here, monkeypatch, synthetic_corpus, capsys, no_pictures):
    common = ("mlflow.enabled=false", "training.epochs=1", "training.selection=fixed")
    assert run(monkeypatch, "ast_grf", synthetic_corpus, "--seeds", "2", *common) == 0
    (group,) = here.glob("runs/*-group-*")
    content = json.loads((group / "group.json").read_text())
    assert content["seeds"] == [0, 1] and content["summary"]["score"]["n"] == 2
    assert not (here / "checkpoints").exists(), "members do not replace the plain run's copy"
    folds = ("--folds", "all", "dataset.split_strategy=foldwise")
    assert run(monkeypatch, "ast_grf", synthetic_corpus, *folds, *common) == 0
    (pooled,) = here.glob("runs/*-group-*/predictions/out_of_fold-s0.csv")
    frame = pd.read_csv(pooled)
    assert frame["cycle"].is_unique and frame["patient"].nunique() == 10
    assert "out-of-fold patients" in capsys.readouterr().out


def test_mlflow_gets_the_run_by_default(here, monkeypatch, synthetic_corpus):
    from mlflow import MlflowClient

    mlflow_config = ("--mlflow-config", str(ROOT / "configs" / "mlflow.yaml"))
    upload = "mlflow.log_checkpoint=true"
    monkeypatch.setattr(tracking, "CLOSING", 100.0)  # creating the database takes long
    assert run(monkeypatch, "ast_film", synthetic_corpus, *mlflow_config, upload) == 0
    client = MlflowClient(f"sqlite:///{here}/mlflow.db")  # MLflow caches stores by address
    experiment = client.get_experiment_by_name("icbhi")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "FiLM-AST 4-class validation s0"
    assert found.info.status == "FINISHED"
    assert {"train/loss", "val/score", "val/sp", "test/score", "lr"} <= set(found.data.metrics)
    assert found.data.params["training.epochs"] == "2"
    assert found.data.params["data.train.cycles"].isdigit()
    assert found.data.tags["partial_data"] == found.data.tags["synthetic"] == "true"
    report = (only_run(here) / "report.md").read_text(encoding="utf-8")
    shown = found.data.tags["mlflow.note.content"]  # what the run's overview shows
    assert report.startswith(shown) and len(shown) > min(len(report), 5000) - 500
    assert report[len(shown) :][:1] in ("", "\n"), "cut between two lines"
    names = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert {"config.yaml", "predictions", "report.json", "figures", "checkpoints"} <= names


def test_a_real_process_without_mlflow_does_not_import_it(here, synthetic_corpus):
    code = (
        "import runpy, sys, utils.runs.end\n"
        "utils.runs.end.draw_figures = lambda *_: None\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert 'mlflow' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    arguments = words("ast", synthetic_corpus, "mlflow.enabled=false", "training.epochs=1")
    program = f"import sys; sys.argv = {arguments!r}; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("dataset.data_folder=nowhere",), "nowhere"),
        (("training.epoch=3",), "did you mean training.epochs?"),
        (("models.ast.label_dim=1",), "models.ast.label_dim=1"),
    ],
)
def test_bad_input_ends_with_status_2_and_writes_nothing(
    overrides, message, here, monkeypatch, synthetic_corpus, capsys
):
    assert run(monkeypatch, "ast", synthetic_corpus, "mlflow.enabled=false", *overrides) == 2
    assert message in capsys.readouterr().err
    leftover = [p for p in here.rglob("*") if p.suffix in (".pt", ".csv", ".json")]
    assert not leftover


def test_an_unknown_option_is_refused_by_name(here, monkeypatch, synthetic_corpus, capsys):
    assert run(monkeypatch, "ast", synthetic_corpus, "--epochs", "3") == 2
    assert "--epochs" in capsys.readouterr().err


def commands_of_the_readme() -> list[list[str]]:
    """Every `python <script> ...` of the README's code blocks, continuation lines joined."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [line.split() for block in blocks for line in block.splitlines() if line.strip()]
    scripts = {script for script, _ in SCRIPTS.values()}
    return [line for line in lines if line[0] == "python" and line[1] in scripts]


def test_the_readmes_training_commands_are_there_and_parse(monkeypatch, capsys):
    commands = commands_of_the_readme()
    assert {words[1] for words in commands} == {script for script, _ in SCRIPTS.values()}
    monkeypatch.chdir(ROOT)
    for command in commands:
        monkeypatch.setattr(sys, "argv", [*command[1:], "--print-config"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(command[1], run_name="__main__")
        assert end.value.code == 0
        assert "data_folder: /path/to/icbhi_dataset" in capsys.readouterr().out
