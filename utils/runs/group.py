"""Several runs that belong together: seeds of one configuration, folds of one data set.

Each run is a plain run with a folder of its own, resumable by itself; the group only says which
ones there are, shows them nested below one MLflow run, and puts their figures together when the
last has finished:

    runs/<variant>-<n_cls>cls-<selection>-group-<hash>/
        group.json      the runs, mean +- sd over seeds, pooled figures over folds
        predictions/    pooled out-of-fold predictions of each seed
        report-s<seed>.md   their report
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data.splits import N_FOLDS
from models.registry import VARIANTS
from utils.common.errors import UserError
from utils.common.files import plain, write_json, write_text
from utils.config.schema import RunConfig, config_hash
from utils.evaluation.render import number, to_markdown
from utils.evaluation.report import evaluate_predictions
from utils.metrics.bootstrap import over_seeds, patient_bootstrap
from utils.metrics.predictions import read_predictions, write_predictions
from utils.metrics.protocol import PARTIAL_MARK, SYNTHETIC_MARK, Selection, metric_group
from utils.tracking import Tracker, start_tracking
from utils.training.checkpoint import git_revision
from utils.training.runfolder import RunFolder

logger = logging.getLogger(__name__)

FIGURES = ("sp", "se", "score", "collapsed_sp", "collapsed_se", "collapsed_score")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--seeds and --folds."""
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        metavar="N",
        help="one number n: seeds 0..n-1; several: just these",
    )
    parser.add_argument(
        "--folds",
        nargs="+",
        metavar="K",
        help="all, or fold numbers 0..4; needs dataset.split_strategy=foldwise",
    )


def seeds_from(words: Sequence[int]) -> list[int]:
    """--seeds: one number n means 0..n-1, several mean just these.

    Raises:
        UserError: none, or a negative one.
    """
    seeds = list(range(words[0])) if len(words) == 1 else list(dict.fromkeys(words))
    if not seeds or min(seeds) < 0:
        raise UserError(f"--seeds {' '.join(map(str, words))}: give a count or seeds from 0")
    return seeds


def expand(
    config: RunConfig, seeds: Sequence[int] | None, folds: Sequence[str] | None
) -> list[RunConfig]:
    """The configurations that a command asks for, folds within seeds.

    Raises:
        UserError: seeds or folds that make no sense with this configuration.
    """
    chosen_seeds = [config.training.seed] if seeds is None else seeds_from(seeds)
    chosen_folds = [config.dataset.test_fold]
    if folds is not None:
        if config.dataset.split_strategy != "foldwise":
            raise UserError(
                f"--folds needs dataset.split_strategy=foldwise, not "
                f"{config.dataset.split_strategy!r}"
            )
        names = [str(n) for n in range(N_FOLDS)]
        wanted = names if list(folds) == ["all"] else list(dict.fromkeys(folds))
        if set(wanted) - set(names):
            raise UserError(f"--folds {' '.join(folds)}: give all, or numbers 0..{N_FOLDS - 1}")
        chosen_folds = [int(name) for name in wanted]
    configs = []
    for seed in chosen_seeds:
        for fold in chosen_folds:
            member = copy.deepcopy(config)
            member.training.seed, member.dataset.test_fold = seed, fold
            configs.append(member)
    return configs


class Group:
    """The runs of one command, and what they say together.

    Args:
        configs: as `expand` gives them, at least two.
    """

    def __init__(self, configs: list[RunConfig]):
        self.configs, self.config = configs, configs[0]
        self.variant = VARIANTS[self.config.variant]
        names = json.dumps([config_hash(config) for config in configs])
        digest = hashlib.sha256(names.encode()).hexdigest()[:8]
        self.name = (
            f"{self.config.variant}-{self.config.dataset.n_cls}cls"
            f"-{self.config.training.selection}-group-{digest}"
        )
        self.path = Path(self.config.training.output_dir) / self.name
        self.seeds = list(dict.fromkeys(c.training.seed for c in configs))
        self.folds = list(dict.fromkeys(c.dataset.test_fold for c in configs))
        self.tracker = Tracker()

    def start(self) -> None:
        """Open the MLflow run that the members are nested below."""
        config = self.config
        task, selection = f"{config.dataset.n_cls}-class", config.training.selection
        tags = {
            "variant": config.variant,
            "task": task,
            "selection": selection,
            "seed": ",".join(map(str, self.seeds)),
            "git_revision": git_revision() or "unknown",
            "run_folder": self.path,
            "group": self.name,
        }
        name = f"{self.variant.title} {task} {selection} {self.label}"
        self.tracker = start_tracking(config.mlflow, self.path, run_name=name, tags=tags)

    @property
    def label(self) -> str:
        """Such as "5 seeds" or "1 seed, 5 folds"."""
        parts = [f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"]
        if len(self.folds) > 1:
            parts.append(f"{len(self.folds)} folds")
        return ", ".join(parts)

    def finish(self) -> dict[str, Any]:
        """Put the finished members together; write group.json, track and print it."""
        reports = [RunFolder.of(config).read_report() for config in self.configs]
        by_seed = {seed: [] for seed in self.seeds}
        for config, report in zip(self.configs, reports, strict=True):
            by_seed[config.training.seed].append((config, report))
        tests = {
            seed: self._pooled(seed, members) if len(self.folds) > 1 else members[0][1]["test"]
            for seed, members in by_seed.items()
        }
        summary = _summary(list(tests.values()))
        first = reports[0]
        result = {
            **{k: first[k] for k in ("variant", "title", "n_cls", "split_strategy", "selection")},
            "partial": first["partial"],
            "partial_message": first["partial_message"],
            "synthetic": first["synthetic"],
            "runs": [RunFolder.of(config).path.name for config in self.configs],
            "seeds": self.seeds,
            "folds": self.folds if len(self.folds) > 1 else [],
            "summary": summary,
            "test": {str(seed): test for seed, test in tests.items()},
        }
        write_json(self.path / "group.json", result)
        self.tracker.tags(
            {
                "partial_data": str(first["partial"]).lower(),
                "synthetic": str(first["synthetic"]).lower(),
            }
        )
        mean, sd = (metric_group(name, result["selection"]) for name in ("test", "test_sd"))
        for name, value in summary.items():
            values = {f"{mean}/{name}": value["mean"], f"{sd}/{name}": value["sd"]}
            self.tracker.metrics({key: v for key, v in values.items() if v is not None})
        for path in (self.path / "group.json", *sorted(self.path.glob("report-s*.md"))):
            self.tracker.artifact(path)
        message = self.tracker.finish("FINISHED")
        if message:
            logger.warning("%s", message)
        self._print(result)
        return result

    def _pooled(self, seed: int, members: list[tuple[RunConfig, dict]]) -> dict[str, Any]:
        """Report over the out-of-fold predictions of one seed: every patient tested once.

        The classes are those that each fold's own thresholds decided; the thresholds of the
        pooled report are the default ones, because no single choice belongs to all folds.
        """
        task = members[0][0].task
        frames = [
            read_predictions(RunFolder.of(config).predictions / "test.csv", task)
            for config, _ in members
        ]
        pooled = pd.concat(frames).sort_values("cycle", ignore_index=True)
        write_predictions(pooled, self.path / "predictions" / f"out_of_fold-s{seed}.csv")
        report = evaluate_predictions(
            pooled,
            task,
            None,
            selection=members[0][0].training.selection,
            partial_message=members[0][1]["partial_message"],
            synthetic=members[0][1]["synthetic"],
        )
        report["floors"] = _pooled_floors([member["test"] for _, member in members])
        report["notes"] = [
            f"{len(members)} models, one per fold, are pooled: Sp, Se and Score rest on each "
            "fold's own decisions, but AUROC, average precision, the curve and the calibration put "
            "the outputs of all models on one scale."
        ]
        if len(self.folds) < N_FOLDS:
            report["notes"].insert(
                0, f"{len(self.folds)} OF {N_FOLDS} FOLDS: the other patients were not tested."
            )
        title = (
            f"{self.variant.title}, {task.n_cls}-class, seed {seed}: pooled out-of-fold "
            f"predictions of folds {', '.join(map(str, self.folds))}"
        )
        write_text(self.path / f"report-s{seed}.md", to_markdown(report, title))
        return report

    def _print(self, result: dict[str, Any]) -> None:
        print(
            f"\n{result['title']}, {result['n_cls']}-class, {self.label}: "
            f"{Selection(result['selection']).label}"
            + (f", {PARTIAL_MARK}" if result["partial"] else "")
            + (f", {SYNTHETIC_MARK}" if result["synthetic"] else "")
        )
        what = "out-of-fold patients" if len(self.folds) > 1 else "test"
        print(f"{what + ', percent':32}{'mean':>9}{'sd':>9}{'n':>5}  95 % over patients")
        for name, value in result["summary"].items():
            low, high = (number(value[end], 1) for end in ("low", "high"))
            mean, sd = number(value["mean"]), number(value["sd"])
            print(f"{name:32}{mean:>9}{sd:>9}{value['n']:>5}  [{low}, {high}]")
        print(f"\ngroup folder {self.path}")


def _summary(tests: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Figure -> mean, sd, n over the seeds, and the patient bootstrap interval of that mean.

    Args:
        tests: report of each seed on the same patients.
    """
    found = patient_bootstrap(np.stack([_patient_tables(test) for test in tests]))
    summary = {}
    for name in FIGURES:
        values = [test["metrics"]["chosen"].get(name, {}).get("value") for test in tests]
        if None not in values:
            interval = {"low": found[name].low, "high": found[name].high}
            summary[name] = asdict(over_seeds(values)) | interval
    return plain(summary)


def _pooled_floors(tests: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each floor over the patients of all folds, as `floor_reports` gives it for one.

    Args:
        tests: report of each fold; no patient is in two of them.
    """
    classes = len(tests[0]["task"]["classes"])
    floors = {}
    for name in tests[0]["floors"]:
        tables = [_patient_tables(test["floors"][name], classes) for test in tests]
        found = patient_bootstrap(np.concatenate(tables))
        floors[name] = {"metrics": {"chosen": {key: asdict(v) for key, v in found.items()}}}
    return plain(floors)


def _patient_tables(report: dict[str, Any], classes: int | None = None) -> np.ndarray:
    """[P, C, C] confusion matrix of each patient."""
    classes = classes or len(report["task"]["classes"])
    return np.array(report["patient_tables"]).reshape(-1, classes, classes)
