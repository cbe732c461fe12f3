"""Ways to take the prior out of the metadata, where the truth is known.

Two synthetic corpora (docs/data.md). In one, a device that cannot be heard is mostly abnormal in
training and mostly normal in the test half (`reversed_prior`): a model that learns the prior
falls. In the other, the site decides what a sound means and says nothing by itself (the planted
interaction): a way that makes the model deaf to the metadata loses the gain.

Runs are those of experiments.planted_effect: its settings, its loop, one JSON per finished run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.harness import table
from data.synthetic.corpus import CorpusReport, write_corpus
from data.synthetic.planted import REVERSED_DEVICE
from experiments import planted_effect as planted
from experiments.planted_effect import write_page
from models.registry import VARIANTS
from utils.config.schema import RunConfig
from utils.metrics.bootstrap import Difference, paired_bootstrap

OUTPUT = Path(__file__).parent / "results" / "shift_synthetic.md"
REVERSED, INTERACTION = "reversed", "site"
#: Way -> key=value words. The plain form first.
WAYS = {
    "plain": [],
    "prior product": ["methods.prior_product.strength=1.0"],
    "balance by device": ["training.balance=[device]"],
    "group DRO": ["methods.group_dro.step_size=0.01"],
    "metadata dropout": ["models.ast_film.metadata_dropout_joint=0.5"],
}
#: Variants that are trained under every way; the others in the plain form, on the first corpus.
TRIED = ("ast_film",)
INTRODUCTION = """Synthetic sounds of invented patients; the figures say what a way does to a \
prior that was planted, nothing about patients. ICBHI Score in percent, four classes, test part, \
the last epoch's weights, thresholds 0.5; mean ± sd over seeds. Differences are in points, with \
95 % intervals over resampled test patients and resampled seeds (both paired; with few seeds too \
narrow)."""


class Job(NamedTuple):
    """One run."""

    corpus: str
    variant: str
    seed: int
    way: str = "plain"


def jobs(seeds: int) -> list[Job]:
    """All runs, seed by seed."""
    found = []
    for seed in range(seeds):
        for way in WAYS:
            every = way == "plain"
            for corpus in (REVERSED, INTERACTION):
                names = [v for v in VARIANTS if v in TRIED or (every and corpus == REVERSED)]
                names = ["ast", *names] if every and "ast" not in names else names
                found += [Job(corpus, name, seed, way) for name in names]
    return found


class Study(planted.Study):
    """Corpora, runs and records, with a way as part of a run."""

    event_level = 2.0  # of the first corpus: sounds that leave room for a prior

    def corpus(self, name: str) -> CorpusReport:
        given = {"patients": self.patients, "seed": 0, "traps": False}
        if name == REVERSED:
            given |= {"reversed_prior": REVERSED_DEVICE, "event_level": self.event_level}
        else:
            given |= {"planted_effect": name, "event_level": 8}
        return write_corpus(self.work / f"corpus-{name}", **given)

    def configure(self, job: Any) -> RunConfig:
        words = list(self.overrides)
        self.overrides = [*words, *WAYS[getattr(job, "way", "plain")]]
        try:
            return super().configure(job)
        finally:
            self.overrides = words


def difference(a: Sequence[dict], b: Sequence[dict]) -> Difference | None:
    """Score of b minus that of a, over the seeds that both have."""
    common = sorted({r["seed"] for r in a} & {r["seed"] for r in b})
    if not common:
        return None
    pair = ([next(r for r in group if r["seed"] == s) for s in common] for group in (a, b))
    first, second = (planted.stacked(group) for group in pair)
    return paired_bootstrap(first, second, training_seeds=len(common))["score"]


def shown(found: Difference | None) -> str:
    return "" if found is None else f"{found.value:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"


def corpus_table(records: Sequence[dict], corpus: str) -> str:
    """Every variant and way on one corpus, minus the plain AST and minus its own plain form; on the
    interaction the share of the plain form's gain that is kept."""
    inside = [r for r in records if r["corpus"] == corpus]
    base = [r for r in inside if (r["variant"], r["way"]) == ("ast", "plain")]
    rows = {}
    for variant in VARIANTS:
        plain = [r for r in inside if (r["variant"], r["way"]) == (variant, "plain")]
        for way in WAYS:
            runs = [r for r in inside if (r["variant"], r["way"]) == (variant, way)]
            if not runs:
                continue
            row = {"n": len(runs), "Score": planted.mean(planted.scores(runs))}
            row |= {k: planted.mean(planted.scores(runs, metric=k.lower())) for k in ("Sp", "Se")}
            row["shuffled metadata"] = ""
            if "shuffled" in runs[0]["test"]:
                row["shuffled metadata"] = planted.mean(planted.scores(runs, "shuffled"))
            row["minus plain AST"] = "" if runs == base else shown(difference(base, runs))
            row["minus its plain form"] = "" if way == "plain" else shown(difference(plain, runs))
            if corpus == INTERACTION:
                gain = [np.mean(planted.scores(x)) for x in (base, plain, runs)]
                kept = 100 * (gain[2] - gain[0]) / (gain[1] - gain[0]) if runs != base else np.nan
                row["gain kept, %"] = "" if np.isnan(kept) else f"{kept:.0f}"
            rows[f"{VARIANTS[variant].title}, {way}"] = row
    return table(rows)


def to_markdown(records: Sequence[dict], head: str) -> str:
    """The page of the finished runs."""
    parts = [head, INTRODUCTION]
    titles = {
        REVERSED: f"A prior that turns round: {REVERSED_DEVICE} is mostly abnormal in training, "
        "mostly normal in the test half",
        INTERACTION: "The planted interaction: the site decides what a sound means",
    }
    for corpus, title in titles.items():
        inside = [r for r in records if r["corpus"] == corpus]
        if inside:
            sizes = [
                f"{v['cycles']} {k} cycles of {v['patients']} patients"
                for k, v in inside[0]["counts"].items()
            ]
            parts += [f"## {title}", f"{', '.join(sizes)}.", corpus_table(records, corpus)]
    listed = [
        f"- {r['corpus']}, {VARIANTS[r['variant']].title}, {r['way']}, seed {r['seed']}: Score "
        f"{planted.scores([r])[0]:.1f}, {r['cpu_seconds']:.0f} s of processor time"
        for r in records
    ]
    return "\n\n".join([*parts, "## Every run", "\n".join(listed)]) + "\n"


def run(options: argparse.Namespace, words: Sequence[str]) -> None:
    """Train what is not finished, one process's worth, and write the page."""
    torch.set_num_threads(1)
    study = Study(options.work / "synthetic", options.patients, words)
    planned = jobs(options.seeds or 3)
    for number, job in enumerate(planned, start=1):
        if not options.report_only and study.record(job) is None:
            study.run(job)
            print(f"{number} of {len(planned)} finished: {', '.join(map(str, job))}", flush=True)
    found = [record for job in planned if (record := study.record(job)) is not None]
    head = f"# Ways to take out a planted prior, {date.today()}\n\n`{options.shown}`: "
    head += f"{len(found)} of {len(planned)} runs finished."
    write_page(options.output or OUTPUT, to_markdown(found, head))
