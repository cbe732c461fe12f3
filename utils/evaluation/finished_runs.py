"""Finished run folders, and the groups of them that differ in the training seed only."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from data.splits import N_FOLDS
from models.config import resolve_layers
from utils.common.errors import UserError
from utils.config.schema import NOT_HASHED
from utils.metrics.bootstrap import Interval, SeedSummary, over_seeds, patient_bootstrap
from utils.metrics.protocol import Selection

log = logging.getLogger(__name__)

#: Files that mark a folder beside the run folders: a group of seeds or folds, a grid, a comparison.
COLLECTIONS = ("group.json", "comparison.json", "grid.json", "tracking.json")


#: Split of the pooled out-of-fold predictions.
POOLED = "foldwise, all folds pooled"


class Protocol(NamedTuple):
    """What must be equal before two figures may stand in one column."""

    selection: str
    split: str
    partial: bool
    synthetic: bool
    train_cycles: int | None  # None: pooled folds, each with training cycles of its own
    test_cycles: int
    test_patients: int


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, report.json and config.yaml.

    The folds of one seed that a group has pooled count as one run, whose `test_fold` is None.
    """

    path: Path
    report: dict[str, Any]
    config: dict[str, Any]

    @property
    def protocol(self) -> Protocol:
        """Selection rule, split and data of this run."""
        dataset, counts = self.config["dataset"], self.report["test"]["counts"]
        split = dataset["split_strategy"]
        if split == "foldwise":
            fold = dataset["test_fold"]
            split = POOLED if fold is None else f"foldwise, fold {fold}"
        elif split == "random":
            split = f"random, seed {dataset['split_seed']}"
        return Protocol(
            self.report["selection"],
            split,
            self.report["partial"],
            self.report.get("synthetic", False),
            None if split == POOLED else self.report["counts"]["train"]["cycles"],
            counts["cycles"],
            counts["patients"],
        )

    @cached_property
    def setting(self) -> str:
        """Eight hex digits over every key that can change the result, but for the seed."""
        values = copy.deepcopy(self.config)
        values.pop("mlflow", None)
        values["training"].pop("seed", None)
        for section, keys in NOT_HASHED.items():
            for key in keys:
                values.get(section, {}).pop(key, None)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class RunGroup:
    """Runs of one setting; they differ in the training seed."""

    runs: tuple[Run, ...]

    @property
    def variant(self) -> str:
        return self.runs[0].report["variant"]

    @property
    def title(self) -> str:
        return self.runs[0].report["title"]

    @property
    def n_cls(self) -> int:
        return self.runs[0].report["n_cls"]

    @property
    def setting(self) -> str:
        return self.runs[0].setting

    @property
    def depth(self) -> int:
        """Blocks of the backbone."""
        return self.runs[0].config["backbone"]["depth"]

    @property
    def blocks(self) -> int:
        """Trainable blocks."""
        return min(self.runs[0].config["backbone"]["trainable_blocks"], self.depth)

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Conditioned layers, None for a variant without."""
        layers = self.runs[0].config["models"][self.variant].get("conditioned_layers")
        return None if layers is None else resolve_layers(layers, self.depth)

    @property
    def trains_all(self) -> bool:
        return self.blocks == self.depth

    @property
    def conditions_all(self) -> bool:
        return self.layers is None or self.layers == tuple(range(self.depth))

    def over_seeds(self, figure: str) -> SeedSummary:
        """Mean and sd over the runs of a figure at the chosen thresholds."""
        values = [run.report["test"]["metrics"]["chosen"][figure]["value"] for run in self.runs]
        return over_seeds([np.nan if v is None else v for v in values])

    @cached_property
    def _intervals(self) -> dict[str, Interval]:
        tests = [run.report["test"] for run in self.runs]
        classes = len(tests[0]["task"]["classes"])
        if any(test["patients"] != tests[0]["patients"] for test in tests):
            raise UserError(
                f"{self.runs[0].path} and its other seeds were tested on different patients; "
                "evaluate them on the same data"
            )
        tables = [np.array(test["patient_tables"]) for test in tests]
        return patient_bootstrap(
            np.stack([table.reshape(-1, classes, classes) for table in tables])
        )

    def interval(self, figure: str) -> Interval:
        """95 % patient bootstrap interval of the runs' mean."""
        return self._intervals[figure]


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Finished runs among the folders; unfinished ones and others are named and left out.

    Folds that a group has pooled are given as one run, not one by one.

    Raises:
        UserError: a folder is not there, or its files are not readable.
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
        content, settings = _read(report), _read(config)
        if "patient_tables" not in content.get("test", {}):
            raise UserError(f"{report} lacks the patients' counts; evaluate the run again")
        runs.append(Run(folder, content, settings))
    members = {name for names in pooled for name in names}
    return [run for run in runs if run.path.name not in members] + list(pooled.values())


def _read(path: Path) -> dict[str, Any]:
    """A JSON or YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path.parent} holds a file that is not readable: {error}") from None


def _pooled_folds(folder: Path) -> dict[tuple[str, ...], Run]:
    """Names of the runs of all folds -> the pooled run, for each seed of a group; {} where the
    group is one of seeds, or has some folds only."""
    content = _read(folder / "group.json")
    if len(content.get("folds", [])) < N_FOLDS:
        return {}
    settings = _read(folder.parent / content["runs"][0] / "config.yaml")
    settings["dataset"]["test_fold"] = None
    found = {}
    for number, seed in enumerate(content["seeds"]):
        names = tuple(content["runs"][N_FOLDS * number : N_FOLDS * (number + 1)])
        report = content | {"seed": seed, "test": content["test"][str(seed)]}
        found[names] = Run(folder, report, settings)
    return found


def group_runs(runs: Sequence[Run]) -> list[tuple[Protocol, list[RunGroup]]]:
    """Groups of seeds under each protocol, honest rules first.

    Raises:
        UserError: two runs have the same setting and the same seed.
    """
    settings: dict[tuple[Protocol, str, str], list[Run]] = {}
    for run in runs:
        key = (run.protocol, run.report["variant"], run.setting)
        settings.setdefault(key, []).append(run)
    protocols: dict[Protocol, list[RunGroup]] = {}
    for (protocol, _, _), same in settings.items():
        by_seed: dict[int, Run] = {}
        for run in same:
            other = by_seed.setdefault(run.report["seed"], run)
            if other is not run:
                raise UserError(
                    f"{other.path} and {run.path} are the same run with the same seed; "
                    "name one of them only"
                )
        ordered = tuple(by_seed[seed] for seed in sorted(by_seed))
        protocols.setdefault(protocol, []).append(RunGroup(ordered))
    return sorted(protocols.items(), key=lambda item: (Selection(item[0].selection).rank, item[0]))


def folders_from_mlflow(uri: str, experiment: str) -> list[Path]:
    """Folders of the tracked runs, from their tag `run_folder`.

    Raises:
        UserError: no such experiment, or none of its runs has a folder here.
    """
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise UserError(f"no MLflow experiment {experiment!r} at {uri}; see --experiment")
    runs = client.search_runs([found.experiment_id], max_results=5000)
    tagged = [Path(r.data.tags["run_folder"]) for r in runs if "run_folder" in r.data.tags]
    here = [folder for folder in dict.fromkeys(tagged) if folder.is_dir()]
    if gone := len(set(tagged)) - len(here):
        log.warning("%d tracked run folder(s) are not on this machine and are left out", gone)
    if not here:
        raise UserError(f"no run of {experiment!r} at {uri} has its folder on this machine")
    return here
