"""Metadata permutation test: the same model with real, shuffled and unknown metadata.

A conditioned model that relies on the sound loses a little when its metadata are wrong; one that
recognises the patient loses what it had above the metadata-only baselines. Metadata are changed in
the cycle table, before the training statistics turn them into numbers, or hidden by
`Metadata.without`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pandas as pd

from data.batch import Metadata
from data.fields import field_values
from data.task import FIELDS, Task
from utils.metrics.bootstrap import paired_bootstrap, patient_bootstrap, patient_tables
from utils.metrics.score import metrics_of

#: Kinds of metadata under which each device's Score is given.
BY_DEVICE = ("real", "shuffled", "all unknown")
#: Columns that a patient's donor gives; all describe the same patient, so they go together.
DONATED = ("Device", "Age", "BMI", "CW", "CH", "BMIDerived")


def derangement(n: int, rng: np.random.Generator) -> np.ndarray:
    """[n] permutation without a fixed point (n = 1 has none: the identity).

    A cycle through all elements in random order; not every derangement is one, but each element
    meets every other with the same probability.
    """
    order = rng.permutation(n)
    target = np.empty(n, np.int64)
    target[order] = np.roll(order, 1)
    return target


def shuffle_metadata(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Cycle table in which metadata keep their distribution but belong to another patient.

    Each patient gets another patient's age, BMI and device (of a donor with several devices, the
    one with most cycles); sites are permuted among the recordings; duration stays, being part of
    the sound. Recordings and patients of `table` only, so test metadata stay test metadata.

    Args:
        table: rows of the cycle table, of one part.
    """
    rng = np.random.default_rng(seed)
    out = table.copy()
    patients = np.sort(table["PID"].unique())
    donor = dict(zip(patients, patients[derangement(len(patients), rng)], strict=True))
    columns = [name for name in DONATED if name in table.columns]
    given = table.groupby("PID")[columns].first()
    given["Device"] = table.groupby("PID")["Device"].agg(_most_frequent)
    drawn = given.loc[table["PID"].map(donor)]
    for name in columns:
        out[name] = drawn[name].to_numpy()
    site = table.groupby("Filename")["AuscLoc"].first()
    swapped = pd.Series(site.to_numpy()[derangement(len(site), rng)], index=site.index)
    out["AuscLoc"] = table["Filename"].map(swapped).to_numpy()
    return out


def _most_frequent(values: pd.Series):
    counts = values.value_counts(sort=False).sort_index()
    return counts.idxmax() if len(counts) else None


def conditions(
    table: pd.DataFrame, transform: Callable[[pd.DataFrame], Metadata], *, shuffles: int, seed: int
) -> Iterator[tuple[str, Metadata]]:
    """(name, metadata of all rows of `table`): real, shuffled (several), hidden.

    Args:
        transform: `data.metadata.MetadataStatistics.transform` of the checkpoint.
    """
    real = transform(table)
    yield "real", real
    for k in range(shuffles):
        yield "shuffled", transform(shuffle_metadata(table, seed + k))
    yield "all unknown", real.without(*FIELDS)
    for field in FIELDS:
        yield f"{field} unknown", real.without(field)


def metadata_test(
    predict: Callable[[Sequence[Metadata]], Iterable[np.ndarray]],
    table: pd.DataFrame,
    transform: Callable[[pd.DataFrame], Metadata],
    task: Task,
    thresholds: tuple[float, ...],
    *,
    shuffles: int = 3,
    seed: int = 0,
    bootstrap: int = 2000,
) -> list[dict]:
    """Metrics under each kind of metadata and their paired difference to the real ones.

    Args:
        predict: several metadata of all N rows -> for each, probability [N, K] of the same N
            cycles' sounds. All are asked for at once, so that the sounds are read once.
        table: the N rows of the cycle table, one part.
        thresholds: the model's; they stay the same.
        shuffles: number of shufflings, whose metrics are averaged.

    Returns:
        Rows `metadata`, `runs` (predictions averaged), metrics in percent, `difference` (Score
        minus that with real metadata, points, a `Difference`) and, of `BY_DEVICE`, `devices`
        (device -> cycles, patients, Score with its interval; the device is the true one).
    """
    true = task.true_classes(task.labels(table["Crackles"].to_numpy(), table["Wheezes"].to_numpy()))
    names, metadata = zip(*conditions(table, transform, shuffles=shuffles, seed=seed), strict=True)
    counts: dict[str, list[np.ndarray]] = {}
    decided: dict[str, list[np.ndarray]] = {}
    for name, probability in zip(names, predict(metadata), strict=True):
        pred = task.predicted_classes(probability, thresholds)
        _, tables = patient_tables(true, pred, table["PID"].to_numpy(), len(task.classes))
        counts.setdefault(name, []).append(tables)
        decided.setdefault(name, []).append(pred)
    rows = []
    for name, tables in counts.items():
        stacked = np.stack(tables)
        point = {k: float(v.mean()) for k, v in metrics_of(stacked.sum(axis=1)).items()}
        found = paired_bootstrap(np.stack(counts["real"]), stacked, resamples=bootstrap, seed=seed)
        row = {"metadata": name, "runs": len(tables)} | point
        if name in BY_DEVICE:
            row["devices"] = _by_device(table, true, decided[name], len(task.classes), bootstrap)
        rows.append(row | {"difference": found["score"]})
    return rows


def _by_device(
    table: pd.DataFrame, true: np.ndarray, preds: list[np.ndarray], n_classes: int, bootstrap: int
) -> dict[str, dict[str, float]]:
    """Device -> cycles, patients, Score (mean over `preds`) and its patient interval."""
    devices, out = field_values(table, ["device"]), {}
    for device in sorted(set(devices.tolist())):
        inside = devices == device
        patient = table["PID"].to_numpy()[inside]
        tables = [patient_tables(true[inside], p[inside], patient, n_classes)[1] for p in preds]
        score = patient_bootstrap(np.stack(tables), resamples=bootstrap)["score"]
        sizes = {"cycles": int(inside.sum()), "patients": len(set(patient.tolist()))}
        out[device] = sizes | {"score": score.value, "low": score.low, "high": score.high}
    return out
