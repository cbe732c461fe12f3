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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
import torch
import yaml

import evaluate
from data.synthetic.corpus import write_corpus
from models.registry import VARIANTS
from tests.utils.evaluation_tables import cycle_table, finish_run
from tests.utils.tiny import words
from utils.common.errors import Busy, Preempted, UserError
from utils.common.lock import held
from utils.config.schema import config_hash, load_config
from utils.evaluation.result_tables import PUBLISHED_NOTE
from utils.runs import grid as grids
from utils.runs.cells import Cell, read_grid
from utils.runs.pool import Pool, conclude, run_tracked
from utils.runs.processes import described, keep_ending, read_ending, start_process
from utils.runs.run import Run
from utils.runs.start import parse_arguments
from utils.runs.states import estimates, show_list, show_states, state_of
from utils.training.device import Runtime
from utils.training.pace import Pace, PaceMeter, device_name
from utils.training.runfolder import RunFolder

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


class Ended:
    """A cell's process that has ended."""

    def __init__(self, status: int):
        self.poll = self.wait = lambda: status
        self.terminate = lambda: None


def starting(grid, act):
    """Starts cells for a pool: `act`, called with cell and log, gives the exit status at once."""
    cells = {cell.arguments: cell for cell in grid.cells}
    return lambda words, log, _: Ended(act(cells[words], log))


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
    first, *rest = grid.cells
    finish_run(first.config, cycle_table())  # with baselines
    for cell in rest:
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
    assert "| Baseline: class prior |" in honest and "Baseline" not in test
    collapsed = "(4-class model, collapsed)"
    methods = [line.split(" | ")[0].strip("| ") for line in two[RULES[1]].splitlines()[3:]]
    assert methods[: methods.index("TAFiLM-AST")] == [
        "AST", f"AST {collapsed}", "AST + Patch-Mix CL", f"AST + Patch-Mix CL {collapsed}",
        f"AST + SG-SCL {collapsed}", "GRF-AST", "FiLM-AST", f"FiLM-AST {collapsed}",
    ]  # fmt: skip
    (own,) = (n for n in two[RULES[1]].splitlines() if n.startswith("| AST + Patch-Mix CL | "))
    assert own.endswith("| – | – | – |")  # the published figure is of a collapsed model
    assert f"| FiLM-AST {collapsed} |" in two[RULES[0]]
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

    assert run_tracked(grid, starting(grid, start)) == [broken]
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
    assert run_tracked(grid, starting(grid, start)) == []
    assert [cell.label for cell in started] == ["AST trainable_blocks=2 seed=0"]
    table = (grid.folder / "table.md").read_text(encoding="utf-8")
    assert "Backbone freezing" in table and table.strip() in capsys.readouterr().out
    assert f"| AST | 0 | {before:.2f} [" in table
    assert {"table.csv", "table.tex", "grid.json"} <= {p.name for p in grid.folder.iterdir()}
    cells = json.loads((grid.folder / "grid.json").read_text())["cells"]
    assert [cell["run"] for cell in cells] == [c.folder.path.name for c in grid.cells]


@pytest.mark.parametrize(
    ("cell_status", "status", "started"),
    [(75, 75, 1), (130, 130, 1), (-2, 130, 1), (3, 1, 4), (0, 1, 4)],
)  # 0 without a report is a failure
def test_exit_statuses(cell_status, status, started, grid_file, monkeypatch):
    calls = []
    monkeypatch.setattr(
        grids,
        "run_tracked",
        lambda grid, **_: Pool(grid, lambda *_: calls.append(1) or Ended(cell_status)).run(),
    )
    assert grids.main([str(grid_file), "mlflow.enabled=false"]) == status
    assert len(calls) == started
    assert grids.main(["nowhere.yaml"]) == 2


@pytest.fixture
def stubs(grid_file):
    """The grid whose four cells print, say that they are ready, and wait for SIGTERM or `go`."""
    (grid_file.parent / "cell.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "me = str(os.getpid())\n"
        "def stop(*_): print('saved', flush=True); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "pathlib.Path('ready-' + me).write_text(os.environ.get('CUDA_VISIBLE_DEVICES', ''))\n"
        "print('error: no way', flush=True)\n"
        "while not pathlib.Path('go').exists(): time.sleep(0.01)\n"
        "sys.exit(3)\n"
    )
    grid = read_grid(grid_file, overrides=["mlflow.enabled=false"])
    cells = [Cell(c.label, c.config, ("cell.py", c.label)) for c in grid.cells]
    return replace(grid, cells=tuple(cells))


def once_ready(number: int, act):
    """Call `act` in another thread as soon as that many stubs are ready."""

    def watch():
        while len(list(Path().glob("ready-*"))) < number:
            time.sleep(0.01)
        act()

    threading.Thread(target=watch).start()


def test_sigterm_reaches_all_cells(stubs):
    once_ready(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted):
        Pool(stubs, workers=3).run()
    logs = [stubs.log(cell) for cell in stubs.cells]
    assert [log.is_file() and log.read_text() for log in logs] == [
        *["error: no way\nsaved\n"] * 3,
        False,
    ]
    assert [state_of(stubs, cell).name for cell in stubs.cells] == ["pending"] * 4


def test_workers_see_their_gpus_and_failures_stay(stubs, capsys):
    once_ready(2, Path("go").touch)
    assert Pool(stubs, workers=2, gpus=["4", "7"]).run() == list(stubs.cells)
    seen = [path.read_text() for path in Path().glob("ready-*")]
    assert sorted(seen) == ["4", "4", "7", "7"]
    shown = show_states(stubs)
    assert shown.count("failed") == 5 and "status 3: error: no way" in shown
    assert shown.endswith("4 failed")


def test_a_killed_cell_says_so(here):
    script = here / "cell.py"
    script.write_text("import os; os.kill(os.getpid(), 9)")
    process = start_process([str(script)], here / "logs" / "cell.log")
    assert process.wait() == -9 and described(-9) == "SIGKILL (out of memory?)"
    keep_ending(here / "logs" / "cell.log", -9)
    assert read_ending(here / "logs" / "cell.log")["last"].endswith("cell.log is empty")


# -------------------------------------------------------------------- states and estimates


def test_another_processs_cell_is_left_and_waited_for(grid_file, monkeypatch, capsys):
    """It ends there; a second one dies there and is taken over here."""
    monkeypatch.setattr("utils.runs.pool.LOOK", 0.05)
    grid = read_grid(grid_file, overrides=["mlflow.enabled=false"])
    ours, theirs, dying, _ = grid.cells
    started, stack = [], ExitStack()
    for cell in (theirs, dying):
        stack.enter_context(held(cell.folder.path))

    def start(cell, log):
        started.append(cell)
        if len(started) == 2:  # the others of the first round
            finish(theirs)
            stack.close()
        finish(cell)
        return 0

    assert state_of(grid, theirs).name == "running"
    assert f"process {os.getpid()} on " in show_states(grid)
    assert Pool(grid, starting(grid, start)).run() == []
    assert theirs not in started and started[-1] is dying and started[0] is ours
    printed = capsys.readouterr().out
    assert printed.count("another process is at work on it") == 2


def test_two_pools_never_run_a_cell_twice(grid_file, monkeypatch):
    """Both start the same cell: its lock decides, and the other one waits."""
    monkeypatch.setattr("utils.runs.pool.LOOK", 0.05)
    grid = read_grid(grid_file, overrides=["mlflow.enabled=false"])
    done, first = [], Barrier(2)

    def start(cell, log):
        if cell is grid.cells[0] and len(done) == 0:
            first.wait()  # both have seen it pending
        try:
            with held(cell.folder.path):
                if cell.folder.finished:
                    raise Busy("")
                done.append(cell.label)
                time.sleep(0.05)
                finish(cell)
        except Busy:
            return 73
        return 0

    monkeypatch.setattr("utils.runs.pool.sigterm_reaches", lambda _: nullcontext(lambda: False))
    with ThreadPoolExecutor(2) as threads:
        pools = [Pool(grid, starting(grid, start)) for _ in range(2)]
        assert [pool.result() for pool in [threads.submit(p.run) for p in pools]] == [[], []]
    assert sorted(done) == sorted(cell.label for cell in grid.cells)


def test_only_one_process_keeps_the_grid(grid_file, caplog):
    grid = read_grid(grid_file, overrides=["mlflow.enabled=false"])
    with held(grid.folder):
        assert conclude(grid) is False and not (grid.folder / "grid.json").exists()
    assert conclude(grid) is True and (grid.folder / "grid.json").is_file()


def test_a_changed_grid_keeps_equal_cells(grid_file):
    grid = read_grid(grid_file)
    finish(grid.cells[1])
    grid_file.write_text(GRID.replace("[0, 2]", "[1, 2, 3]"))
    changed = read_grid(grid_file)
    assert changed.folder != grid.folder
    states = [state_of(changed, cell).name for cell in changed.cells]
    assert states == ["pending", "finished", "pending", *["pending"] * 3]


def test_list_estimates_from_what_was_measured(grid_file, monkeypatch):
    grid = read_grid(
        grid_file,
        overrides=["training.epochs=4", "training.warmup_epochs=1", "mlflow.enabled=false"],
    )
    assert "not measured: no cell has trained here" in show_list(grid)
    assert show_list(grid).count("not measured") == 5
    pace = {"device": device_name(), "step": 1.0, "epoch": 30.0, "memory": 2_000_000_000}
    first = grid.cells[0].folder
    first.write_record(pace=pace | {"device": "another"})
    assert show_list(grid).count("not measured") == 5
    first.write_record(pace=pace)
    first.write_metrics([{"epoch": 0.0, "val_score": float("nan")}])
    lines = show_list(grid, workers=2).splitlines()
    assert lines[0].split()[1:6] == ["pending", "2", "min,", "2.0", "GB"]
    assert lines[1].split()[2:4] == ["~2", "min,"]
    assert lines[-1].strip().startswith("8 min in all, 8 min of it left, 4 min with 2 workers")
    assert [round(left) for _, left, *_ in estimates(grid.cells, device_name())] == [
        90, 120, 120, 120,
    ]  # fmt: skip


def test_a_run_measures_its_pace(tmp_path, monkeypatch):
    """After the first minute, and with its evaluation at the end of an epoch."""
    clock = iter([0.0, 10.0, 30.0, 61.0, 66.0, 1000.0])
    monkeypatch.setattr("utils.training.pace.time.monotonic", lambda: next(clock))
    folder = RunFolder(tmp_path / "run")
    meter = PaceMeter(folder, torch.device("cpu"), steps=10)
    meter.start()
    for _ in range(2):
        meter.step()
    assert Pace.of(folder) is None, "no minute has passed"
    meter.step()  # 20 and 31 s after the first
    assert Pace.of(folder).epoch == 10 * 25.5
    meter.end()
    found = Pace.of(folder)
    assert (found.step, found.epoch) == (25.5, 260.0) and found.memory > 10_000_000


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

    assert run_tracked(grid, starting(grid, start)) == []
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
