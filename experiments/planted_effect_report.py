"""The Markdown of `experiments.planted_effect`: records of runs -> tables and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any

import numpy as np

from models.registry import VARIANTS
from utils.metrics.bootstrap import Difference, over_seeds, paired_bootstrap
from utils.metrics.score import metrics_of

OFF = "off"
PLAIN, SOFT = "ast", "ast_softfilm"
#: What stands below this line in an existing file is kept: a person's remarks on the figures.
REMARKS = "<!-- Below this line: written by hand, kept by the command. -->"
HIDDEN = ("real", "shuffled", "all unknown")
#: Factor of SoftFiLM that carries a planted field.
FACTOR = {"site": "site", "device": "device", "age": "rest"}

Record = dict[str, Any]


def tables(records: Sequence[Record], condition: str = "real") -> np.ndarray:
    """Patient tables [R, P, C, C] of all runs on the test part; shufflings count as runs."""
    return np.concatenate([np.asarray(record["test"][condition]) for record in records])


def scores(records: Sequence[Record], condition: str = "real", figure: str = "score") -> list:
    """A figure (percent) of each run; shufflings are averaged."""
    return [float(metrics_of(tables([r], condition).sum(axis=1))[figure].mean()) for r in records]


def difference(
    records: Sequence[Record], base: Sequence[Record], condition: str = "real"
) -> Difference | None:
    """Score of `records` under a condition minus that of `base`, over the seeds both have.

    Both see the same resampled test patients and seeds. None: no common seed.
    """
    common = sorted({r["seed"] for r in records} & {r["seed"] for r in base})
    if not common:
        return None
    by_seed = [{r["seed"]: r for r in group} for group in (base, records)]
    a, b = ([runs[seed] for seed in common] for runs in by_seed)
    found = paired_bootstrap(tables(a), tables(b, condition), training_seeds=len(common))
    return found["score"]


def to_markdown(
    records: Sequence[Record],
    best: dict[str, dict | None],
    *,
    wanted: int,
    command: str,
    setup: str,
    day: date,
    remarks: str = "",
) -> str:
    """The whole file.

    Args:
        records: finished runs.
        best: corpus -> `CorpusReport.best_score`.
        wanted: number of runs the command asks for.
        setup: how a run was trained, one sentence without its stop.
        remarks: text below `REMARKS`.
    """
    fields = [name for name in dict.fromkeys(r["corpus"] for r in records) if name != OFF]
    lines = [
        f"# Planted effect, {day}",
        "",
        f"`{command}`: {len(records)} of {wanted} runs finished.",
        "",
        "Synthetic sounds of invented patients (docs/synthetic_corpus.md); the figures say whether "
        "a variant can use metadata, nothing about patients. ICBHI Score in percent, four classes, "
        "test part; mean ± sd over n seeds. Differences are in points, with 95 % intervals over "
        "resampled test patients and resampled seeds (both paired). With few seeds the latter part "
        "is too narrow, and they do not cover what other training patients would change.",
        "",
        *_training(records, setup),
    ]
    off = [r for r in records if r["corpus"] == OFF]
    for place, name in enumerate(fields):
        runs = [r for r in records if r["corpus"] == name]
        lines += ["", f"## Effect planted in the field {name}", "", *_reachable(best[name])]
        if place == 0:
            lines += ["", *_variants(runs, best[name]["test"]["4"]["sound_and_field"])]
            alone = best[name]["test"]["4"]["sound"]
            lines += ["", "### Metadata real, shuffled, unknown", "", *_metadata(runs, alone)]
        lines += _attribution(name, _soft(runs), _soft(off))
    if off:
        lines += ["", "## No effect planted", "", "Annotations say what is heard.", ""]
        lines += _variants(off, None)
    return "\n".join(lines) + "\n\n" + REMARKS + "\n" + remarks


def _soft(records: Sequence[Record]) -> list[Record]:
    return [r for r in records if r["variant"] == SOFT]


def remarks_of(text: str) -> str:
    """What a person wrote below the tables of an existing file."""
    return text.partition(REMARKS + "\n")[2]


def _training(records: Sequence[Record], setup: str) -> list[str]:
    if not records:
        return []
    counts = records[0]["counts"]
    cpu, clock = ([r[name] for r in records] for name in ("cpu_seconds", "seconds"))
    threads = "/".join(map(str, sorted({r["threads"] for r in records})))
    parts = (
        f"{counts[p]['cycles']} {word} cycles of {counts[p]['patients']} patients"
        for p, word in (("train", "training"), ("test", "test"))
    )
    return [
        f"{', '.join(parts)}. {setup}. A run took {np.median(cpu):.0f} s of processor time "
        f"(largest {max(cpu):.0f}) with {threads} thread(s); other programs shared the cores "
        f"(on the clock median {np.median(clock):.0f} s, largest {max(clock):.0f})."
    ]


def _reachable(best: dict) -> list[str]:
    found = best["test"]["4"]
    return [
        f"Best reachable Score on this test part: {found['sound']:.1f} by sound alone, "
        f"{found['sound_and_field']:.1f} by sound and field, {found['field']:.1f} by the field "
        "alone."
    ]


def _of(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Runs of each variant, in the registry's order."""
    found = {name: [r for r in records if r["variant"] == name] for name in VARIANTS}
    return {name: runs for name, runs in found.items() if runs}


def _mean(values: Sequence[float]) -> str:
    found = over_seeds(values)
    spread = "" if np.isnan(found.sd) else f" ± {found.sd:.1f}"
    return f"{found.mean:.1f}{spread}"


def _interval(found: Difference | None) -> str:
    return "" if found is None else f"{found.value:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"


def _variants(records: Sequence[Record], reachable: float | None) -> list[str]:
    """One row per variant; `reachable`: best Score with metadata where they decide."""
    by_variant = _of(records)
    base = by_variant.get(PLAIN, [])
    last = " | of the way to the best" if reachable else ""
    rows = [
        f"| | n | Score | Sp | Se | training Score | minus plain AST{last} |",
        "|---|---:|---:|---:|---:|---:|---:|" + ("---:|" if reachable else ""),
    ]
    for name, runs in by_variant.items():
        trained = [float(metrics_of(np.asarray(r["train"][0]).sum(axis=0))["score"]) for r in runs]
        cells = [VARIANTS[name].title, str(len(runs))]
        cells += [_mean(scores(runs, figure=figure)) for figure in ("score", "sp", "se")]
        cells.append(_mean(trained))
        found = None if name == PLAIN else difference(runs, base)
        cells.append(_interval(found))
        if reachable:
            plain = np.mean(scores(base)) if base else np.nan
            cells.append(
                "" if found is None else f"{100 * found.value / (reachable - plain):.0f} %"
            )
        rows.append("| " + " | ".join(cells) + " |")
    return [*rows, "", *_verdict(by_variant, base, planted=reachable is not None)]


def _verdict(by_variant: dict[str, list[Record]], base: list[Record], planted: bool) -> list[str]:
    differences = {
        VARIANTS[name].title: found
        for name, runs in by_variant.items()
        if name != PLAIN and (found := difference(runs, base)) is not None
    }
    above = [title for title, found in differences.items() if found.low > 0]
    below = [title for title, found in differences.items() if found.high < 0]
    level = [title for title in differences if title not in above + below]
    said = [
        f"{text}: {', '.join(titles)}."
        for text, titles in (
            ("Better than the plain AST (interval above 0)", above),
            ("Worse (interval below 0)", below),
            ("No different beyond the interval", level),
        )
        if titles
    ]
    expected = "better" if planted else "no different"
    return [f"Expected of a conditioned variant: {expected}. " + " ".join(said)]


def _metadata(records: Sequence[Record], alone: float) -> list[str]:
    """Score of the trained models when their metadata are wrong or missing.

    Args:
        alone: best reachable Score by sound alone.
    """
    by_variant = _of(records)
    base = by_variant.get(PLAIN, [])
    rows = [
        "| | n | real | shuffled | all unknown | shuffled minus plain AST "
        "| all unknown minus plain AST |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    left, beyond = [], []
    for name, runs in by_variant.items():
        if name == PLAIN:
            continue
        cells = [VARIANTS[name].title, str(len(runs))]
        cells += [_mean(scores(runs, condition)) for condition in HIDDEN]
        found = {c: difference(runs, base, c) for c in HIDDEN[1:]}
        cells += [_interval(value) for value in found.values()]
        rows.append("| " + " | ".join(cells) + " |")
        title = VARIANTS[name].title
        left += [f"{title} ({c})" for c, d in found.items() if d and d.low > 0]
        beyond += [f"{title} ({c})" for c in found if np.mean(scores(runs, c)) > alone]
    verdict = [
        f"More than sound alone can reach ({alone:.1f}), against expectation: {', '.join(beyond)}."
        if beyond
        else f"Without the right metadata no Score is above what sound alone can reach "
        f"({alone:.1f}), as it must be."
    ]
    if left:
        verdict.append(
            f"Still above the plain AST (interval above 0): {', '.join(left)}. What is left can "
            "only be better hearing: to the plain AST the same sound is annotated in two ways, "
            "and it learned less from the sounds."
        )
    return [*rows, "", " ".join(verdict)]


def _attribution(field: str, runs: Sequence[Record], off: Sequence[Record]) -> list[str]:
    """Which factor SoftFiLM used, by size of modulation and by what is lost without it.

    Args:
        off: its runs with nothing planted, whose shares are what the planted ones must exceed.
    """
    if not runs:
        return []
    factors = list(runs[0]["shares"])
    shares, idle = ({f: [r["shares"][f] for r in group] for f in factors} for group in (runs, off))
    members = {"device": ["device"], "site": ["site"], "rest": ["age", "bmi", "duration"]}
    head = ("factor", "share of the modulation, %", "share with nothing planted, %")
    rows = ["| " + " | ".join(head) + " | Score lost when unknown, points |"]
    rows.append("|---|---:|---:|---:|")
    for factor in factors:
        lost = []
        for name in members[factor]:
            pairs = zip(scores(runs), scores(runs, f"{name} unknown"), strict=True)
            prefix = f"{name} " if len(members[factor]) > 1 else ""
            lost.append(prefix + _mean([real - hidden for real, hidden in pairs]))
        nothing = _mean(idle[factor]) if off else ""
        rows.append(f"| {factor} | {_mean(shares[factor])} | {nothing} | {'; '.join(lost)} |")
    gained = {f: np.mean(shares[f]) - (np.mean(idle[f]) if off else 0) for f in factors}
    largest = max(factors, key=gained.get)
    right = "as it should be" if largest == FACTOR[field] else f"and not {FACTOR[field]}"
    most = "The share that has grown most" if off else "The largest share"
    return [
        "",
        f"### Which factor SoftFiLM used (n = {len(runs)}, Score {_mean(scores(runs))})",
        "",
        *rows,
        "",
        "Share: norm of each factor's masked scale and shift minus its mean over the test cycles, "
        "summed over blocks; what every cycle receives alike tells nothing. "
        f"{most} has {largest}, {right}.",
    ]
