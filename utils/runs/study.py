"""What a search tries: the space, Optuna's study, and the run of each trial."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from utils.common.errors import UserError
from utils.common.lock import held, owner_of
from utils.config.merge import merge, read_yaml
from utils.runs.cells import Cell, digest, found, make_cells, word

SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler", "gp": "GPSampler", "qmc": "QMCSampler"}
PRUNERS = {"none": "NopPruner", "median": "MedianPruner", "hyperband": "HyperbandPruner"}
PRUNERS |= {"halving": "SuccessiveHalvingPruner"}


@dataclass
class SpaceFile:
    """What a file of a search holds."""

    script: str = ""
    configs: list[str] = field(default_factory=list)
    overrides: dict[str, Any] = field(default_factory=dict)  # key: value, in every trial
    # key: a list of values, or {low, high} with log: true or step: n
    space: dict[str, Any] = field(default_factory=dict)
    sampler: str = "tpe"
    pruner: str = "none"
    seed: int = 0  # of the sampler

    @classmethod
    def read(cls, file: str | Path) -> SpaceFile:
        """Raises UserError: the file, a key or the kind of a value is wrong."""
        merged = merge(OmegaConf.structured(cls), read_yaml(file), f"in {file}")
        content = cls(**OmegaConf.to_container(merged))
        if not content.script or not content.configs or not content.space:
            raise UserError(f"{file}: script, configs and space must be given")
        for name, given, known in (
            ("sampler", content.sampler, SAMPLERS),
            ("pruner", content.pruner, PRUNERS),
        ):
            if given not in known:
                raise UserError(f"{file}: no {name} {given!r}; there are {', '.join(known)}")
        for key, values in content.space.items():
            bounds = isinstance(values, dict) and {"low", "high"} <= set(values)
            bounds = bounds and set(values) <= {"low", "high", "log", "step"}
            if not bounds and not (isinstance(values, list) and values):
                raise UserError(
                    f"{file}: space.{key} must be a list, or low and high (with log or step)"
                )
        return content


@dataclass
class Task:
    """A cell to train; `trial` is Optuna's, None for the runs after the search."""

    cell: Cell
    trial: Any = None
    words: tuple[str, ...] = ("--validate-only",)  # in addition to the cell's
    process: Any = None
    slot: int = 0
    epochs: int = 0  # told to Optuna
    pruned: bool = False

    @property
    def title(self) -> str:
        return f"trial {self.trial.number}" if self.trial else self.cell.label

    @property
    def score(self) -> float | None:
        """Validation Score in percent; None before the training has ended."""
        return (self.cell.folder.read_record().get("validation") or {}).get("score")


class Study:
    """A search, its folder and its trials.

    Args:
        file: YAML with the keys of `SpaceFile`.
        trials: how many there shall be, whatever becomes of them.

    Raises:
        UserError: the file or a key is wrong, the objective would not be of validation patients,
            or Optuna is missing.
    """

    def __init__(
        self,
        file: str | Path,
        trials: int,
        *,
        config_files: Sequence[str] = (),
        mlflow_file: str | None = None,
        overrides: Sequence[str] = (),
    ):
        if importlib.util.find_spec("optuna") is None:
            raise UserError("a search needs Optuna; run pip install optuna")
        self.content, self.wanted, self.mlflow_file = SpaceFile.read(file), trials, mlflow_file
        self.files = [*map(found, self.content.configs), *config_files]
        self.fixed = [word(key, value) for key, value in self.content.overrides.items()]
        self.fixed += overrides
        for key in ("dataset.val_seed", "training.selection"):
            if key in self.content.space:
                raise UserError(f"space.{key} would search for a flattering split; leave it out")
        self.base = self.cell([]).config
        selection = self.base.training.selection
        if selection != "validation":
            raise UserError(
                f"training.selection={selection} cannot be searched with: the best of many Scores "
                "of the test half says nothing about new patients, and without validation patients "
                "there is no Score; use selection=validation, whose winner is tested once"
            )
        self.name = Path(file).stem
        parts = [self.cell([]).folder.path.name, json.dumps(self.content.space, sort_keys=True)]
        name = f"search-{self.name}-{digest([*parts, self.content.sampler, self.content.pruner])}"
        self.folder = Path(self.base.training.output_dir) / name

    def cell(self, words: Sequence[str]) -> Cell:
        """The run with these key=value words."""
        seed = [w for w in self.fixed if w.startswith("training.seed=")]
        fixed = [w for w in self.fixed if w not in seed]
        number = int(seed[-1].partition("=")[2]) if seed else 0
        every = [*fixed, *words]
        (one,) = make_cells(
            self.content.script, self.files, every, [number], self.mlflow_file, shown=words
        )
        return one

    # ---------------------------------------------------------------- the study

    def open(self) -> Any:
        """Optuna's study, created if need be."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder.mkdir(parents=True, exist_ok=True)
        # processes with the same seed would try the same points
        seed = self.content.seed + os.getpid() % 1000
        sampler = getattr(optuna.samplers, SAMPLERS[self.content.sampler])
        with held(self.folder / "study.db", "the study", wait=60):
            self.study = optuna.create_study(
                storage=f"sqlite:///{(self.folder / 'study.db').resolve()}",
                study_name=self.name,
                direction="maximize",
                sampler=sampler(seed=seed),
                pruner=getattr(optuna.pruners, PRUNERS[self.content.pruner])(),
                load_if_exists=True,
            )
        return self.study

    def suggest(self, trial: Any) -> Task:
        """The run of a trial: its parameters, as they were if it has been asked before."""
        words = []
        for key, values in self.content.space.items():
            if isinstance(values, list):
                value = json.loads(trial.suggest_categorical(key, list(map(json.dumps, values))))
            else:
                low, high, step = values["low"], values["high"], values.get("step")
                whole = all(isinstance(v, int) for v in (low, high, step or 1))
                log = values.get("log", False)
                if whole:
                    value = trial.suggest_int(key, low, high, step=step or 1, log=log)
                else:
                    value = float(f"{trial.suggest_float(key, low, high, step=step, log=log):.4g}")
            words.append(word(key, value))
        return Task(self.cell(words), trial)

    def next(self, own: Sequence[Task]) -> Task | None:
        """A trial that nobody works on, or a new one; None if there is none to start now."""
        import optuna

        mine = {task.trial.number for task in own if task.trial}
        with held(self.folder / "study.db", "the study", wait=60):
            trials = self.study.get_trials(deepcopy=False)
            for one in trials:
                if one.state == optuna.trial.TrialState.RUNNING and one.number not in mine:
                    task = self.suggest(optuna.trial.Trial(self.study, one._trial_id))
                    if task.score is not None or owner_of(task.cell.folder.path) is None:
                        return task
            if len(trials) >= self.wanted:
                return None
            try:
                return self.suggest(self.study.ask())
            except UserError as error:
                raise UserError(f"a point of the space is refused: {error}") from None

    def unfinished(self) -> bool:
        """Whether trials are open, or still to come."""
        import optuna

        trials = self.study.get_trials(deepcopy=False)
        running = any(t.state == optuna.trial.TrialState.RUNNING for t in trials)
        return running or len(trials) < self.wanted

    def best(self) -> Task:
        """The run of the best trial, without the option that keeps the test half closed."""
        import optuna

        try:
            trial = self.study.best_trial
        except ValueError:
            raise UserError(f"no trial of {self.folder} was completed; see its logs") from None
        task = self.suggest(optuna.trial.FixedTrial(trial.params, trial.number))
        return Task(task.cell, words=())
