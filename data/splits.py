"""Which cycles train, validate and test; by patient wherever the protocol leaves the choice.

`recordings` is no protocol of ours: it repeats what the public code of some published systems does
in place of the official split, so that its effect can be measured.

Everything here is a pure function of the cycle table's columns PID, Split, Fold, Device, Crackles
and Wheezes and of the settings. Labels of the test part are never used, so that permuting
them changes nothing; the exception is `foldwise`, whose five folds are balanced by class over all
patients before any of them is the test part (as a stratified k-fold is). Random order comes from
SHA-256 of (seed, patient), so every version of every library on every machine chooses the same
patients.
"""

from __future__ import annotations

import hashlib
import logging
import random
from dataclasses import dataclass

import numpy as np
import pandas as pd

from data.config import LEAKY, DatasetConfig
from data.cycle_table import classes_of
from data.task import CLASSES
from utils.common.errors import UserError

log = logging.getLogger(__name__)

N_FOLDS = 5
FOLD_SEED = 0
_RESTARTS = 200  # random orders that are tried; the best balanced choice is kept


@dataclass(frozen=True)
class Split:
    """Row numbers of the cycle table, each sorted, int64; no row is in two parts.

    Attributes:
        train: rows the model is fitted on.
        val: rows of the validation patients; empty under selection `fixed` and `test`.
        test: rows of the test part.
    """

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def patients_in_both_halves(table: pd.DataFrame) -> list[int]:
    """Patients with cycles in both halves of the official split (156 and 218 in ICBHI 2017)."""
    halves = table.groupby("PID")["Split"].nunique()
    return sorted(halves.index[halves > 1].tolist())


def split_by(dataset: DatasetConfig, table: pd.DataFrame, selection: str = "validation") -> Split:
    """`split_cycles` as the section `dataset` says."""
    return split_cycles(
        table,
        strategy=dataset.split_strategy,
        test_fold=dataset.test_fold,
        test_device=dataset.test_device,
        split_seed=dataset.split_seed,
        test_fraction=dataset.test_fraction,
        val_fraction=dataset.val_fraction,
        val_seed=dataset.val_seed,
        selection=selection,
        n_cls=dataset.n_cls,
    )


def split_cycles(
    table: pd.DataFrame,
    *,
    strategy: str = "official",
    test_fold: int = 0,
    test_device: str | None = None,
    split_seed: int = 0,
    test_fraction: float = 0.4,
    val_fraction: float = 0.2,
    val_seed: int = 0,
    selection: str = "validation",
    n_cls: int = 4,
) -> Split:
    """Divide the cycle table into training, validation and test rows.

    Args:
        strategy: official | official_disjoint (without the test cycles of patients who are in
            train, too) | foldwise | random | leave_device_out (all of a device's cycles; the
            other devices' cycles of its patients are in no part) | training_half (as random, of
            the official training half; the test half is in no part) | recordings
            (`shuffled_recordings`; leaks patients).
        test_fold: foldwise: the fold (0..4) that is tested.
        test_device: leave_device_out: the device.
        split_seed: random, training_half: seed of the choice of test patients.
        test_fraction: random, training_half: share of the cycles (and patients) that is tested.
        val_fraction: share of the training cycles whose patients are held out.
        val_seed: seed of the choice of validation patients.
        selection: with `fixed` and `test` the validation part is empty and train is whole.
        n_cls: with 2, crackle or wheeze may be missing in training, but not both.

    Raises:
        UserError: a part that the data cannot fill.
    """
    in_test = _test_rows(table, strategy, test_fold, split_seed, test_fraction, test_device)
    given = (table["Split"] == "val").to_numpy()  # a part of several corpora
    unused = _unused_rows(table, strategy, in_test)
    train, test = np.flatnonzero(~in_test & ~given & ~unused), np.flatnonzero(in_test)
    if strategy == "leave_device_out":
        table = table.assign(Split="train")  # the official halves play no part
    if strategy in LEAKY:  # its halves are the ones that patients are shared by
        table = table.assign(Split=np.where(in_test, "test", "train"))
    if strategy.startswith("official") or strategy in LEAKY:
        both = patients_in_both_halves(table)
        shared = table["PID"].iloc[test].isin(both).to_numpy()
        if strategy == "official_disjoint":
            test = test[~shared]
        elif strategy in LEAKY:
            log.warning(
                "split_strategy %s has %d patients in both halves (%d of %d test cycles); "
                "dataset.split_strategy=official is the split to report",
                *(strategy, len(both), shared.sum(), len(test)),
            )
        elif both:
            log.warning(
                "the official split has patients %s in both halves (%d of %d test cycles); "
                "dataset.split_strategy=official_disjoint leaves those test cycles out",
                *(", ".join(map(str, both)), shared.sum(), len(test)),
            )
    _check_parts(table, train, test, strategy, n_cls)
    val = np.flatnonzero(given)
    if selection == "validation" and not len(val):
        chosen = choose_validation_patients(table.iloc[train], table, val_fraction, val_seed)
        held_out = table["PID"].iloc[train].isin(chosen).to_numpy()
        train, val = train[~held_out], train[held_out]
        _warn_of_missing_classes(table, val, "validation part")
    return Split(train, val, test)


def assign_folds(table: pd.DataFrame) -> np.ndarray:
    """[N] int64 fold (0..4) of each cycle: patient-wise, classes and patients balanced.

    Depends on the annotations alone, never on which audio is present.
    """
    counts = _patient_counts(table, with_classes=True)
    fold = dict.fromkeys(counts.index, N_FOLDS - 1)
    left = counts
    for number in range(N_FOLDS - 1):
        target = left.sum().to_numpy() / (N_FOLDS - number)
        chosen = _choose(left, target, FOLD_SEED + number, leave=N_FOLDS - 1 - number)
        if not chosen and len(left):  # fewer patients than folds: one each as long as they last
            chosen = [left.index[0]]
        fold.update(dict.fromkeys(chosen, number))
        left = left.drop(index=chosen)
    return table["PID"].map(fold).to_numpy(np.int64)


def choose_validation_patients(
    train: pd.DataFrame, table: pd.DataFrame, fraction: float, seed: int
) -> list[int]:
    """Patients of `train` that are held out for validation.

    Whole patients, about `fraction` of the cycles of every class and of the patients. Patients in
    both halves of the official split stay in train, and so does the last training patient of each
    device and each class.

    Raises:
        UserError: no patient can be spared.
    """
    counts = _patient_counts(train, with_classes=True)
    devices = pd.crosstab(train["PID"], train["Device"])
    holds = pd.concat([devices, counts[list(CLASSES)]], axis=1) > 0
    pinned = [pid for pid in patients_in_both_halves(table) if pid in counts.index]
    target = fraction * counts.sum().to_numpy()
    chosen = _choose(counts.drop(index=pinned), target, seed, holds=holds)
    if not chosen:
        raise UserError(
            f"no validation patient can be spared among the {len(counts)} training patients "
            f"(dataset.val_fraction {fraction:g}); add recordings, or set training.selection=fixed"
        )
    return chosen


def shuffled_recordings(names: pd.Series) -> list[str]:
    """Recordings that train under `recordings`, whoever the patient is.

    All names sorted, shuffled by Python's generator with seed 1, the first 60 %: as in the public
    code of MVST (arXiv 2311.09655), ADD-RSC (arXiv 2506.02505) and RSC-FTF.
    """
    shuffled = sorted(set(names))
    random.Random(1).shuffle(shuffled)
    return shuffled[: int(0.6 * len(shuffled))]


def _test_rows(
    table: pd.DataFrame,
    strategy: str,
    test_fold: int,
    split_seed: int,
    test_fraction: float,
    test_device: str | None,
) -> np.ndarray:
    """Boolean mask [N] of the test rows."""
    if strategy == "leave_device_out":
        found = (table["Device"] == test_device).to_numpy()
        if not found.any():
            names = ", ".join(sorted(table["Device"].dropna().unique()))
            raise UserError(
                f"dataset.test_device={test_device} recorded no cycle; the devices are {names}"
            )
        return found
    if strategy == "training_half":
        half = (table["Split"] == "train").to_numpy()
        inside = _test_rows(table[half], "random", test_fold, split_seed, test_fraction, None)
        found = np.zeros(len(table), bool)
        found[half] = inside
        return found
    if strategy == "foldwise":
        return (table["Fold"] == test_fold).to_numpy()
    if strategy == "random":  # by cycles and patients: balancing classes would use test labels
        counts = _patient_counts(table, with_classes=False)
        chosen = _choose(counts, test_fraction * counts.sum().to_numpy(), split_seed)
        return table["PID"].isin(chosen).to_numpy()
    if strategy == "recordings":
        return ~table["Filename"].isin(shuffled_recordings(table["Filename"])).to_numpy()
    return (table["Split"] == "test").to_numpy()


def _unused_rows(table: pd.DataFrame, strategy: str, in_test: np.ndarray) -> np.ndarray:
    """Boolean mask [N] of the rows that are in no part."""
    if strategy == "training_half":
        return (table["Split"] == "test").to_numpy()
    if strategy != "leave_device_out":
        return np.zeros(len(table), bool)
    tested = table["PID"].isin(table["PID"][in_test]).to_numpy()
    unused = tested & ~in_test
    log.info(
        "leave_device_out: %d cycles of %d patients are tested; %d cycles that %d of these have on "
        "other devices are left out of training",
        *(in_test.sum(), table["PID"][in_test].nunique()),
        *(unused.sum(), table["PID"][unused].nunique()),
    )
    return unused


def _check_parts(
    table: pd.DataFrame, train: np.ndarray, test: np.ndarray, strategy: str, n_cls: int
) -> None:
    for rows, part in ((train, "training"), (test, "test")):
        if len(rows) == 0:
            raise UserError(
                f"no cycle is in the {part} part of the {len(table)} cycles (dataset."
                f"split_strategy {strategy}); add recordings or choose another split_strategy"
            )
    labels = classes_of(table.iloc[train])
    events = {"crackle": labels & 1, "wheeze": labels & 2} if n_cls == 4 else {"abnormal": labels}
    present = {"normal": labels == 0} | events
    instead = ", or set dataset.n_cls=2" if n_cls == 4 else ""
    for name, found in present.items():
        if not found.any():
            raise UserError(
                f"no training cycle of {len(train)} has the class {name}, so it cannot be "
                f"learned; add recordings or choose another dataset.split_strategy{instead}"
            )
    _warn_of_missing_classes(table, train, "training part")


def _warn_of_missing_classes(table: pd.DataFrame, rows: np.ndarray, part: str) -> None:
    present = set(classes_of(table.iloc[rows]).tolist())
    missing = [name for number, name in enumerate(CLASSES) if number not in present]
    if missing:
        log.warning("the %s has no cycle of class %s", part, ", ".join(missing))


def _patient_counts(table: pd.DataFrame, with_classes: bool) -> pd.DataFrame:
    """Per patient (index PID, sorted): cycles, 1 (the patient), and cycles of each class."""
    counts = pd.DataFrame({"cycles": table.groupby("PID").size(), "patients": 1})
    if with_classes:
        classes = pd.crosstab(table["PID"], classes_of(table))
        classes = classes.reindex(columns=range(len(CLASSES)), fill_value=0)
        counts[list(CLASSES)] = classes.to_numpy()
    return counts


def _choose(
    counts: pd.DataFrame,
    target: np.ndarray,
    seed: int,
    *,
    holds: pd.DataFrame | None = None,
    leave: int = 1,
) -> list[int]:
    """Patients whose summed counts come close to `target`, in each column's own scale.

    Greedy in random order: a patient joins if that brings the sum nearer to the target; the best
    of `_RESTARTS` orders is kept.

    Args:
        counts: one row per patient that may be chosen.
        target: intended sum of each column.
        seed: of the orders.
        holds: one row per patient, bool; every column that any patient holds must still be held
            by a patient who is not chosen.
        leave: least number of patients that are left over.
    """
    patients = counts.index.tolist()
    rows = counts.to_numpy(np.float64)  # [P, K]
    holds = pd.DataFrame(index=counts.index) if holds is None else holds.astype(np.int64)
    spare = np.maximum(holds.sum().to_numpy(np.int64) - 1, 0)  # [H], holders who may go
    held = holds.loc[counts.index].to_numpy(np.int64)  # [P, H]
    weight = 1.0 / np.maximum(target, 1e-9)
    missing = np.tile(target.astype(np.float64), (_RESTARTS, 1))  # [R, K]
    spare = np.tile(spare, (_RESTARTS, 1))  # [R, H]
    chosen = np.zeros((_RESTARTS, len(patients)), bool)
    every = np.arange(_RESTARTS)
    order = np.array([_shuffled(patients, seed, restart) for restart in every], np.int64)
    for pick in order.T:  # [R], one patient per restart
        rest = missing - rows[pick]
        nearer = _distance(rest * weight) < _distance(missing * weight)
        free = (spare >= held[pick]).all(axis=1) & (chosen.sum(axis=1) + leave < len(holds))
        join = nearer & free
        missing = np.where(join[:, None], rest, missing)
        spare = spare - join[:, None] * held[pick]
        chosen[every, pick] = join
    final = np.where(chosen.any(axis=1), _distance(missing * weight), np.inf)
    return [patients[position] for position in np.flatnonzero(chosen[final.argmin()])]


def _distance(missing: np.ndarray) -> np.ndarray:
    return (missing**2).sum(axis=1)


def _shuffled(patients: list[int], seed: int, restart: int) -> list[int]:
    """Positions of the patients in the random order of this seed and restart."""
    digests = [hashlib.sha256(f"{seed}:{restart}:{pid}".encode()).digest() for pid in patients]
    return sorted(range(len(patients)), key=digests.__getitem__)
