"""Uncertainty: bootstrap over patients, paired comparisons, several seeds.

Cycles of one patient resemble each other, so the patient is the unit that is resampled. Nearly
every metric is a function of a confusion matrix; a patient's confusion matrix is therefore all the
bootstrap needs, and 10,000 resamples are one matrix product.

P patients, C classes, R runs (seeds), B resamples. Rates are in percent where
`utils.metrics.score` has them in percent.

Percentile bootstrap: B. Efron and R. Tibshirani, "An Introduction to the Bootstrap" (1993), ch. 13.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.metrics.score import metrics_of


@dataclass(frozen=True)
class Interval:
    """A metric with its two-sided bootstrap interval; NaN where it is undefined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """A difference between two models on the same patients; p is two-sided."""

    p: float


@dataclass(frozen=True)
class SeedSummary:
    """Mean and sample standard deviation (n - 1) over runs; sd is NaN for a single run."""

    mean: float
    sd: float
    n: int


def patient_tables(true, pred, patient, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Confusion matrix of each patient.

    Args:
        true, pred: [N] classes; patient: [N] any label of the patient.

    Returns:
        Patients [P] in sorted order, cycle counts [P, C, C] (truth, prediction).
    """
    patients, index = np.unique(np.asarray(patient), return_inverse=True)
    cell = (index * n_classes + np.asarray(true)) * n_classes + np.asarray(pred)
    counts = np.bincount(cell.astype(np.int64), minlength=len(patients) * n_classes**2)
    return patients, counts.reshape(len(patients), n_classes, n_classes)


def patient_weights(n_patients: int, resamples: int, seed: int) -> np.ndarray:
    """[B, P]: how often each patient occurs in each resample of P patients."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_patients, np.full(n_patients, 1 / n_patients), size=resamples)


def _resampled(tables: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics [B, R] of each run in each resample; tables [R, P, C, C]."""
    runs, patients, classes, _ = tables.shape
    flat = tables.transpose(1, 0, 2, 3).reshape(patients, -1).astype(np.float64)
    summed = (weights @ flat).reshape(len(weights), runs, classes, classes)
    return metrics_of(summed)


def _over_runs(tables: np.ndarray) -> np.ndarray:
    tables = np.asarray(tables)
    return tables[None] if tables.ndim == 3 else tables


def percentiles(samples: np.ndarray, level: float) -> tuple[float, float]:
    """Two-sided percentile interval; resamples in which the metric is undefined are left out."""
    samples = samples[~np.isnan(samples)]
    if not len(samples):
        return float("nan"), float("nan")
    tail = 50 * (1 - level)
    low, high = np.percentile(samples, [tail, 100 - tail])
    return float(low), float(high)


def patient_bootstrap(
    tables: np.ndarray, *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> dict[str, Interval]:
    """Percentile intervals over resampled patients.

    Args:
        tables: [P, C, C] of one run, or [R, P, C, C] of several runs on the same patients; then
            the interval is that of the runs' mean.
    """
    tables = _over_runs(tables)
    point = {name: values.mean() for name, values in metrics_of(tables.sum(axis=1)).items()}
    samples = _resampled(tables, patient_weights(tables.shape[1], resamples, seed))
    return {
        n: Interval(float(v), *percentiles(samples[n].mean(axis=1), level))
        for n, v in point.items()
    }


def paired_bootstrap(
    tables_a: np.ndarray, tables_b: np.ndarray, **options: Any
) -> dict[str, Difference]:
    """B minus A on the same cycles; arguments as for `patient_difference`.

    Raises:
        ValueError: the two do not describe the same cycles.
    """
    a, b = _over_runs(tables_a), _over_runs(tables_b)
    if a.shape[1:] != b.shape[1:] or (a[:1].sum(-1) != b.sum(-1)).any():
        raise ValueError("a paired comparison needs the same cycles of the same patients")
    return patient_difference(a, b, **options)


def patient_difference(
    tables_a: np.ndarray,
    tables_b: np.ndarray,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    training_seeds: int = 0,
) -> dict[str, Difference]:
    """B minus A with interval and p; both see the same resampled patients.

    p = 2 min(#{d <= 0} + 1, #{d >= 0} + 1) / (B + 1), at most 1: the smallest level at which the
    percentile interval excludes zero. With several runs per model their means are compared.

    Args:
        tables_a, tables_b: [P, C, C] or [R, P, C, C], the same patients in the same order; where
            the two were tested on different cycles, a patient without any has zeros.
        training_seeds: number S of seeds that A and B were both trained with, their runs in S
            equal parts in the same order. Seeds are then resampled as well, so that trainings that
            differ widen the interval (by too little where S is small: it cannot leave their
            range); 0: it holds the trained models fixed.
    """
    a, b = _over_runs(tables_a), _over_runs(tables_b)
    weights = patient_weights(a.shape[1], resamples, seed)
    samples_a, samples_b = _resampled(a, weights), _resampled(b, weights)
    point_a, point_b = metrics_of(a.sum(axis=1)), metrics_of(b.sum(axis=1))
    out = {}
    for name in point_a:
        value = float(point_b[name].mean() - point_a[name].mean())
        # rounding of equal rates must not decide on which side of zero a tie lies
        d = _mean_difference(samples_a[name], samples_b[name], training_seeds, seed).round(9)
        out[name] = Difference(value, *percentiles(d, level), _two_sided(d))
    return out


def _two_sided(d: np.ndarray) -> float:
    """p of differences [B], of those that are defined."""
    d = d[~np.isnan(d)]
    p = min(1.0, 2 * (min((d <= 0).sum(), (d >= 0).sum()) + 1) / (len(d) + 1))
    return p if len(d) else float("nan")


def _mean_difference(a: np.ndarray, b: np.ndarray, seeds: int, seed: int) -> np.ndarray:
    """Mean of b [B, R] minus mean of a [B, R'] in each resample, [B]; runs in `seeds` equal parts
    are resampled by part."""
    if not seeds:
        return b.mean(axis=1) - a.mean(axis=1)
    own = [x.reshape(len(x), seeds, -1).mean(axis=2) for x in (a, b)]  # [B, S]
    drawn = patient_weights(seeds, len(a), seed + 1)  # apart from the patients' own draws
    return (drawn * (own[1] - own[0])).sum(axis=1) / seeds


class _Pairs:
    """AUROC in every resample. It is the share of (positive, negative) pairs in the right order,
    ties counting half; in a resample each pair counts as often as its two patients were drawn, so
    that W' M W, with the pairs summed per couple of patients in M [P, P], gives all resamples
    without sorting again.

    Args:
        target: [N] 0/1; value: [N]; patient: [N].
    """

    def __init__(self, target, value, patient):
        target, value = np.asarray(target).astype(bool), np.asarray(value, np.float64)
        patients, index = np.unique(np.asarray(patient), return_inverse=True)
        self.positives = np.bincount(index[target], minlength=len(patients))
        self.negatives = np.bincount(index[~target], minlength=len(patients))
        self.won = np.zeros((len(patients), len(patients)))  # rows: the positive's patient
        for j in range(len(patients)):
            rivals = np.sort(value[~target & (index == j)])
            below = np.searchsorted(rivals, value[target], "left")
            upto = np.searchsorted(rivals, value[target], "right")
            beaten = (below + upto) / 2
            self.won[:, j] = np.bincount(index[target], beaten, minlength=len(patients))

    def auroc(self, weights: np.ndarray) -> np.ndarray:
        """[B], NaN where one of the two classes is missing; weights: [B, P]."""
        weights = weights.astype(np.float64)
        pairs = (weights @ self.positives) * (weights @ self.negatives)
        with np.errstate(invalid="ignore"):
            return ((weights @ self.won) * weights).sum(1) / pairs


def auroc_bootstrap(
    target, value, patient, *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """AUROC (0..1) with a patient bootstrap interval.

    Args:
        target: [N] 0/1; value: [N]; patient: [N].
    """
    options = {"resamples": resamples, "seed": seed, "level": level}
    return macro_auroc_bootstrap([[(target, value)]], patient, **options)


#: What AUROCs are averaged over: runs, of each the events' targets [N] 0/1 and values [N].
Rankings = Sequence[Sequence[tuple[np.ndarray, np.ndarray]]]


def _macro_samples(runs: Rankings, patient, weights: np.ndarray) -> np.ndarray:
    """Mean AUROC over the events [B, R] in each resample; the first one is the data themselves."""
    whole = np.concatenate([np.ones((1, weights.shape[1])), weights])
    pairs = ([_Pairs(*event, patient) for event in events] for events in runs)
    return np.stack([np.mean([p.auroc(whole) for p in one], axis=0) for one in pairs], axis=1)


def macro_auroc_bootstrap(
    runs: Rankings, patient, *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean AUROC (0..1) over the events, and over several runs on the same N cycles, with a patient
    bootstrap interval; NaN where an event is in all cycles or in none.

    Args:
        runs: as `Rankings`; patient: [N].
    """
    weights = patient_weights(len(np.unique(patient)), resamples, seed)
    samples = _macro_samples(runs, patient, weights).mean(axis=1)
    if np.isnan(samples[0]):
        return Interval(*[float("nan")] * 3)
    return Interval(float(samples[0]), *percentiles(samples[1:], level))


def macro_auroc_difference(
    a: Rankings,
    b: Rankings,
    patient,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    training_seeds: int = 0,
) -> Difference:
    """B minus A of `macro_auroc_bootstrap` on the same cycles, both under the same resampled
    patients; p and training_seeds as in `patient_difference`."""
    weights = patient_weights(len(np.unique(patient)), resamples, seed)
    first, second = (_macro_samples(runs, patient, weights) for runs in (a, b))
    value = float(second[0].mean() - first[0].mean())
    d = _mean_difference(first[1:], second[1:], training_seeds, seed).round(9)
    return Difference(value, *percentiles(d, level), _two_sided(d))


def average_precision_bootstrap(
    target, value, patient, *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Average precision (0..1) with a patient bootstrap interval.

    AP = sum over thresholds of (recall step) * precision, equal values counting as one threshold,
    as in scikit-learn. In a resample a cycle counts as often as its patient was drawn, so that the
    cycles are sorted once for all resamples.

    Args:
        target: [N] 0/1; value: [N]; patient: [N].
    """
    target, value = np.asarray(target).astype(bool), np.asarray(value, np.float64)
    patients, index = np.unique(np.asarray(patient), return_inverse=True)
    if target.all() or not target.any():
        return Interval(float("nan"), float("nan"), float("nan"))
    order = np.argsort(-value, kind="stable")
    target, index, value = target[order], index[order], value[order]
    last = np.append(np.flatnonzero(np.diff(value)), len(value) - 1)  # of each run of equal values

    def precision_mean(counts: np.ndarray) -> np.ndarray:  # [b, P] -> [b]
        cycles = counts[:, index]
        found = (cycles * target).cumsum(axis=1)[:, last]
        called = cycles.cumsum(axis=1)[:, last]
        step = np.diff(found, axis=1, prepend=0)
        with np.errstate(invalid="ignore"):
            return (step * found / np.maximum(called, 1)).sum(axis=1) / found[:, -1]

    weights = patient_weights(len(patients), resamples, seed)
    chunks = np.array_split(weights, -(-resamples // 200))  # bounds the memory: [200, N] at a time
    samples = np.concatenate([precision_mean(chunk) for chunk in chunks])
    point = precision_mean(np.ones((1, len(patients)), np.int64))[0]
    return Interval(float(point), *percentiles(samples, level))


def over_seeds(values: Sequence[float]) -> SeedSummary:
    """Mean +- sd over runs that differ in the training seed only."""
    values = np.asarray(values, np.float64)
    sd = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
    return SeedSummary(float(values.mean()) if len(values) else float("nan"), sd, len(values))
