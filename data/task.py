"""The classification task: from logits to probabilities to classes.

N cycles, K logits. Three forms: two independent events ("multilabel": crackle, wheeze), one
("binary": abnormal), or four exclusive classes ("exclusive", the `ce` loss). numpy in and out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Order of the scalars in `Metadata.rest` and their units.
SCALARS: tuple[str, ...] = ("age", "bmi", "duration")  # years, kg/m2, s
#: Order of the columns in `Metadata.known`.
FIELDS: tuple[str, ...] = ("device", "site", *SCALARS)

#: The two events of an annotation, and the four exclusive classes made of them.
EVENTS: tuple[str, str] = ("crackle", "wheeze")
CLASSES: tuple[str, ...] = ("normal", "crackle", "wheeze", "both")


@dataclass(frozen=True)
class Task:
    """n_cls 4 | 2 as in dataset.n_cls; exclusive is True for the softmax over four classes."""

    n_cls: int
    exclusive: bool = False

    def __post_init__(self):
        if self.n_cls not in (2, 4) or (self.exclusive and self.n_cls != 4):
            raise ValueError(f"no such task: n_cls={self.n_cls}, exclusive={self.exclusive}")

    @property
    def outputs(self) -> tuple[str, ...]:
        """Name of each logit."""
        if self.exclusive:
            return CLASSES
        return EVENTS if self.n_cls == 4 else ("abnormal",)

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each class; 0 is always normal."""
        return CLASSES if self.n_cls == 4 else ("normal", "abnormal")

    @property
    def n_thresholds(self) -> int:
        """Numbers that a decision rule has: one per event, or one on the abnormal mass."""
        return 2 if self.n_cls == 4 and not self.exclusive else 1

    @property
    def default_thresholds(self) -> tuple[float, ...]:
        """The rule without any choice: 0.5 per event; for exclusive classes the largest wins ()."""
        return () if self.exclusive else (0.5,) * self.n_thresholds

    def labels(self, crackle: np.ndarray, wheeze: np.ndarray) -> np.ndarray:
        """Events [N] of 0/1 -> label [N, C] float32 as in `Batch.label`."""
        if self.n_cls == 4:
            return np.stack([crackle, wheeze], axis=1).astype(np.float32)
        return np.asarray((crackle > 0) | (wheeze > 0), np.float32)[:, None]

    def true_classes(self, label: np.ndarray) -> np.ndarray:
        """label [N, C] -> class [N] int64 (crackle 1, wheeze 2, both 3; or abnormal 1)."""
        label = np.asarray(label) > 0.5
        return (label @ (1 << np.arange(label.shape[1]))).astype(np.int64)

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """logits [N, K] -> [N, K]: sigmoids, or a softmax for exclusive classes."""
        logits = np.asarray(logits, np.float64)
        if self.exclusive:
            e = np.exp(logits - logits.max(axis=1, keepdims=True))
            return e / e.sum(axis=1, keepdims=True)
        return 0.5 * (1.0 + np.tanh(0.5 * logits))  # a sigmoid that cannot overflow

    def predicted_classes(self, probability: np.ndarray, thresholds) -> np.ndarray:
        """[N, K] -> class [N] int64; an output is present when its probability >= threshold.

        Exclusive classes: with one threshold, normal when the abnormal mass is below it, else the
        likeliest abnormal class; with none, the likeliest of all.
        """
        probability = np.asarray(probability)
        if not self.exclusive:
            return self.true_classes(probability >= np.asarray(thresholds, np.float64))
        if len(thresholds) == 0:
            return probability.argmax(axis=1).astype(np.int64)
        abnormal = 1 + probability[:, 1:].argmax(axis=1)
        return np.where(1 - probability[:, 0] >= thresholds[0], abnormal, 0).astype(np.int64)

    def abnormal_score(self, probability: np.ndarray) -> np.ndarray:
        """[N, K] -> [N], grows with the evidence for anything abnormal: largest event
        probability, or the mass outside normal."""
        probability = np.asarray(probability)
        return 1 - probability[:, 0] if self.exclusive else probability.max(axis=1)
