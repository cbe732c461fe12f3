"""The Markdown of `experiments.planted_effect`: records of runs -> tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.harness import table
from models.registry import VARIANTS
from utils.metrics.bootstrap import over_seeds, paired_bootstrap
from utils.metrics.score import metrics_of

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


def stacked(records: Sequence[Record], condition: str = "real") -> np.ndarray:
    """Patient tables [R, P, C, C] of all runs on the test part; shufflings count as runs."""
    return np.concatenate([np.asarray(record["test"][condition]) for record in records])


def scores(records: Sequence[Record], condition: str = "real", metric: str = "score") -> list:
    """A metric (percent) of each run; shufflings are averaged."""
    return [float(metrics_of(stacked([r], condition).sum(axis=1))[metric].mean()) for r in records]


def mean(values: Sequence[float]) -> str:
    """Mean ± sd."""
    found = over_seeds(values)
    return f"{found.mean:.1f}" + ("" if np.isnan(found.sd) else f" ± {found.sd:.1f}")


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
        shares = [
            mean([r["shares"][factor] for r in group]) if group else "" for group in (runs, off)
        ]
        lost = []
        for name in MEMBERS[factor]:
            pairs = zip(scores(runs), scores(runs, f"{name} unknown"), strict=True)
            lost.append(f"{name} {mean([real - hidden for real, hidden in pairs])}")
        rows[factor] = dict(
            zip(
                (
                    "share of the modulation, %",
                    "share with nothing planted, %",
                    "Score lost when unknown, points",
                ),
                (*shares, "; ".join(lost)),
                strict=True,
            )
        )
    return table(rows)


def to_markdown(records: Sequence[Record], best: dict[str, dict | None], head: str) -> str:
    """The whole page.

    Args:
        records: finished runs.
        best: corpus -> `CorpusReport.best_score`.
        head: title and command.
    """
    parts = [head, INTRODUCTION]
    for record in records[:1]:
        counts = [
            f"{v['cycles']} {k} cycles of {v['patients']} patients"
            for k, v in record["counts"].items()
        ]
        cpu, threads = np.median([r["cpu_seconds"] for r in records]), record["threads"]
        parts.append(
            f"{', '.join(counts)}. A run took {cpu:.0f} s of processor time (median) with "
            f"{threads} thread(s)."
        )
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
