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

from benchmarks.harness import table
from data.batch import Batch
from data.loader import Cycles
from data.synthetic.corpus import CorpusReport, write_corpus
from data.synthetic.planted import SECOND_GROUP
from models.conditioner import Features
from models.conditioners.softfilm import SoftFiLM
from models.registry import VARIANTS
from utils.common.cli import command, quiet
from utils.common.files import write_text
from utils.config.schema import RunConfig, config_from_dict, config_hash
from utils.evaluation.metadata_test import conditions
from utils.metrics.bootstrap import over_seeds, paired_bootstrap, patient_tables
from utils.metrics.score import metrics_of
from utils.training.assemble import build_data, build_frontend, build_trainer, count_parts
from utils.training.device import Runtime
from utils.training.inputs import Inputs
from utils.training.trainer import Trainer

OUTPUT = Path(__file__).resolve().parent.parent / "benchmarks" / "planted_effect.md"
SETTINGS = Path(__file__).with_suffix(".yaml")
#: Every variant with the effect in the first field; in the others only this one.
ATTRIBUTED = "ast_softfilm"
SHUFFLES = 3
OFF = "off"
#: What stands below this line in an existing file is kept: a person's remarks on the figures.
REMARKS = "<!-- Below this line: written by hand, kept by the command. -->"
#: Metadata fields of each factor of SoftFiLM.
MEMBERS = {"device": ["device"], "site": ["site"], "rest": ["age", "bmi", "duration"]}
INTRODUCTION = """Synthetic sounds of invented patients (docs/data.md); the figures \
say whether a variant can use metadata, nothing about patients. ICBHI Score in percent, four \
classes, test part, thresholds 0.5; mean ± sd over n seeds. Differences are in points, with 95 % \
intervals over resampled test patients and resampled seeds (both paired). With few seeds the \
latter part is too narrow, and they do not cover what other training patients would change."""
SHARE = """Share: norm of each factor's masked scale and shift minus its mean over the test \
cycles, summed over blocks; what every cycle receives equally carries no information."""

Record = dict[str, Any]


def write_page(path: Path, text: str) -> None:
    """Write a page, above the remarks that a person added to the file."""
    kept = path.read_text(encoding="utf-8").partition(REMARKS)[2] if path.is_file() else ""
    write_text(path, f"{text.rstrip()}\n\n{REMARKS}\n\n{kept.strip()}".rstrip() + "\n")


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
    cycles = data.table.iloc[rows]
    asked = [("real", data.metadata[torch.from_numpy(rows)])]
    if every and trainer.model.conditioner.parameter_groups():
        asked = list(conditions(cycles, data.statistics.transform, shuffles=SHUFFLES, seed=0))
    logits = trainer.predictor.under(rows, [metadata for _, metadata in asked])
    found: dict[str, list] = {}
    for (name, _), values in zip(asked, logits, strict=True):
        pred = task.predicted_classes(task.probabilities(values), task.default_thresholds)
        classes, patients = data.classes(rows), cycles["PID"].to_numpy()
        counts = patient_tables(classes, pred, patients, len(task.classes))[1]
        found.setdefault(name, []).append(counts.tolist())
    return found


def stacked(records: Sequence[Record], condition: str = "real") -> np.ndarray:
    """Patient tables [R, P, C, C] of all runs on the test part; shufflings count as runs."""
    return np.concatenate([np.asarray(record["test"][condition]) for record in records])


def scores(records: Sequence[Record], condition: str = "real", metric: str = "score") -> list:
    """A metric (percent) of each run; shufflings are averaged."""
    return [float(metrics_of(stacked([r], condition).sum(axis=1))[metric].mean()) for r in records]


def mean(values: Sequence[float]) -> str:
    """Mean ± sd."""
    found = over_seeds(values)
    spread = "" if np.isnan(found.sd) else f" ± {found.sd:.1f}"
    return f"{found.mean:.1f}{spread}" if found.n else ""


def minus(records: Sequence[Record], base: Sequence[Record], condition: str = "real") -> str:
    """Score of `records` under a condition minus that of `base`, over the seeds both have, on the
    same resampled test patients and seeds."""
    common = sorted({r["seed"] for r in records} & {r["seed"] for r in base})
    if not common or records is base:
        return ""
    a, b = ([{r["seed"]: r for r in group}[s] for s in common] for group in (base, records))
    seeds = len(common)
    found = paired_bootstrap(stacked(a), stacked(b, condition), training_seeds=seeds)["score"]
    return f"{found.value:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"


def by_variant(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Runs of each variant, in the registry's order."""
    found = {name: [r for r in records if r["variant"] == name] for name in VARIANTS}
    return {name: runs for name, runs in found.items() if runs}


def variants_table(records: Sequence[Record], reachable: float | None) -> str:
    """One row per variant; `reachable`: best Score with metadata where they decide."""
    found, rows = by_variant(records), {}
    base = found.get("ast", [])
    for name, runs in found.items():
        row = {"n": len(runs), "Score": mean(scores(runs))}
        row |= {k: mean(scores(runs, metric=k.lower())) for k in ("Sp", "Se")}
        train = [np.asarray(r["train"][0]).sum(axis=0) for r in runs]
        row["training Score"] = mean([float(metrics_of(t)["score"]) for t in train])
        row["minus plain AST"] = minus(runs, base)
        if reachable and base:
            start = np.mean(scores(base))
            way = (np.mean(scores(runs)) - start) / (reachable - start)
            row["of the way to the best"] = "" if runs is base else f"{100 * way:.0f} %"
        rows[VARIANTS[name].title] = row
    return table(rows)


def metadata_table(records: Sequence[Record]) -> str:
    """Score of the trained models when their metadata are wrong or missing."""
    found, rows = by_variant(records), {}
    base = found.pop("ast", [])
    for name, runs in found.items():
        row = {"n": len(runs)}
        row |= {c: mean(scores(runs, c)) for c in ("real", "shuffled", "all unknown")}
        for condition in ("shuffled", "all unknown"):
            row[f"{condition} minus plain AST"] = minus(runs, base, condition)
        rows[VARIANTS[name].title] = row
    return table(rows)


def attribution_table(runs: Sequence[Record], off: Sequence[Record]) -> str:
    """Which factor SoftFiLM used, by size of modulation and by what is lost without it.

    Args:
        off: its runs with nothing planted, whose shares are what the planted ones must exceed.
    """
    rows = {}
    for factor in runs[0]["shares"]:
        lost = []
        for name in MEMBERS[factor]:
            pairs = zip(scores(runs), scores(runs, f"{name} unknown"), strict=True)
            lost.append(f"{name} {mean([real - hidden for real, hidden in pairs])}")
        rows[factor] = {
            "share of the modulation, %": mean([r["shares"][factor] for r in runs]),
            "share with nothing planted, %": mean([r["shares"][factor] for r in off]),
            "Score lost when unknown, points": "; ".join(lost),
        }
    return table(rows)


def to_markdown(records: Sequence[Record], best: dict[str, dict | None], head: str) -> str:
    """The whole page from finished runs; best: corpus -> `CorpusReport.best_score`; head: title and
    command."""
    if not records:
        return f"{head}\n"
    threads, seconds = records[0]["threads"], np.median([r["cpu_seconds"] for r in records])
    sizes = [
        f"{v['cycles']} {k} cycles of {v['patients']} patients"
        for k, v in records[0]["counts"].items()
    ]
    time = f"A run took {seconds:.0f} s of processor time (median) with {threads} thread(s)."
    parts = [head, INTRODUCTION, f"{', '.join(sizes)}. {time}"]
    off = [r for r in records if r["corpus"] == OFF]
    for place, name in enumerate(dict.fromkeys(r["corpus"] for r in records if r["corpus"] != OFF)):
        runs, reach = [r for r in records if r["corpus"] == name], best[name]["test"]["4"]
        parts += [
            f"## Effect planted in the field {name}",
            f"Best reachable Score on this test part: {reach['sound']:.1f} by sound alone, "
            f"{reach['sound_and_field']:.1f} by sound and field, {reach['field']:.1f} by the field "
            "alone.",
        ]
        if place == 0:
            parts += [variants_table(runs, reach["sound_and_field"])]
            parts += ["### Metadata real, shuffled, unknown", metadata_table(runs)]
        if soft := by_variant(runs).get("ast_softfilm"):
            parts.append(f"### Which factor SoftFiLM used (n = {len(soft)})")
            parts += [attribution_table(soft, by_variant(off).get("ast_softfilm", [])), SHARE]
    if off:
        parts += [
            "## No effect planted",
            "Annotations say what is heard.",
            variants_table(off, None),
        ]
    return "\n\n".join(parts) + "\n"


@quiet()
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
    write_page(options.output, text)


if __name__ == "__main__":
    sys.exit(command(main)())
