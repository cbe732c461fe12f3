"""Does conditioning work? Every variant where the same sound means two things.

    python -m experiments.planted_effect [--seeds 3] [--threads 1] [--fields site age device]

The synthetic corpus with a planted effect (docs/synthetic_corpus.md) annotates the same sound in
two ways, depending on a field that can not be heard; without it, annotations say what is heard.
Each variant is trained on both by the project's own loop, and where the effect is planted it is
tested with real, shuffled and unknown metadata. The first field is learned by every variant, the
others by SoftFiLM alone, which is asked which factor it used.

A two-block backbone without pretrained weights; augmentation is off, so that spectrograms are
computed once for all runs. Every finished run is a JSON file in the work folder and is not trained
again, so that the command can be stopped and goes on. `--report-only` trains nothing and writes the
Markdown of what is there.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.loader import Cycles
from data.synthetic.corpus import CorpusReport, write_corpus
from data.synthetic.planted import SECOND_GROUP
from experiments.planted_effect_report import OFF, remarks_of, to_markdown
from models.conditioner import Features
from models.conditioners.softfilm import SoftFiLM
from models.registry import VARIANTS
from utils.common.cli import EXIT_PREEMPTED
from utils.common.errors import Preempted, UserError
from utils.common.files import write_text
from utils.config.schema import RunConfig, config_from_dict, config_hash, config_to_dict
from utils.evaluation.metadata_test import conditions
from utils.metrics.bootstrap import patient_tables
from utils.metrics.score import metrics_of
from utils.tracking import Tracker
from utils.training.assemble import build_data, build_frontend, build_model, count_parts
from utils.training.checkpointer import Checkpointer
from utils.training.device import Runtime
from utils.training.inputs import Inputs
from utils.training.runfolder import RunFolder
from utils.training.trainer import Trainer

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "benchmarks" / "planted_effect.md"
#: Every variant with the effect in the first field; in the others only this one.
ATTRIBUTED = "ast_softfilm"
SHUFFLES = 3

#: Sections of the configuration that differ from the defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "dataset": {"w": 128, "batch_size": 32, "store_workers": 1},
    "audio": {"clip_seconds": 3.0},
    "augment": {"enabled": False},
    "backbone": {
        "weights": "none",
        "embed_dim": 96,
        "depth": 2,
        "num_heads": 4,
        "freq_stride": 16,
        "time_stride": 16,
    },
    "training": {
        "epochs": 12,
        "lr": 5e-4,
        "warmup_epochs": 3,
        "sensitivity_bias": 1.0,
        "selection": "fixed",
        "device": "cpu",
        "precision": "fp32",
        "compile": "false",
    },
    "mlflow": {"enabled": False},
}
#: Of whichever variant has the key.
MODEL: dict[str, Any] = {"input_tdim": 128, "conditioned_layers": "all", "dropout": 0.1}


@dataclass(frozen=True)
class Job:
    """One run: the planted field (or `OFF`), the variant, the seed."""

    corpus: str
    variant: str
    seed: int


def jobs(fields: Sequence[str], seeds: int) -> list[Job]:
    """All runs, seed by seed, so that a table of pairs is left whenever it is stopped.

    The first field and the corpus without the effect take turns; further fields come last.
    """
    main = [Job(c, v, s) for s in range(seeds) for c in (fields[0], OFF) for v in VARIANTS]
    return main + [Job(c, ATTRIBUTED, s) for c in fields[1:] for s in range(seeds)]


class Remembered(Inputs):
    """Inputs that compute each cycle's spectrogram once; without augmentation nothing changes.

    Args:
        known: cycle -> spectrogram [1, F, T]; shared by the runs on the same corpus.
    """

    def __init__(self, *arguments: Any, known: dict[int, Tensor]):
        super().__init__(*arguments)
        self.known = known

    def read(self, rows: np.ndarray) -> Batch:
        return self.data.batch(rows, waveforms=not self._has(rows.tolist()))

    def __call__(self, batch: Batch, seed: int | None) -> Features:
        cycles = batch.cycle.tolist()
        if not self._has(cycles):
            self.known |= dict(zip(cycles, super().__call__(batch, None).values, strict=True))
        return Features(torch.stack([self.known[cycle] for cycle in cycles]))

    def _has(self, cycles: Sequence[int]) -> bool:
        return all(cycle in self.known for cycle in cycles)


class Benchmark:
    """Corpora, runs and their records in one work folder.

    Args:
        work: receives corpora, the waveform cache, run folders and a JSON per finished run.
        patients: of each corpus.
        overrides: {section: {key: value}} on top of `SETTINGS`.
    """

    def __init__(
        self, work: Path, *, patients: int = 160, overrides: dict[str, dict[str, Any]] | None = None
    ):
        self.work, self.patients = work, patients
        self.overrides = overrides or {}
        self._data: dict[str, Cycles] = {}  # read once: what differs between runs is not in it
        self._known: dict[str, dict[int, Tensor]] = {}  # spectrograms

    def corpus(self, name: str) -> CorpusReport:
        """The corpus with that field planted; `OFF` is as loud and as regular, but says what is
        heard."""
        return write_corpus(
            self.work / f"corpus-{name}",
            patients=self.patients,
            seed=0,
            planted_effect=None if name == OFF else name,
            event_level=8,
            traps=False,
        )

    def configure(self, job: Job) -> RunConfig:
        """Checked configuration of a run."""
        values = {name: dict(section) for name, section in SETTINGS.items()}
        places = {
            "dataset": {
                "data_folder": str(self.work / f"corpus-{job.corpus}"),
                "cache_dir": str(self.work / "cache"),
            },
            "training": {"seed": job.seed, "output_dir": str(self.work / "runs")},
        }
        for changes in (places, self.overrides):
            for name, section in changes.items():
                values.setdefault(name, {}).update(section)
        values["models"] = {job.variant: {}, "*": dict(MODEL)}
        return config_from_dict(values)

    def setup(self, job: Job) -> str:
        """How a run is trained, in words."""
        config = self.configure(job)
        backbone, training = config.backbone, config.training
        return (
            f"{backbone.depth} blocks {backbone.embed_dim} wide from random weights, "
            f"{training.epochs} epochs in batches of {config.dataset.batch_size}, the last epoch's "
            "weights, thresholds .5"
        )

    def path(self, job: Job) -> Path:
        """Where the record of a run is kept; another configuration has another one."""
        digest = config_hash(self.configure(job))
        name = f"{job.corpus}-{job.variant}-s{job.seed}-p{self.patients}-{digest}.json"
        return self.work / "records" / name

    def record(self, job: Job) -> dict[str, Any] | None:
        """What is known of a finished run."""
        path = self.path(job)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def run(self, job: Job) -> dict[str, Any]:
        """Train, test, keep and return the record of a run."""
        config = self.configure(job)
        if job.corpus not in self._data:
            self.corpus(job.corpus)
            self._data[job.corpus] = build_data(config)
        data = self._data[job.corpus]
        clock, cpu = time.monotonic(), time.process_time()
        trainer = self._trainer(config, data, job.corpus)
        trainer.fit()
        record = {
            "corpus": job.corpus,
            "variant": job.variant,
            "seed": job.seed,
            "seconds": round(time.monotonic() - clock, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "threads": torch.get_num_threads(),
            "counts": {k: count_parts(data)[k] for k in ("train", "test")},
            "train": _tables(trainer, data.split.train)["real"],
            "test": _tables(trainer, data.split.test, told=job.corpus != OFF),
        }
        conditioner = trainer.model.conditioner
        if isinstance(conditioner, SoftFiLM):
            told = data.metadata[torch.from_numpy(data.split.test)]
            effects = conditioner.factor_effects(told, centred=True).sum(dim=1)  # [K]
            shares = (100 * effects / effects.sum()).tolist()
            record["shares"] = dict(zip(conditioner.factors, shares, strict=True))
        write_text(self.path(job), json.dumps(record))
        shutil.rmtree(
            trainer.checkpointer.folder.path
        )  # its training state; the record is all we keep
        return record

    def _trainer(self, config: RunConfig, data: Cycles, corpus: str) -> Trainer:
        """A run as `utils.runs.run.Run` puts it together, with remembered spectrograms."""
        runtime = Runtime(
            config.training.device, config.training.precision, config.training.compile
        )
        torch.manual_seed(config.training.seed)
        model = build_model(config, data.statistics)
        folder = RunFolder.of(config)
        describe = {
            "config": config_to_dict(config),
            "statistics": data.statistics.to_dict(),
            "selection": config.training.selection,
            "counts": count_parts(data),
            "partial": data.completeness.message,
            "synthetic": True,
            "run": folder.path.name,
        }
        known = self._known.setdefault(corpus, {})
        inputs = Remembered(build_frontend(config), runtime, data, known=known)
        checkpointer = Checkpointer(folder, runtime, describe)
        return Trainer(config, data, model, inputs, runtime, checkpointer, Tracker())


def _tables(trainer: Trainer, rows: np.ndarray, told: bool = False) -> dict[str, list]:
    """Patient tables [P, C, C] of the rows under real metadata; where the model is `told` of
    metadata and uses them, under shuffled (several), unknown and partly unknown ones, too:
    {condition: list of tables}."""
    data, task = trainer.data, trainer.data.task
    table = data.table.iloc[rows]
    own = data.metadata[torch.from_numpy(rows)]
    asked = [("real", own)]
    if told and trainer.config.variant != "ast":
        asked = list(conditions(table, data.statistics.transform, shuffles=SHUFFLES, seed=0))
    logits = trainer.predictor.under(rows, [metadata for _, metadata in asked])
    thresholds = trainer.progress.thresholds
    found: dict[str, list] = {}
    for (name, _), values in zip(asked, logits, strict=True):
        pred = task.predicted_classes(task.probabilities(values), thresholds)
        _, counts = patient_tables(
            data.classes(rows), pred, table["PID"].to_numpy(), len(task.classes)
        )
        found.setdefault(name, []).append(counts.tolist())
    return found


def score(tables: Sequence) -> float:
    """ICBHI Score of patient tables [P, C, C], or the mean of several [R, P, C, C]."""
    return float(metrics_of(np.asarray(tables).sum(axis=-3))["score"].mean())


def records(benchmark: Benchmark, wanted: Sequence[Job]) -> Iterator[dict[str, Any]]:
    """Those of the wanted runs that are finished."""
    for job in wanted:
        if (record := benchmark.record(job)) is not None:
            yield record


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0, 2 after an error that the user can mend, 75 when told to stop."""
    parser = argparse.ArgumentParser(prog="python -m experiments.planted_effect")
    parser.add_argument("--seeds", type=int, default=3, help="runs per variant and corpus")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--fields", nargs="+", choices=list(SECOND_GROUP), default=["site"])
    parser.add_argument("--work", type=Path, default=Path("cache/planted_effect"))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    torch.set_num_threads(options.threads)
    benchmark = Benchmark(options.work)
    wanted = jobs(list(dict.fromkeys(options.fields)), options.seeds)
    command = (
        f"python -m experiments.planted_effect --seeds {options.seeds} "
        f"--threads {options.threads} --fields {' '.join(options.fields)}"
    )
    try:
        for number, job in enumerate(wanted, start=1):
            if options.report_only or benchmark.record(job) is not None:
                continue
            record = benchmark.run(job)
            logger.info(
                "%d of %d: %s, %s, seed %d: train %.1f, test %.1f, %.0f s (CPU %.0f s)",
                number,
                len(wanted),
                job.corpus,
                job.variant,
                job.seed,
                score(record["train"]),
                score(record["test"]["real"]),
                record["seconds"],
                record["cpu_seconds"],
            )
        finished = list(records(benchmark, wanted))
        best = {
            name: benchmark.corpus(name).best_score
            for name in dict.fromkeys(record["corpus"] for record in finished)
        }
        old = options.output.read_text(encoding="utf-8") if options.output.is_file() else ""
        text = to_markdown(
            finished,
            best,
            wanted=len(wanted),
            command=command,
            setup=benchmark.setup(wanted[0]),
            day=date.today(),
            remarks=remarks_of(old),
        )
        write_text(options.output, text)
    except Preempted:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return EXIT_PREEMPTED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
