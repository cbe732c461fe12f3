"""What the training cycles say about the metadata: vocabularies, imputation, scaling, counts."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from data.batch import Metadata
from data.cycle_table import SCALAR_COLUMNS
from data.task import FIELDS, SCALARS
from utils.common.errors import UserError

log = logging.getLogger(__name__)

#: (statistics, unseen value) that were warned of: a run transforms its table several times.
_warned: set[tuple[MetadataStatistics, str]] = set()


@dataclass(frozen=True)
class MetadataStatistics:
    """What the training cycles say about the metadata; all that evaluation needs of them.

    Scalars stand in the order of `data.batch.SCALARS` (age years, BMI kg/m2, duration s). A
    missing value is imputed with `medians` and then z-scored like any other, and counts as known:
    the imputed value is what a model sees in training and at evaluation. (An unknown scalar,
    z = 0, is for evaluation with a field hidden, see `Metadata.without`.) Whether the BMI was
    known is in the table: BMIDerived is NaN where not.

    Attributes:
        medians: of the known training values, after the derivation of BMI.
        mean, std: of the training cycles after imputation (population form); std is 1 where the
            training cycles do not differ.
        device_counts: training cycles per device, the last entry counts the unknown ones.
        site_counts: the same per site.
        level: mean and std of ready-made spectrograms over the training cycles; None with audio.
        devices, sites: the corpus' vocabularies; an index is a position there, and the index
            after the last name means unknown.
    """

    medians: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device_counts: tuple[int, ...]
    site_counts: tuple[int, ...]
    devices: tuple[str, ...]
    sites: tuple[str, ...]
    level: tuple[float, float] | None = None

    @classmethod
    def fit(
        cls,
        train_table: pd.DataFrame,
        devices: Sequence[str] | None = None,
        sites: Sequence[str] | None = None,
    ) -> MetadataStatistics:
        """Statistics of the training cycles (rows of the cycle table).

        devices, sites: vocabularies of the corpus; None: the names that the training cycles have.
        """
        devices = _names(train_table["Device"]) if devices is None else devices
        sites = _names(train_table["AuscLoc"]) if sites is None else sites
        values = _scalars(train_table)  # [N, 3]
        medians = [
            float(np.median(v[~np.isnan(v)])) if (~np.isnan(v)).any() else 0.0 for v in values.T
        ]  # a scalar that is never known is 0 everywhere, z = 0
        values = np.where(np.isnan(values), medians, values)
        std = values.std(axis=0)
        std[std < 1e-6 * np.maximum(np.abs(values).max(axis=0), 1.0)] = 1.0
        counts = (
            np.bincount(_indices(train_table[column], names), minlength=len(names) + 1)
            for column, names in (("Device", devices), ("AuscLoc", sites))
        )
        return cls(
            tuple(medians),
            tuple(values.mean(axis=0).tolist()),
            tuple(std.tolist()),
            *(tuple(count.tolist()) for count in counts),
            tuple(devices),
            tuple(sites),
        )

    @property
    def scale(self) -> np.ndarray:
        """[3] what scalars are divided by: `std`, and infinity where the training cycles do not
        differ: no weight has learned what another value means, so every value is z = 0."""
        std = np.array(self.std)
        return np.where((std == 1) & np.isclose(self.mean, self.medians), np.inf, std)

    def transform(self, table: pd.DataFrame, *, warn: bool = True) -> Metadata:
        """`Metadata` of all N rows of a cycle table.

        A device or site that is missing, not in the vocabulary or never seen in training becomes
        unknown, with one warning per process that names it (unless `warn` is False).
        """
        values = _scalars(table)
        values = np.where(np.isnan(values), self.medians, values)
        device, site, unseen = self._seen(table)
        unseen = unseen if warn else {}
        if notes := {name: n for name, n in unseen.items() if (self, name) not in _warned}:
            named = "; ".join(f"{name} ({n} cycles)" for name, n in notes.items())
            log.warning("not seen in training, treated as unknown: %s", named)
            _warned.update((self, name) for name in notes)
        known = np.ones((len(table), len(FIELDS)), bool)
        known[:, 0] = device < len(self.devices)
        known[:, 1] = site < len(self.sites)
        rest = (values - np.array(self.mean)) / self.scale
        return Metadata(
            device=torch.from_numpy(device),
            site=torch.from_numpy(site),
            rest=torch.from_numpy(rest.astype(np.float32)),
            known=torch.from_numpy(known),
        )

    def unseen(self, table: pd.DataFrame) -> dict[str, int]:
        """Cycles whose device or site is unknown to a model, by what they have: `device X`."""
        return self._seen(table)[2]

    def _seen(self, table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        device, devices = _seen(table["Device"], self.devices, self.device_counts, "device")
        site, sites = _seen(table["AuscLoc"], self.sites, self.site_counts, "site")
        return device, site, devices | sites

    def to_dict(self) -> dict:
        """Plain lists, numbers and strings, fit for `torch.load(weights_only=True)` and JSON."""
        values = {key: list(value) for key, value in vars(self).items() if value is not None}
        return {"scalars": list(SCALARS)} | values

    @classmethod
    def from_dict(cls, content: dict) -> MetadataStatistics:
        """Inverse of `to_dict`.

        Raises:
            UserError: it is incomplete, or of other scalars.
        """
        n = {}  # names in each vocabulary, 0 for what is none
        for key in ("devices", "sites"):
            names = content.get(key)
            good = isinstance(names, list) and all(isinstance(name, str) for name in names)
            n[key] = len(names) if good and len(set(names)) == len(names) else 0
        expected = {
            **{"medians": 3, "mean": 3, "std": 3},
            **{"device_counts": n["devices"] + 1, "site_counts": n["sites"] + 1},
            **({"level": 2} if "level" in content else {}),
        }
        least = {"std": 1e-9, "device_counts": 0, "site_counts": 0}
        wrong = [key for key in n if n[key] == 0]
        for key, length in expected.items():
            value = content.get(key)
            if not (
                isinstance(value, list)
                and len(value) == length
                and all(isinstance(x, int | float) and math.isfinite(x) for x in value)
                and min(value) >= least.get(key, -math.inf)
            ):
                wrong.append(key)
        if content.get("scalars") != list(SCALARS) or wrong:
            raise UserError(
                f"metadata statistics: {', '.join(wrong) or 'scalars'} cannot be used; use a "
                "checkpoint written by this version of the code"
            )
        return cls(**{key: tuple(content[key]) for key in (*expected, *n)})


def _names(column: pd.Series) -> tuple[str, ...]:
    """Distinct names in alphabetical order; one that nothing has where all are unknown."""
    return tuple(sorted(column.dropna().astype(str).unique())) or ("unnamed",)


def _scalars(table: pd.DataFrame) -> np.ndarray:
    """[N, 3] float64, columns `SCALAR_COLUMNS`; NaN where missing or not finite."""
    values = table[list(SCALAR_COLUMNS)].to_numpy(np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _indices(names: pd.Series, vocabulary: Sequence[str]) -> np.ndarray:
    """[N] int64 into the vocabulary, its length for anything else."""
    index = {name: number for number, name in enumerate(vocabulary)}
    return np.array([index.get(name, len(vocabulary)) for name in names], np.int64)


def _seen(
    names: pd.Series, vocabulary: Sequence[str], counts: Sequence[int], field: str
) -> tuple[np.ndarray, dict[str, int]]:
    """(indices with the unseen ones mapped to unknown, cycles by what the warning names)."""
    indices = _indices(names, vocabulary)
    unknown = len(vocabulary)
    trained = np.array([*(count > 0 for count in counts[:unknown]), False])
    unseen = ~trained[indices]
    shown = names[unseen].map(lambda name: name if isinstance(name, str) else "missing")
    notes = {f"{field} {name}": n for name, n in shown.value_counts().items()}
    return np.where(unseen, unknown, indices), notes
