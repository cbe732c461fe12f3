"""Does conditioning work? Every variant where the same sound means two things.

    python -m experiments.planted_effect [--seeds 3] [--threads 1] [--fields site age device]

The synthetic corpus with a planted effect (docs/data.md) annotates the same sound in
two ways, depending on a field that cannot be heard; without it, annotations say what is heard.
Each variant is trained on both by the project's own loop, and where the effect is planted it is
tested with real, shuffled and unknown metadata. The first field is learned by every variant, the
others by SoftFiLM alone, which is asked which factor it used.

The configuration is planted_effect.yaml; augmentation is off, so that spectrograms are computed
once for all runs. Every finished run is a JSON file in the work folder and is not trained again: a
stopped command resumes with the next run. `--report-only` trains nothing and writes the Markdown of
the finished runs.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from data.batch import Batch
from data.loader import Cycles
from data.synthetic.corpus import CorpusReport, write_corpus
from data.synthetic.planted import SECOND_GROUP
from experiments.planted_effect_report import OFF, REMARKS, to_markdown
from models.conditioner import Features
from models.conditioners.softfilm import SoftFiLM
from models.registry import VARIANTS
from utils.common.cli import command
from utils.common.files import write_text
from utils.config.schema import RunConfig, config_from_dict, config_hash
from utils.evaluation.metadata_test import conditions
from utils.metrics.bootstrap import patient_tables
from utils.training.assemble import build_data, build_frontend, build_trainer, count_parts
from utils.training.device import Runtime
from utils.training.inputs import Inputs
from utils.training.trainer import Trainer

OUTPUT = Path(__file__).resolve().parent.parent / "benchmarks" / "planted_effect.md"
SETTINGS = Path(__file__).with_suffix(".yaml")
#: Every variant with the effect in the first field; in the others only this one.
ATTRIBUTED = "ast_softfilm"
SHUFFLES = 3


class Job(NamedTuple):
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
        return self.data.batch(rows, waveforms=any(row not in self.known for row in rows.tolist()))

    def __call__(self, batch: Batch, seed: int | None) -> Features:
        cycles = batch.cycle.tolist()
        if any(cycle not in self.known for cycle in cycles):
            self.known |= dict(zip(cycles, super().__call__(batch, None).values, strict=True))
        return Features(torch.stack([self.known[cycle] for cycle in cycles]))


class Study:
    """Corpora, runs and their records in one work folder.

    Args:
        work: receives corpora, the waveform cache and a JSON per finished run.
        patients: of each corpus.
        overrides: key=value words on top of planted_effect.yaml.
    """

    def __init__(self, work: Path, patients: int = 160, overrides: Sequence[str] = ()):
        self.work, self.patients, self.overrides = work, patients, list(overrides)
        self.corpus, self.data = cache(self.corpus), cache(self.data)  # read once
        self.known: dict[str, dict[int, Tensor]] = {}  # spectrograms by corpus

    def corpus(self, name: str) -> CorpusReport:
        """The corpus with that field planted; `OFF` is as loud and as regular, but says what is
        heard."""
        field = None if name == OFF else name
        given = {"patients": self.patients, "seed": 0, "event_level": 8, "traps": False}
        return write_corpus(self.work / f"corpus-{name}", planted_effect=field, **given)

    def data(self, name: str) -> Cycles:
        """Its cycles, the same for all runs."""
        self.corpus(name)
        return build_data(self.configure(Job(name, "ast", 0)))

    def configure(self, job: Job) -> RunConfig:
        """Checked configuration of a run."""
        words = [f"dataset.data_folder={self.work / f'corpus-{job.corpus}'}"]
        words += [f"dataset.cache_dir={self.work / 'cache'}", f"training.seed={job.seed}"]
        values = OmegaConf.merge(
            {"models": {job.variant: {}}},
            OmegaConf.load(SETTINGS),
            OmegaConf.from_dotlist(words + self.overrides),
        )
        return config_from_dict(OmegaConf.to_container(values))

    def path(self, job: Job) -> Path:
        """Where the record of a run is kept; another configuration has another one."""
        digest = config_hash(self.configure(job))
        name = f"{job.corpus}-{job.variant}-s{job.seed}-p{self.patients}-{digest}.json"
        return self.work / "records" / name

    def record(self, job: Job) -> dict[str, Any] | None:
        """What is known of a finished run."""
        path = self.path(job)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def run(self, job: Job) -> None:
        """Train, test, and keep the record of a run."""
        config, data = self.configure(job), self.data(job.corpus)
        clock, cpu = time.monotonic(), time.process_time()
        runtime, known = Runtime("cpu", "fp32", "false"), self.known.setdefault(job.corpus, {})
        inputs = Remembered(build_frontend(config), runtime, data, known=known)
        trainer = build_trainer(config, data, runtime, inputs=inputs)
        trainer.fit()
        record = {
            **job._asdict(),
            "seconds": round(time.monotonic() - clock, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "threads": torch.get_num_threads(),
            "counts": {k: count_parts(data)[k] for k in ("train", "test")},
            "train": tables(trainer, data.split.train)["real"],
            "test": tables(trainer, data.split.test, every=job.corpus != OFF),
        }
        conditioner = trainer.model.conditioner
        if isinstance(conditioner, SoftFiLM):
            metadata = data.metadata[torch.from_numpy(data.split.test)]
            effects = conditioner.factor_effects(metadata, centred=True).sum(dim=1)  # [K]
            shares = (100 * effects / effects.sum()).tolist()
            record["shares"] = dict(zip(conditioner.factors, shares, strict=True))
        write_text(self.path(job), json.dumps(record))


def tables(trainer: Trainer, rows: np.ndarray, every: bool = False) -> dict[str, list]:
    """{condition: patient tables [P, C, C] of each prediction}: under real metadata, and for
    `every` condition of the permutation test if the model uses metadata."""
    data, task = trainer.data, trainer.data.task
    table = data.table.iloc[rows]
    asked = [("real", data.metadata[torch.from_numpy(rows)])]
    if every and trainer.model.conditioner.parameter_groups():
        asked = list(conditions(table, data.statistics.transform, shuffles=SHUFFLES, seed=0))
    logits = trainer.predictor.under(rows, [metadata for _, metadata in asked])
    found: dict[str, list] = {}
    for (name, _), values in zip(asked, logits, strict=True):
        pred = task.predicted_classes(task.probabilities(values), task.default_thresholds)
        classes, patients = data.classes(rows), table["PID"].to_numpy()
        counts = patient_tables(classes, pred, patients, len(task.classes))[1]
        found.setdefault(name, []).append(counts.tolist())
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.planted_effect")
    parser.add_argument("--seeds", type=int, default=3, help="runs per variant and corpus")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--fields", nargs="+", choices=list(SECOND_GROUP), default=["site"])
    parser.add_argument("--work", type=Path, default=Path("cache/planted_effect"))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    options = parser.parse_args(argv)
    logging.getLogger("utils").setLevel(logging.WARNING)
    torch.set_num_threads(options.threads)
    study, planned = Study(options.work), jobs(list(dict.fromkeys(options.fields)), options.seeds)
    for number, job in enumerate(planned, start=1):
        if not options.report_only and study.record(job) is None:
            study.run(job)
            print(f"{number} of {len(planned)} finished: {', '.join(map(str, job))}", flush=True)
    finished = [record for job in planned if (record := study.record(job)) is not None]
    text = to_markdown(
        finished,
        {name: study.corpus(name).best_score for name in {r["corpus"] for r in finished}},
        f"# Planted effect, {date.today()}\n\n`python -m experiments.planted_effect --seeds "
        f"{options.seeds} --threads {options.threads} --fields {' '.join(options.fields)}`: "
        f"{len(finished)} of {len(planned)} runs finished.",
    )
    old = options.output.read_text(encoding="utf-8") if options.output.is_file() else ""
    write_text(options.output, f"{text}\n{REMARKS}\n{old.partition(REMARKS)[2].lstrip()}")


if __name__ == "__main__":
    sys.exit(command(main)())
