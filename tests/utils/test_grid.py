"""Grid files: their cells and commands, skipping, failing, stopping, resuming, the table."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

import evaluate
from data.synthetic.corpus import write_corpus
from models.registry import VARIANTS
from tests.utils.evaluation_tables import finish_run
from tests.utils.tiny import words
from utils.common.errors import UserError
from utils.config.schema import config_hash, load_config
from utils.evaluation.result_tables import PUBLISHED_NOTE
from utils.runs import grid as grids
from utils.runs.grid import Cell, read_grid, run_grid, run_tracked, start_process
from utils.runs.run import Run
from utils.runs.start import parse_arguments
from utils.training.device import Runtime

ROOT = Path(__file__).resolve().parents[2]
RULES = ("selected on validation patients", "SELECTED ON TEST")
FREEZING = ROOT / "configs" / "ablations" / "freezing.yaml"
SHIPPED = {"ablations/freezing": 20, "ablations/conditioned_layers": 3, "grids/methods": 25}
SHIPPED |= {"grids/mvst": 5, "grids/leaderboard": 52}
GRID = """
table: freezing
scripts:
  ast_train.py: configs/ast_config.yaml
  ast_meta_fus_train.py: configs/ast_fus_config.yaml
grid:
  backbone.trainable_blocks: [0, 2]
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def grid_file(here) -> Path:
    file = here / "small.yaml"
    file.write_text(GRID)
    return file


def small(**overrides) -> list[str]:
    """Overrides that make every cell tiny; `trainable_blocks` is the grid's."""
    sizes = {"models.*.input_fdim": "null", "models.*.input_tdim": "null"}  # those of the dataset
    found = words(**{"dataset.data_folder": "corpus", **sizes, **overrides})
    return [word for word in found if not word.startswith("backbone.trainable_blocks")]


def finish(cell: Cell, seed: int = 0) -> float:
    """Finish a cell; returns its test Score."""
    report = finish_run(cell.config, seed=seed).read_report()
    return report["test"]["metrics"]["chosen"]["score"]["value"]


# -------------------------------------------------------------------- cells and commands


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_grids_are_sound(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    grid = read_grid(f"configs/{name}.yaml", overrides=["dataset.data_folder=DIR"])
    assert len(grid.cells) == SHIPPED[name] == len({c.folder.path for c in grid.cells})
    commands = list(zip(grid.cells, grid.commands(), strict=True))
    for cell, line in commands[:: 5 if len(commands) > 30 else 1]:
        python, script, *arguments = shlex.split(line)
        assert python == "python" and (ROOT / script).is_file()
        options = parse_arguments("", arguments)
        # the command alone makes the very run of the cell, and it is for this script
        config = load_config(options.config, options.overrides, variant=cell.config.variant)
        assert config_hash(config) == config_hash(cell.config)
        assert options.member_of == grid.folder
        assert f'VARIANT = "{config.variant}"' in (ROOT / script).read_text()
    if name == "grids/methods":
        names = [c.config.title for c in grid.cells]
        added = ["", " + Patch-Mix CL", " + SG-SCL", " + DAT", " + PAFA"]
        assert names == [v.title + method for v in list(VARIANTS.values())[:5] for method in added]
    elif name == "grids/mvst":
        patches = [(c.config.backbone.patch, c.config.dataset.h) for c in grid.cells]
        assert patches == [((16 << n, 16 >> n), 256) for n in range(5)]
        assert "patch_size=[32,8] freq_stride=32" in grid.cells[1].label
    elif name == "grids/leaderboard":
        titles = [c.config.title for c in grid.cells]
        assert titles[::4] == list(dict.fromkeys(titles)) and len(titles[::4]) == 13
    elif name == "ablations/freezing":
        cells = [(c.config.variant, c.config.backbone.trainable_blocks) for c in grid.cells]
        assert cells == [(v, n) for v in list(VARIANTS)[:5] for n in (0, 4, 8, 12)]
    else:
        layers = [c.config.model.conditioned_layers for c in grid.cells]
        assert layers == [list(range(first, 12)) for first in (10, 6, 0)]


def test_the_leaderboard_keeps_the_rules_apart(here, capsys):
    """Three systems x both tasks x two rules: two tables a rule, published rows with their like."""
    words = yaml.safe_load((ROOT / "configs" / "grids" / "leaderboard.yaml").read_text())
    words["systems"] = [words["systems"][n] for n in (0, 1, 10)]  # AST, Patch-Mix CL, FiLM
    (here / "excerpt.yaml").write_text(yaml.safe_dump(words, sort_keys=False))
    layers = "models.*.conditioned_layers=all"
    grid = read_grid("excerpt.yaml", overrides=[*small(), layers])
    for cell in grid.cells:
        finish(cell)
    assert run_tracked(grid, None) == []
    tables = dict(
        re.findall(r"^### (.*?)\n(.*?)(?=^### |\Z)", capsys.readouterr().out, re.M | re.S)
    )
    assert [title.partition(" (")[0] for title in tables] == [
        f"Leaderboard, {n}-class" for n in (4, 4, 2, 2)
    ]
    four, two = (
        {
            rule: next(t for head, t in tables.items() if n in head and rule in head)
            for rule in RULES
        }
        for n in ("4-class", "2-class")
    )
    honest, test = (four[rule] for rule in RULES)
    row = next(line for line in test.splitlines() if line.startswith("| AST + Patch-Mix CL |"))
    assert "n = 1" in row and row.endswith("| 81.66 ± 3.83 | 43.07 ± 2.80 | 62.37 ± 0.61 |")
    assert "| AST + Patch-Mix CL |" in honest and "62.37" not in honest
    assert "| M2D2 |" in honest and "M2D2" not in test
    assert "| MVST (split: recordings shuffled) |" in test and "MVST" not in honest
    assert "| FiLM-AST (4-class model, collapsed) |" in two[RULES[0]]
    assert "selected on test" not in honest.lower().replace(PUBLISHED_NOTE.lower(), "")


def test_seeds_and_words_reach_every_cell(grid_file):
    (grid_file.parent / "more.yaml").write_text("training:\n  epochs: 70\n")
    grid = read_grid(
        grid_file, seeds=[2], config_files=["more.yaml"], overrides=["training.lr=1e-3"]
    )
    assert [c.label for c in grid.cells][:3] == [
        "AST trainable_blocks=0 seed=0", "AST trainable_blocks=0 seed=1",
        "AST trainable_blocks=2 seed=0",
    ]  # fmt: skip
    assert len(grid.cells) == 8
    for cell in grid.cells:
        assert (cell.config.training.epochs, cell.config.training.lr) == (70, 1e-3)
    assert read_grid(grid_file, seeds=[5]).folder != grid.folder


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        (("table: freezing", "table: freezin"), [], "no table 'freezin'; there are 4-class"),
        (("grid:", "grids:"), [], "unknown configuration key grids; did you mean grid?"),
        (("[0, 2]", "0"), [], "grid.backbone.trainable_blocks must be a list"),
        (("trainable_blocks", "trainable_block"), [], "did you mean backbone.trainable_blocks?"),
        (("[0, 2]", "[0, x]"), [], "ast_train.py trainable_blocks=x seed=0: backbone"),
        (("ast_train.py", "ast_trian.py"), [], "no file ast_trian.py"),
        (("scripts:", "overrides:"), [], "scripts is missing"),
        (("table:", "table: ["), [], "not readable YAML"),
        (("grid:", "configs: [configs/mixup.yaml]\ngrid:"), [], "no file configs/mixup.yaml"),
        (("", ""), ["backbone.trainable_blocks=4"], "is set by the grid"),
        (("", ""), ["training.seed=4"], "is set by --seeds"),
    ],
)  # fmt: skip
def test_a_wrong_grid_is_refused_first(change, overrides, message, grid_file):
    grid_file.write_text(GRID.replace(*change) if change[0] else GRID)
    with pytest.raises(UserError) as error:
        read_grid(grid_file, overrides=overrides)
    assert message in str(error.value)
    assert sorted(p.name for p in grid_file.parent.iterdir()) == ["small.yaml"]


def test_dry_run_prints_commands_and_runs_nothing(grid_file, capsys):
    given = [str(grid_file), "training.lr=1e-3", "--dry-run", "--seeds", "0", "1"]
    assert grids.main(given) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 8 and all(line.startswith("python ") for line in lines)
    assert all("training.lr=1e-3" in line for line in lines)
    assert "8 cells, 0 of them finished" in printed.err
    assert sorted(p.name for p in grid_file.parent.iterdir()) == ["small.yaml"]


# -------------------------------------------------------------------- running


def test_finished_cells_are_skipped_and_failing_ones_passed_by(grid_file, capsys, caplog):
    grid = read_grid(grid_file, overrides=["mlflow.enabled=false"])
    first, broken, *rest = grid.cells
    before = finish(first)
    started = []

    def start(cell, log):
        started.append(cell)
        if cell is broken:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("epoch 1\nerror: the gradient was not finite\n    lower training.lr\n")
            return 2
        finish(cell, seed=len(started))
        return 0

    assert run_tracked(grid, start) == [broken]
    assert started == [broken, *rest]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    mark = "(selected on validation patients; SYNTHETIC RECORDINGS)"
    assert lines[0] == f"[1/4] {first.label}: Score {before:.2f} {mark}, finished before"
    assert lines[1].startswith(f"[2/4] {broken.label}: FAILED with status 2, see ")
    for cell, line in zip(rest, lines[2:], strict=True):
        assert cell.label in line and f": {cell.score()}, " in line
    assert "error: the gradient was not finite\n    lower training.lr" in caplog.text
    # the same command again runs what is missing, and then the table is whole
    broken, started[:] = None, []
    assert run_tracked(grid, start) == []
    assert [cell.label for cell in started] == ["AST trainable_blocks=2 seed=0"]
    table = (grid.folder / "table.md").read_text(encoding="utf-8")
    assert "Backbone freezing" in table and table.strip() in capsys.readouterr().out
    assert f"| AST | 0 | {before:.2f} [" in table
    assert {"table.csv", "table.tex", "grid.json"} <= {p.name for p in grid.folder.iterdir()}
    cells = json.loads((grid.folder / "grid.json").read_text())["cells"]
    assert [cell["run"] for cell in cells] == [c.folder.path.name for c in grid.cells]


@pytest.mark.parametrize(
    ("cell_status", "status", "started"),
    [(75, 75, 1), (130, 130, 1), (-2, 130, 1), (3, 1, 4), (0, 1, 4), (73, 0, 4)],
)  # 0 without a report is a failure; 73: another process is at work on the cell
def test_exit_statuses(cell_status, status, started, grid_file, monkeypatch):
    calls = []
    monkeypatch.setattr(
        grids, "run_tracked", lambda grid: run_grid(grid, lambda *_: calls.append(1) or cell_status)
    )
    assert grids.main([str(grid_file), "mlflow.enabled=false"]) == status
    assert len(calls) == started
    assert grids.main(["nowhere.yaml"]) == 2


def test_sigterm_reaches_the_cell_and_its_state_counts(here):
    script = here / "cell.py"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "def stop(*_): print('saved', flush=True); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "pathlib.Path('ready').touch()\n"
        "time.sleep(60)\n"
    )

    def terminate():
        while not (here / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    cell = Cell("stub", None, (str(script),))
    began = time.monotonic()
    assert start_process(cell, here / "logs" / "cell.log") == 75
    assert time.monotonic() - began < 30
    assert (here / "logs" / "cell.log").read_text() == "saved\n"
    script.write_text("import sys; sys.exit('error: no')")
    assert start_process(cell, here / "logs" / "cell.log") == 1
    assert (here / "logs" / "cell.log").read_text() == "saved\nerror: no\n"


# -------------------------------------------------------------------- the whole thing


def test_methods_and_variants_end_in_one_table(here, synthetic_corpus, monkeypatch, capsys):
    """FiLM without a method and with PAFA, each trained for an epoch in this process."""
    monkeypatch.setattr("utils.runs.end.draw_figures", lambda *_: None)
    words = yaml.safe_load((ROOT / "configs" / "grids" / "methods.yaml").read_text())
    words["scripts"] = dict(list(words["scripts"].items())[2:3])
    words["configs"] = [words["configs"][0], words["configs"][-1]]
    (here / "excerpt.yaml").write_text(yaml.safe_dump(words, sort_keys=False))
    folder = {"dataset.data_folder": synthetic_corpus, "dataset.store_workers": 1}
    overrides = small(**folder, **{"training.epochs": 1, "dataset.cycle_metadata_path": "null"})
    overrides = [word for word in overrides if not word.startswith("dataset.batch_size")]
    overrides.append("models.*.conditioned_layers=all")
    grid = read_grid("excerpt.yaml", overrides=[*overrides, "backbone.trainable_blocks=2"])

    def start(cell, log):
        with Run(cell.config, Runtime("cpu", "fp32", "false"), grid.folder) as run:
            data = run.data()
            run.test(run.fit(run.model(data), data))
        return 0

    assert run_tracked(grid, start) == []
    table = (grid.folder / "table.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    scores = [cell.score().split()[1] for cell in grid.cells]
    assert rows[0] == ["| Variant", "none", "PAFA |"]
    assert [cell.split()[0] for cell in rows[1][1:]] == scores and rows[1][0] == "| FiLM-AST"
    assert "PAFA: dataset.batch_size=32, unlike the runs without a method" in table
    assert "# FiLM-AST + PAFA: test part" in (grid.cells[1].folder.path / "report.md").read_text()


@pytest.mark.slow
def test_a_grid_resumes_and_nests_its_cells_in_mlflow(here, monkeypatch, capsys):
    """One cell is there, the other one runs as a process of its own, like under a scheduler."""
    from mlflow import MlflowClient

    write_corpus(here / "corpus", patients=9)
    (here / "one.yaml").write_text(GRID.replace("  ast_train.py: configs/ast_config.yaml\n", ""))
    overrides = small(**{"training.epochs": 1, "mlflow.enabled": True, "dataset.store_workers": 1})
    overrides.append("dataset.cycle_metadata_path=null")
    done, cell = read_grid("one.yaml", overrides=overrides).cells
    finish(done)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert grids.main(["one.yaml", *overrides]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert "finished before" in lines[0] and f": {cell.score()}, " in lines[1]
    assert cell.score().endswith("; PARTIAL DATA; SYNTHETIC RECORDINGS)")
    assert not (here / "checkpoints").exists(), "cells do not replace the plain run's copy"

    client = MlflowClient("sqlite:///mlflow.db")
    experiment = client.get_experiment_by_name("icbhi").experiment_id
    runs = client.search_runs([experiment])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.run_name == "ablation one: 2 runs" and parent.info.status == "FINISHED"
    (child,) = [run for run in runs if run is not parent]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.params["backbone.trainable_blocks"] == "2"
    assert "grid.json" in {file.path for file in client.list_artifacts(parent.info.run_id)}

    # an evaluation later adds to the cell's run, whose status and times stay
    monkeypatch.setattr("utils.figures.runs.evaluation_figures", lambda *_: [])
    words = ["--checkpoint", str(cell.folder.best), "--no-metadata-test"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    assert evaluate.main() == 0
    after = client.get_run(child.info.run_id)
    assert (after.info.status, after.info.end_time) == ("FINISHED", child.info.end_time)
    assert after.data.metrics["evaluation_test/score"] == after.data.metrics["test/score"]
    names = {file.path for file in client.list_artifacts(child.info.run_id, "evaluation/test")}
    assert {"evaluation/test/report.json", "evaluation/test/predictions.csv"} <= names
    assert len(client.search_runs([experiment])) == 2
