"""Fuse finished runs into one model, trained and chosen as any run is.

    python -m utils.runs.fuse --checkpoints runs/*/checkpoints/best.pt [--fusion mean] \\
        [--title MVST] [key=value ...]

gated: a gate per model on its features and one linear head over their sum, as in MVST (He et al.,
ICASSP 2024): AdamW, lr 1e-3, weight decay 1e-4, 100 epochs, batch 8. mean: the mean of the models'
probabilities, where only the thresholds are chosen. The models are not trained further; what they
say of each cycle is computed once, without augmentation. Data, split, validation patients and rule
of selection are theirs and must be the same in all; the loss is the first one's unless set. Only
dataset.batch_size, training.* and mlflow.* can be set, but for training.selection.

The result is a run folder like any other; its checkpoint names the fused ones, which must stay.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from data.loader import Cycles
from models.fusion import FusionModel
from utils.common.cli import command, set_up_logging
from utils.common.errors import UserError
from utils.common.files import sha256
from utils.config.merge import merge, parse_override
from utils.config.schema import RunConfig, config_from_dict, config_to_dict
from utils.evaluation.trained_model import FusedModel, TrainedModel, member_features
from utils.runs.run import Run
from utils.training.assemble import build_model
from utils.training.device import Runtime
from utils.training.fingerprint import difference
from utils.training.inputs import Inputs, KnownInputs

logger = logging.getLogger(__name__)

MAY_SET = re.compile(r"dataset\.batch_size|mlflow\.\w+|training\.(?!selection$)\w+")
#: The gate's own recipe; the mean has nothing to train.
GATED = {"epochs": 100, "lr": 1e-3, "weight_decay": 1e-4, "warmup_epochs": 0}
MEAN = {"epochs": 1, "warmup_epochs": 0, "early_stopping_patience": 0}


class FusedRun(Run):
    """A run whose model takes what other trained models say."""

    def __init__(self, config: RunConfig, runtime: Runtime, members: Sequence[TrainedModel]):
        super().__init__(config, runtime)
        self.members = members

    def model(self, data: Cycles) -> FusionModel:
        torch.manual_seed(self.config.training.seed)
        model = build_model(self.config, data.statistics)
        logger.info("%d parameters", sum(p.numel() for p in model.parameters()))
        return model

    def inputs(self, data: Cycles, model: FusionModel) -> Inputs:
        def compute(rows: np.ndarray) -> torch.Tensor:
            return member_features(self.config.fusion.kind, self.members, rows)

        return KnownInputs(compute, self.runtime, data)


def fused_config(
    members: Sequence[TrainedModel], kind: str, title: str | None, overrides: Sequence[str] = ()
) -> RunConfig:
    """Configuration of the fused run.

    Raises:
        UserError: a key that follows from the checkpoints.
    """
    first = members[0].checkpoint.run_config()
    titles = dict.fromkeys(member.title for member in members)
    paths = [folder.best if (folder := m.run_folder) else m.path for m in members]
    values = config_to_dict(first)
    values["models"], values["methods"] = {"ast": {}}, {}  # what is fused says more
    values["backbone"] |= {"weights": "none", "adapter": "none"}
    values["augment"]["enabled"] = False
    values["audio"]["clip_seconds"] = max(m.config.audio.clip_seconds for m in members)
    values["audio"]["buckets"] = None  # features of all cycles have one shape
    values["dataset"]["batch_size"] = 8
    values["training"] |= {"sam_rho": 0.0} | (GATED if kind == "gated" else MEAN)
    values["fusion"] = {
        "kind": kind,
        "title": title or f"{' and '.join(titles)} + {kind} fusion of {len(members)}",
        "members": [sha256(path) for path in paths],
        "checkpoints": [str(path) for path in paths],
    }
    merged = OmegaConf.create(values)
    for word in overrides:
        if not MAY_SET.fullmatch(word.partition("=")[0]):
            raise UserError(
                f"{word}: data, split and models of a fusion are those of its checkpoints; only "
                "dataset.batch_size, training.* (but for training.selection) and mlflow.* can be "
                "set"
            )
        merged = merge(merged, parse_override(word), "on the command line")
    return config_from_dict(OmegaConf.to_container(merged))


def check_members(members: Sequence[TrainedModel], kind: str) -> None:
    """Refuse checkpoints that were not trained and chosen on the same cycles, by the same rule.

    Raises:
        UserError: names the first pair that differs, and in what.
    """
    first = members[0]
    for other in members:
        if isinstance(other, FusedModel):
            raise UserError(f"{other.path} is a fusion itself; give the checkpoints that it fuses")
        if other.path.is_dir():
            raise UserError(f"{other.path} is a folder; give the run's checkpoints/best.pt")
    for other in members[1:]:
        why = _why_not(first, other, kind)
        if why:
            raise UserError(f"{first.path} and {other.path} cannot be fused: {why}")
    if len({sha256(model.path) for model in members}) < len(members):
        raise UserError("two of the checkpoints are the same file; name each once")


def _why_not(first: TrainedModel, other: TrainedModel, kind: str) -> str:
    one, two = first.config, other.config
    if one.dataset.n_cls != two.dataset.n_cls:
        return f"one has {one.dataset.n_cls} classes, the other {two.dataset.n_cls}"
    if first.selection is not other.selection:
        return f"training.selection is {first.selection.value} and {other.selection.value}"
    differs = difference(first.checkpoint.fingerprint, other.checkpoint.fingerprint)
    if differs:
        return f"they were trained on different data ({differs})"
    (_, a), (_, b) = first.corpus, other.corpus
    if not np.array_equal(a.test, b.test):
        return "they have different splits (other test cycles)"
    if not np.array_equal(a.val, b.val):
        return "they have different validation patients (dataset.val_seed, dataset.val_fraction)"
    if not np.array_equal(a.train, b.train):
        return "they have different training cycles"
    if kind == "gated" and one.backbone.embed_dim != two.backbone.embed_dim:
        return (
            f"their features are {one.backbone.embed_dim} and {two.backbone.embed_dim} wide; use "
            "--fusion mean"
        )
    if kind == "mean" and first.task.exclusive != other.task.exclusive:
        return "one was trained with training.loss=ce, the other was not; use --fusion gated"
    return ""


def fuse(
    checkpoints: Sequence[str | Path],
    kind: str = "gated",
    title: str | None = None,
    overrides: Sequence[str] = (),
) -> Run:
    """Train (or resume, or show) the fusion of some checkpoints.

    Raises:
        UserError: they cannot be fused, or a key cannot be set.
    """
    if len(checkpoints) < 2:
        raise UserError("--checkpoints needs two checkpoints or more")
    device = [w.partition("=")[2] for w in overrides if w.startswith("training.device=")]
    options = {"device": device[-1]} if device else {}
    members = [TrainedModel.open(path, **options) for path in checkpoints]
    check_members(members, kind)
    config = fused_config(members, kind, title, overrides)
    training = config.training
    runtime = Runtime(training.device, training.precision, training.compile)
    set_up_logging(quiet=not runtime.is_main)
    run = FusedRun(config, runtime, members)
    if not run.already_finished():
        with run:
            data = run.data()
            run.test(run.fit(run.model(data), data))
    return run


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m utils.runs.fuse", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--checkpoints", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--fusion", choices=("gated", "mean"), default="gated")
    parser.add_argument("--title", metavar="NAME", help="in reports and tables, such as MVST")
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [w for w in given if "=" in w and not w.startswith("-") and not Path(w).is_file()]
    options = parser.parse_args([word for word in given if word not in words])
    fuse(options.checkpoints, options.fusion, options.title, words)


if __name__ == "__main__":
    raise SystemExit(main())
