"""Product of experts with a metadata-only prior (Clark et al., "Don't take the easy way out:
ensemble based methods for avoiding known dataset biases", EMNLP 2019, arXiv 1909.03683; Hinton,
Neural Computation 14 (2002) 1771)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data.batch import Metadata
from data.task import FIELDS, SCALARS
from models.config import PriorProductConfig
from models.method import Method, TrainingCycles
from utils.common.errors import UserError


class PriorProduct(Method):
    """In training the loss sees logits(sound, metadata) + strength * b(metadata); evaluation sees
    the model's logits alone.

    b is what models of the metadata alone say: for each output the log-odds, or for exclusive
    classes the log-probabilities, of a classifier fitted by scikit-learn on the training cycles of
    all other patients (`folds` groups of patients), so that no patient informs the prior of its own
    cycles. The product of experts p ~ p_model * p_prior^strength fits the labels as soon as the
    model knows what the metadata do not say, and its gradient rewards nothing else. The mean of b
    over the training cycles stays with the model, so that its base rate does, too (Clark et al.
    leave out all of b).

    The prior is fitted once, before the training, and is part of the model's state.
    """

    def __init__(self, config: PriorProductConfig, exclusive: bool):
        super().__init__()
        self.config, self.exclusive = config, exclusive
        self.register_buffer("cycle", torch.empty(0, dtype=torch.int64))  # [N], ascending
        self.register_buffer("prior", torch.empty(0, 1))  # [N, K]

    def prepare(self, cycles: TrainingCycles) -> None:
        label = cycles.label.numpy() > 0.5
        if self.exclusive:
            label = label @ np.array([1, 2])
        features = design(cycles.metadata, self.config.fields)
        values = cross_fitted(self.config, features, label, cycles.patient.numpy())
        values -= values.mean(axis=0)
        device = self.prior.device
        self.cycle = cycles.cycle.to(device)
        self.prior = torch.from_numpy(values).float().to(device)

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        for name in ("cycle", "prior"):  # as long as the training part that it was fitted on
            if (saved := state_dict.get(prefix + name)) is not None:
                own = getattr(self, name)
                setattr(self, name, own.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def logits(self, logits: Tensor, aside) -> Tensor:
        place = torch.searchsorted(self.cycle, aside.cycle)
        return logits + self.config.strength * self.prior[place]


def design(metadata: Metadata, fields: list[str]) -> np.ndarray:
    """Metadata of N cycles -> [N, P]: device and site one-hot with unknown last, scalars
    z-scored; the named fields only."""
    known, columns = metadata.known.numpy(), []
    for column, name in enumerate(FIELDS):
        if name not in fields:
            continue
        if name in SCALARS:
            values = metadata.rest[:, SCALARS.index(name)].numpy()
            columns.append(np.where(known[:, column], values, 0.0)[:, None])
        else:
            index = getattr(metadata, name).numpy()
            unknown = index.max(initial=0) + 1
            index = np.where(known[:, column], index, unknown)
            columns.append(np.eye(unknown + 1)[index])
    return np.concatenate(columns, axis=1).astype(np.float64)


def cross_fitted(
    config: PriorProductConfig, features: np.ndarray, label: np.ndarray, patient: np.ndarray
) -> np.ndarray:
    """Out-of-fold logits [N, K] of a classifier of features [N, P], one per column of label [N, K]
    bool, or one of its classes 0..3 where label is [N]; folds are groups of patients [N]."""
    from sklearn.model_selection import GroupKFold

    folds = min(config.folds, len(np.unique(patient)))
    if folds < 2:
        raise UserError(
            "methods.prior_product is cross-fitted over patients and the training part has one; "
            "add recordings, or leave the method out"
        )
    out = np.empty((len(label), 4 if label.ndim == 1 else label.shape[1]))
    for fit, held in GroupKFold(folds).split(features, groups=patient):
        if label.ndim == 1:
            out[held] = _log_probability(config, features[fit], label[fit], features[held], 4)
            continue
        for k, target in enumerate(label.T.astype(np.int64)):
            shares = _log_probability(config, features[fit], target[fit], features[held], 2)
            out[held, k] = shares[:, 1] - shares[:, 0]
    return out


def _log_probability(
    config: PriorProductConfig, x: np.ndarray, target: np.ndarray, held: np.ndarray, classes: int
) -> np.ndarray:
    """Fitted on x [N, P] and target [N]: log-probability of each class for held [M, P]. Classes
    that the fold lacks, and a fold of one class, get their smoothed frequency."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression

    counts = np.bincount(target, minlength=classes) + 0.5
    out = np.tile(np.log(counts / counts.sum()), (len(held), 1))
    if len(np.unique(target)) > 1:
        linear = config.learner == "linear"
        model = (
            LogisticRegression(max_iter=2000)
            if linear
            else HistGradientBoostingClassifier(random_state=0)
        )
        fitted = model.fit(x, target)
        out[:, fitted.classes_] = np.log(fitted.predict_proba(held).clip(1e-6, 1.0))
    return out


def build(config: PriorProductConfig, *, n_outputs: int, **_: int) -> PriorProduct:
    """The method for so many outputs; four are exclusive classes."""
    return PriorProduct(config, exclusive=n_outputs == 4)
