"""Seeds and folds of one command: the members of a grid, and what they say together.

runs/<variant>-<n_cls>cls-<selection>-group-<hash>/
    group.json      the runs, mean +- sd over seeds, pooled metrics over folds
    predictions/    pooled out-of-fold predictions of each seed
    report-s<seed>.md   their report
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data.splits import N_FOLDS
from utils.common.errors import UserError
from utils.common.files import plain, write_last, write_text
from utils.config.schema import RunConfig, config_hash
from utils.evaluation.finished_runs import Run, RunGroup
from utils.evaluation.render import number, to_markdown
from utils.evaluation.report import (
    Baseline,
    Report,
    RunReport,
    evaluate_predictions,
    read_report,
)
from utils.metrics.bootstrap import patient_bootstrap
from utils.metrics.predictions import read_predictions, write_predictions
from utils.metrics.protocol import caption, is_leaky, metric_group
from utils.runs.cells import digest, override_sets, seeds_from
from utils.runs.pool import finish_tracking, start_parent
from utils.tracking import Tracker
from utils.training.runfolder import RunFolder

METRICS = ("sp", "se", "score", "collapsed_sp", "collapsed_se", "collapsed_score")
OF_ALL = ("variant", "title", "n_cls", "split_strategy", "selection", "partial", "partial_message")
OF_ALL += ("synthetic",)  # keys of report.json that the members share


def expand(
    config: RunConfig, seeds: Sequence[int] | None, folds: Sequence[str] | None
) -> list[RunConfig]:
    """The configurations that a command asks for, folds within seeds.

    Raises:
        UserError: seeds or folds that make no sense with this configuration.
    """
    dataset, names = config.dataset, [str(n) for n in range(N_FOLDS)]
    if folds is not None:
        if dataset.split_strategy != "foldwise":
            strategy = dataset.split_strategy
            raise UserError(f"--folds needs dataset.split_strategy=foldwise, not {strategy!r}")
        folds = names if list(folds) == ["all"] else list(dict.fromkeys(folds))
        if set(folds) - set(names):
            raise UserError(f"--folds {' '.join(folds)}: give all, or numbers 0..{N_FOLDS - 1}")
    axes = {
        "seed": [config.training.seed] if seeds is None else seeds_from(seeds),
        "fold": [dataset.test_fold] if folds is None else list(map(int, folds)),
    }
    configs = []
    for values in override_sets(axes):
        configs.append(copy.deepcopy(config))
        configs[-1].training.seed = values["seed"]
        configs[-1].dataset.test_fold = values["fold"]
    return configs


class Group:
    """The seeds and folds of one command, and what they say together.

    Args:
        configs: as `expand` gives them, at least two.
    """

    def __init__(self, configs: list[RunConfig]):
        self.config = first = configs[0]
        self.seeds = list(dict.fromkeys(c.training.seed for c in configs))
        self.folds = list(dict.fromkeys(c.dataset.test_fold for c in configs))
        self.label = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        self.label += f", {len(self.folds)} folds" if len(self.folds) > 1 else ""
        start = f"{first.variant}-{first.dataset.n_cls}cls-{first.training.selection}-group"
        name = f"{start}-{digest([config_hash(config) for config in configs])}"
        self.path = Path(first.training.output_dir) / name
        self.folders = [RunFolder.of(config) for config in configs]  # folds within seeds
        self.title = f"{first.title}, {first.dataset.n_cls}-class"
        self.tracker = Tracker()

    def start(self) -> None:
        """Open the MLflow run that the members are nested below."""
        name = f"{self.title.replace(',', '')} {self.config.training.selection} {self.label}"
        tags = {"variant": self.config.variant, "seed": ",".join(map(str, self.seeds))}
        tags |= {"task": f"{self.config.dataset.n_cls}-class", "group": self.path.name}
        self.tracker = start_parent(self.config, self.path, name, **tags)

    def finish(self) -> dict[str, Any]:
        """Put the finished members together; write group.json, track and print it."""
        reports = [read_report(folder.report) for folder in self.folders]
        first, n = reports[0], len(self.folds)
        by_seed = {seed: slice(n * i, n * (i + 1)) for i, seed in enumerate(self.seeds)}
        tests = {
            seed: self._pool(seed, self.folders[own], reports[own])
            if n > 1
            else reports[own][0].test
            for seed, own in by_seed.items()
        }
        members = (Run(self.path, replace(first, test=test), {}) for test in tests.values())
        runs = RunGroup(tuple(members))
        summary = {}
        for name in METRICS:
            if name not in first.test.metrics["chosen"]:
                continue
            bounds = runs.interval(name)
            summary[name] = asdict(runs.over_seeds(name)) | {"low": bounds.low, "high": bounds.high}
        result = {key: getattr(first, key) for key in OF_ALL} | {
            "runs": [folder.path.name for folder in self.folders],
            "seeds": self.seeds,
            "folds": self.folds if n > 1 else [],
            "summary": plain(summary),
            "test": {str(seed): test.to_dict() for seed, test in tests.items()},
        }
        pooled = sorted((self.path / "predictions").glob("*.csv"))
        write_last(self.path / "group.json", result, pooled)
        self._track(result)
        self._print(result)
        return result

    def _track(self, result: dict[str, Any]) -> None:
        marks = {"partial_data": result["partial"], "synthetic": result["synthetic"]}
        marks["leaky_split"] = leaky = is_leaky(result["split_strategy"])
        self.tracker.tags({key: str(value).lower() for key, value in marks.items()})
        for column, kind in (("test", "mean"), ("test_sd", "sd")):
            group = metric_group(column, result["selection"], leaky)
            values = {f"{group}/{name}": v[kind] for name, v in result["summary"].items()}
            self.tracker.metrics({name: v for name, v in values.items() if v is not None})
        for path in (self.path / "group.json", *sorted(self.path.glob("report-s*.md"))):
            self.tracker.artifact(path)
        finish_tracking(self.tracker, "FINISHED")

    def _print(self, result: dict[str, Any]) -> None:
        marks = result["selection"], result["partial"], result["synthetic"]
        marks += (is_leaky(result["split_strategy"]),)
        print(f"\n{caption(f'{self.title}, {self.label}', *marks)}")
        what = "out-of-fold patients" if result["folds"] else "test"
        print(f"{what + ', percent':32}{'mean':>9}{'sd':>9}{'n':>5}  95 % over patients")
        for name, value in result["summary"].items():
            mean, sd = number(value["mean"]), number(value["sd"])
            low, high = (number(value[end], 1) for end in ("low", "high"))
            print(f"{name:32}{mean:>9}{sd:>9}{value['n']:>5}  [{low}, {high}]")
        print(f"\ngroup folder {self.path}")

    def _pool(self, seed: int, folders: list[RunFolder], reports: list[RunReport]) -> Report:
        """Report over the out-of-fold predictions of one seed: every patient tested once.

        The classes are those that each fold's own thresholds decided; the thresholds of the
        pooled report are the default ones, because no single choice belongs to all folds.
        """
        task, first = self.config.task, reports[0]
        frames = [read_predictions(folder.predictions / "test.csv", task) for folder in folders]
        pooled = pd.concat(frames).sort_values("cycle", ignore_index=True)
        write_predictions(pooled, self.path / "predictions" / f"out_of_fold-s{seed}.csv")
        marks = {"partial_message": first.partial_message, "synthetic": first.synthetic}
        report = evaluate_predictions(pooled, task, None, selection=first.selection, **marks)
        report.baselines = _pooled_baselines([member.test for member in reports])
        report.notes = [
            f"{len(folders)} models, one per fold, are pooled: Sp, Se and Score rest on each "
            "fold's own decisions, but AUROC, average precision, the curve and the calibration put "
            "the outputs of all models on one scale."
        ]
        if len(folders) < N_FOLDS:
            few = f"{len(folders)} OF {N_FOLDS} FOLDS: the other patients were not tested."
            report.notes.insert(0, few)
        folds = f"pooled out-of-fold predictions of folds {', '.join(map(str, self.folds))}"
        text = to_markdown(report, f"{self.title}, seed {seed}: {folds}")
        write_text(self.path / f"report-s{seed}.md", text)
        return report


def _pooled_baselines(tests: Sequence[Report]) -> dict[str, Baseline]:
    """Each metadata-only baseline over the patients of all folds; tests: report of each fold."""
    classes, pooled = len(tests[0].task["classes"]), {}
    for name in tests[0].baselines or {}:
        tables = [np.array(test.baselines[name].patient_tables) for test in tests]
        tables = [table.reshape(-1, classes, classes) for table in tables]  # [P, C, C]
        pooled[name] = Baseline({"chosen": patient_bootstrap(np.concatenate(tables))})
    return pooled
