"""Searches: validation patients only, resumed, pruned; the test half is opened for the winner."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from data.synthetic.corpus import write_corpus
from tests.utils.evaluation_tables import finish_run
from tests.utils.test_grid import Ended, small
from utils.common.errors import UserError
from utils.runs.run import Run
from utils.runs.search import Search, Task
from utils.training.device import Runtime
from utils.training.trainer import Trainer

SPACE = """
script: ast_film_train.py
configs: [configs/ast_film_config.yaml]
space:
  training.lr: {low: 1.0e-4, high: 1.0e-2, log: true}
  training.loss: [bce, focal]
"""
WORDS = ["mlflow.enabled=false"]


@pytest.fixture
def space(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.runs.search.POLL", 0.001)
    file = tmp_path / "space.yaml"
    file.write_text(SPACE)
    return file


class Runs:
    """Stands for the processes of a search: each trains at once, the number `stop_at` is killed."""

    def __init__(self, monkeypatch, stop_at: int = -1, status: int = 130):
        self.scores, self.tested, self.started, self.stop_at = {}, [], [], stop_at
        self.status = status
        runs = self
        monkeypatch.setattr(Search, "_start", lambda _, task, gpus: runs.train(task))

    def train(self, task: Task) -> None:
        self.started.append(task.cell)
        if len(self.started) - 1 == self.stop_at:
            task.process = Ended(self.status)
            return
        config, folder = task.cell.config, task.cell.folder
        # peaks at lr=1e-3; three points less with other validation patients
        score = 60 - 1e3 * abs(config.training.lr - 1e-3) - 3 * (config.dataset.val_seed > 0)
        if "--validate-only" in task.words:
            folder.prepare(config, fresh=False)
            folder.write_record(validation={"score": score, "epoch": 0})
            folder.checkpoints.mkdir(exist_ok=True)
            folder.last.write_bytes(b"state")
            self.scores[folder.path.name] = score
        else:
            self.tested.append(folder.path.name)
            folder.checkpoints.rename(folder.path / "before")
            finish_run(config)
        task.process = Ended(0)


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (("", ""), ["training.selection=test"], "the best of many Scores of the test half says"),
        (("", ""), ["training.selection=fixed"], "without validation patients there is no Score"),
        (("training.loss: [bce", "dataset.val_seed: [1"), [], "would search for a flattering"),
        (("script", "sampler: cma\nscript"), [], "no sampler 'cma'; there are tpe, random"),
        (("[bce, focal]", "bce"), [], "space.training.loss must be a list, or low and high"),
        (("script: ast_film_train.py", ""), [], "script, configs and space must be given"),
    ],
)
def test_what_would_cheat_or_fail_is_refused(change, words, message, space):
    space.write_text(SPACE.replace(*change) if change[0] else SPACE)
    with pytest.raises(UserError, match=re.escape(message)):
        Search(space, 3, overrides=[*WORDS, *words])
    assert sorted(p.name for p in space.parent.iterdir()) == ["space.yaml"]


def test_an_interrupted_search_resumes_its_open_trial(space, monkeypatch, capsys):
    search = Search(space, 4, overrides=WORDS)
    before = Runs(monkeypatch, stop_at=2)
    with pytest.raises(KeyboardInterrupt):
        search.run()
    after = Runs(monkeypatch)
    search = Search(space, 4, overrides=WORDS)
    search.run()
    assert after.started[0].folder.path == before.started[2].folder.path, "same parameters"
    assert not set(after.scores) & set(before.scores), "no trial was trained twice"
    trials = search.study.trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 4
    scores = before.scores | after.scores
    assert search.study.best_value == max(scores.values())
    (tested,) = after.tested
    assert search.study.best_value == scores[tested], "the winner's test half, nobody else's"
    kept = [path.parents[1].name for path in Path("runs").glob("*/checkpoints/last.pt")]
    assert len(kept) <= 1 + 3  # repeated with other validation seeds
    text = (search.folder / "report.md").read_text()
    validation, test = text.split("## Test patients")
    assert "Optimism: **+3.00** points." in validation and "mean" in validation
    assert "Opened once" in test and "Optimism" not in test
    assert text.strip() in capsys.readouterr().out
    started = len(after.started)
    Search(space, 4, overrides=WORDS).run()
    assert len(after.started) == started, "nothing runs again"


def test_a_killed_trial_is_tried_again_but_not_for_ever(space, monkeypatch):
    search = Search(space, 1, overrides=WORDS)
    runs = Runs(monkeypatch)
    monkeypatch.setattr(runs, "train", lambda task: _kill(runs, task))
    with pytest.raises(UserError, match=r"no trial of .* was completed"):
        search.run()
    assert len(runs.started) == 3
    assert [trial.state.name for trial in search.study.trials] == ["FAIL"]


def _kill(runs: Runs, task: Task) -> None:
    runs.started.append(task.cell)
    task.process = Ended(-9)


def test_a_hopeless_trial_is_pruned(space, monkeypatch):
    """The sixth one, by the median of the five before."""
    space.write_text(SPACE + "pruner: median\n")
    search, numbers = Search(space, 6, overrides=WORDS), []

    class Slow(Ended):
        def __init__(self):
            self.status = None
            self.poll = self.wait = lambda: self.status

        def terminate(self):
            self.status = 75

    def start(_, task, gpus):
        folder = task.cell.folder
        if task.trial:
            numbers.append(task.trial.number)
        hopeless = len(numbers) == 6 and task.trial
        folder.prepare(task.cell.config, fresh=False)
        score = 10.0 if hopeless else 50.0 + len(numbers)
        folder.write_metrics([{"epoch": 0.0, "val_score": score}])
        task.process = Slow() if hopeless else Ended(0)
        if not hopeless:
            folder.write_record(validation={"score": score, "epoch": 0})
        if not task.words:
            finish_run(task.cell.config)

    monkeypatch.setattr(Search, "_start", start)
    search.run()
    assert [t.state.name for t in search.study.trials] == ["COMPLETE"] * 5 + ["PRUNED"]
    assert search.study.trials[5].intermediate_values == {0: 10.0}
    assert "5 complete, 1 pruned of 6 trials" in (search.folder / "report.md").read_text()


@pytest.mark.slow
def test_the_test_half_stays_closed_until_it_is_asked(tmp_path, monkeypatch):
    """A real run that is validated only, then tested by the same configuration."""
    from utils.runs.cells import make_cells

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.runs.end.draw_figures", lambda *_: None)
    write_corpus(tmp_path / "corpus", patients=9)
    words = small(**{"training.epochs": 1, "dataset.cycle_metadata_path": "null"})
    words += ["dataset.store_workers=1", "models.*.conditioned_layers=all"]
    files = ["configs/ast_film_config.yaml"]
    root = Path(__file__).resolve().parents[2]
    (cell,) = make_cells("ast_film_train.py", [str(root / f) for f in files], words, [0])

    def train(**options) -> Run:
        with Run(cell.config, Runtime("cpu", "fp32", "false"), tmp_path / "x", **options) as run:
            data = run.data()
            run.test(run.fit(run.model(data), data))
        return run

    folder = train(validate_only=True).folder
    assert not folder.predictions.exists() and not folder.finished and folder.last.is_file()
    validated = folder.read_record()["validation"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", None)  # its training is over
        train()
    report = json.loads(folder.report.read_text())
    assert report["epoch"] == validated["epoch"]
    score = report["val"]["metrics"]["chosen"]["score"]["value"]
    assert score == pytest.approx(validated["score"])
    cell.config.training.selection = "test"
    with pytest.raises(UserError, match=r"--validate-only needs training\.selection=validation"):
        train(validate_only=True)
