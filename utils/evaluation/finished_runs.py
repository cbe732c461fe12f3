"""Finished run folders, and the groups of them that differ in the training seed only."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from data.splits import N_FOLDS
from data.task import Task
from models.config import resolve_layers
from utils.common.errors import UserError
from utils.common.files import check_sum
from utils.common.readers import read_results, understood
from utils.config.schema import NOT_HASHED, flatten
from utils.evaluation.report import RunReport, ranking, read_report
from utils.metrics.bootstrap import (
    Interval,
    SeedSummary,
    macro_auroc_bootstrap,
    over_seeds,
    patient_bootstrap,
)
from utils.metrics.predictions import read_predictions
from utils.metrics.protocol import Selection

log = logging.getLogger(__name__)

#: Files that mark a folder among the run folders: a group of seeds or folds, a grid, a comparison.
COLLECTIONS = ("group.json", "comparison.json", "grid.json", "tracking.json")


#: Split of the pooled out-of-fold predictions.
POOLED = "foldwise, all folds pooled"


class Protocol(NamedTuple):
    """What must be equal before two values may be put into one column."""

    selection: str
    split: str
    partial: bool
    synthetic: bool
    leaky: bool
    train_cycles: int | None  # None: pooled folds, each with its own training cycles
    test_cycles: int
    test_patients: int


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, report and configuration (config.yaml, flat).

    The folds of one seed that a group has pooled count as one run, whose `test_fold` is None.
    """

    path: Path
    report: RunReport
    config: dict[str, Any]

    @property
    def protocol(self) -> Protocol:
        """Selection rule, split and data of this run."""
        report, counts = self.report, self.report.test.counts
        split = self.config["dataset.split_strategy"]
        if split == "foldwise":
            fold = self.config["dataset.test_fold"]
            split = POOLED if fold is None else f"foldwise, fold {fold}"
        elif split in ("random", "training_half"):
            split = f"{split}, seed {self.config['dataset.split_seed']}"
        elif split == "leave_device_out":
            split = f"leave_device_out, {self.config['dataset.test_device']}"
        return Protocol(
            report.selection,
            split,
            report.partial,
            report.synthetic,
            report.leaky,
            None if split == POOLED else report.counts["train"]["cycles"],
            counts["cycles"],
            counts["patients"],
        )

    @cached_property
    def setting(self) -> dict[str, str]:
        """Every key that can change the result, but for the seed and what is in `Protocol` or in
        the title; those of the variant's own section as `models.*.<key>`."""
        own = f"models.{self.report.variant}."
        out = {}
        for key, value in self.config.items():
            if key.startswith(("mlflow.", "models.")) and not key.startswith(own):
                continue
            if self.config.get("fusion.members") and key.startswith(("audio.", "backbone.", own)):
                continue  # the first fused run's, if anyone's
            if key not in UNSEEN:
                out[key.replace(own, "models.*.")] = _text(value)
        if self.layers is not None:
            out["models.*.conditioned_layers"] = layers_name(self.layers, self.depth)
        return out

    @property
    def depth(self) -> int:
        """Blocks of the backbone."""
        return self.config["backbone.depth"]

    @property
    def blocks(self) -> int:
        """Trainable blocks."""
        return min(self.config["backbone.trainable_blocks"], self.depth)

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Conditioned layers, None for a variant without."""
        key = f"models.{self.report.variant}.conditioned_layers"
        layers = self.config.get(key)
        return None if layers is None else resolve_layers(layers, self.depth)

    @property
    def conditions_all(self) -> bool:
        return self.layers is None or self.layers == tuple(range(self.depth))


#: Keys that are not in `Run.setting`.
UNSEEN = {f"{section}.{key}" for section, keys in NOT_HASHED.items() for key in keys} | {
    "variant", "dataset.n_cls", "training.seed", "training.selection", "dataset.split_strategy",
    "dataset.test_fold", "dataset.split_seed", "dataset.test_device",
    "fusion.members", "fusion.title",
}  # fmt: skip


def _text(value: Any) -> str:
    """A value as a cell of a table."""
    return "null" if value is None else str(value).lower() if value in (True, False) else str(value)


def layers_name(layers: tuple[int, ...], depth: int) -> str:
    """`all`, `last 2` or the numbers."""
    if layers == tuple(range(depth)):
        return "all"
    if layers == tuple(range(layers[0], depth)):
        return f"last {len(layers)}"
    return ", ".join(map(str, layers))


@dataclass(frozen=True)
class RunGroup:
    """Runs of one setting; they differ in the training seed."""

    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def title(self) -> str:
        return self.first.report.title

    @property
    def variant(self) -> str:
        """Title of the variant alone."""
        return self.title.partition(" + ")[0]

    @property
    def methods(self) -> str:
        """Titles of the training methods, or none."""
        return self.title.partition(" + ")[2] or "none"

    @property
    def n_cls(self) -> int:
        return self.first.report.n_cls

    def over_seeds(self, metric: str) -> SeedSummary:
        """Mean and sd over the runs of a metric at the chosen thresholds."""
        return over_seeds([run.report.test.metrics["chosen"][metric].value for run in self.runs])

    @cached_property
    def tables(self) -> np.ndarray:
        """[R, P, C, C] confusion matrices of the R runs on the P test patients.

        Raises:
            UserError: the runs were tested on different patients.
        """
        tests = [run.report.test for run in self.runs]
        classes = len(tests[0].task["classes"])
        if any(list(test.patients) != list(tests[0].patients) for test in tests):
            raise UserError(
                f"{self.first.path} and its other seeds were tested on different patients; "
                "evaluate them on the same data"
            )
        tables = [np.array(test.patient_tables) for test in tests]
        return np.stack([table.reshape(-1, classes, classes) for table in tables])

    @cached_property
    def _intervals(self) -> dict[str, Interval]:
        return patient_bootstrap(self.tables)

    @cached_property
    def auroc(self) -> Interval | None:
        """Mean macro AUROC of the runs, with its patient bootstrap interval where their predictions
        are there; None: neither they are, nor a report that has it."""
        tests = [run.report.test for run in self.runs]
        files = [run.path / "predictions" / "test.csv" for run in self.runs]
        if not all(file.is_file() for file in files):
            found = [test.metrics["chosen"].get("auroc_macro") for test in tests]
            if None in found:
                return None
            mean = float(np.mean([one.value for one in found]))
            return found[0] if len(found) == 1 else Interval(mean, np.nan, np.nan)
        task = Task(self.n_cls, exclusive=tests[0].task["exclusive"])
        frames = (read_predictions(file, task) for file in files)
        frames = [frame.sort_values(["recording", "cycle_index"]) for frame in frames]
        runs = [ranking(frame, task) for frame in frames]
        return macro_auroc_bootstrap(runs, frames[0]["patient"].to_numpy())

    def interval(self, metric: str) -> Interval:
        """95 % patient bootstrap interval of the runs' mean."""
        return self._intervals[metric]


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Finished runs among the folders; unfinished ones and others are named and left out.

    Folds that a group has pooled are given as one run, not one by one.

    Raises:
        UserError: a folder does not exist, or its files are not readable.
    """
    runs, pooled = [], {}
    for folder in dict.fromkeys(map(Path, folders)):
        report, config = folder / "report.json", folder / "config.yaml"
        if not folder.is_dir():
            raise UserError(f"no folder {folder}; run folders are in runs/")
        if not config.is_file():
            if (folder / "group.json").is_file():
                pooled |= _pooled_folds(folder)
            elif not any((folder / name).is_file() for name in COLLECTIONS):
                log.warning("%s is no run folder (no config.yaml) and is left out", folder)
            continue
        if not report.is_file():
            log.warning("%s is not finished (no report.json) and is left out", folder)
            continue
        found = read_report(report)
        if found.test is None:
            raise UserError(f"{report} has no test part; evaluate the run again")
        runs.append(Run(folder, found, _read_config(config)))
    members = {name for names in pooled for name in names}
    return [run for run in runs if run.path.name not in members] + list(pooled.values())


def _read_config(path: Path) -> dict[str, Any]:
    """config.yaml, flat."""
    check_sum(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not readable: {error}") from None
    flat = flatten(content) if isinstance(content, dict) else {}
    if "dataset.split_strategy" not in flat:
        raise UserError(f"{path} holds no configuration; restore it or remove the run folder")
    return flat


def _pooled_folds(folder: Path) -> dict[tuple[str, ...], Run]:
    """Names of the runs of all folds -> the pooled run, for each seed of a group; {} where the
    group is one of seeds, or has some folds only."""
    path = folder / "group.json"
    content, found = read_results(path), {}
    with understood(path, "put the group together again by its command"):
        if len(content.get("folds", [])) < N_FOLDS:
            return {}
        settings = _read_config(folder.parent / content["runs"][0] / "config.yaml")
        settings["dataset.test_fold"] = None
        for number, seed in enumerate(content["seeds"]):
            names = tuple(content["runs"][N_FOLDS * number : N_FOLDS * (number + 1)])
            report = content | {"seed": seed, "test": content["test"][str(seed)]}
            found[names] = Run(folder, RunReport.from_dict(report), settings)
    return found


def group_runs(runs: Sequence[Run]) -> list[tuple[Protocol, list[RunGroup]]]:
    """Groups of seeds under each protocol, honest rules first.

    Raises:
        UserError: two runs have the same setting and the same seed.
    """
    same: dict[tuple, dict[int, Run]] = {}
    for run in runs:
        key = (run.protocol, run.report.title, run.report.n_cls, *sorted(run.setting.items()))
        other = same.setdefault(key, {}).setdefault(run.report.seed, run)
        if other is not run:
            raise UserError(
                f"{other.path} and {run.path} are the same run with the same seed; "
                "name one of them only"
            )
    protocols: dict[Protocol, list[RunGroup]] = {}
    for (protocol, *_), by_seed in same.items():
        ordered = tuple(by_seed[seed] for seed in sorted(by_seed))
        protocols.setdefault(protocol, []).append(RunGroup(ordered))
    return sorted(protocols.items(), key=lambda item: (Selection(item[0].selection).rank, item[0]))


def differing(groups: Sequence[RunGroup]) -> list[str]:
    """Keys whose values differ among the groups that have them, in the configuration's order."""
    values: dict[str, set[str]] = {}
    for group in groups:
        for key, value in group.first.setting.items():
            values.setdefault(key, set()).add(value)
    return [key for key, found in values.items() if len(found) > 1]
