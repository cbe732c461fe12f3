"""An opened checkpoint: configuration, statistics, thresholds, model and front end on a device.

`TrainedModel.open` needs no data, and `logits` takes any `Batch`. The cycles of the data folder are
read when `data` (or what rests on it) is first asked for; nothing is fitted or chosen again.
"""

from __future__ import annotations

import filecmp
import logging
import textwrap
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from data.batch import Batch, Metadata
from data.cycle_table import SCALAR_COLUMNS
from data.frontend import AudioFrontend
from data.loader import Cycles, batches_of, buckets_of
from data.splits import Split
from data.statistics import MetadataStatistics
from data.synthetic.corpus import is_synthetic
from models.build import ConditionedAST
from models.conditioner import Conditioner
from utils.common.errors import UserError
from utils.common.files import sha256
from utils.evaluation.report import Origin
from utils.metrics.predictions import make_predictions
from utils.metrics.protocol import Selection, caption, is_leaky
from utils.training.assemble import (
    build_data,
    build_frontend,
    build_inputs,
    build_split,
    count_parts,
)
from utils.training.checkpoint import Checkpoint, git_revision, load_checkpoint
from utils.training.device import Runtime, describe
from utils.training.inputs import KnownInputs, heard
from utils.training.predict import Predictor
from utils.training.runfolder import RunFolder
from utils.training.shared_folder import located

logger = logging.getLogger(__name__)


class TrainedModel:
    """A checkpoint ready for use.

    Args:
        path: where it was read; checkpoint: its content.
        data_folder: read instead of the folder that the checkpoint names.
        corpus_file: YAML whose section `dataset` names another corpus to judge the model on.
        device: auto | cpu | cuda; None: as configured.
        batch_size: cycles per forward pass; None: as configured. Another one, like another device,
            changes the logits by rounding.
    """

    def __init__(
        self,
        path: str | Path,
        checkpoint: Checkpoint,
        *,
        data_folder: str | None = None,
        corpus_file: str | Path | None = None,
        device: str | None = None,
        batch_size: int | None = None,
    ):
        self.path, self.checkpoint = Path(path), checkpoint
        self.config = checkpoint.config_to_read(data_folder, corpus_file)
        self.task = self.config.task
        self.selection = Selection(checkpoint.selection)
        self.thresholds = checkpoint.thresholds
        self.corpus_file = corpus_file and Path(corpus_file)
        self.other_folder = data_folder is not None or corpus_file is not None
        self.batch_size = batch_size or self.config.dataset.batch_size
        self._device = device or self.config.training.device

    @classmethod
    def open(cls, path: str | Path, **options) -> TrainedModel:
        """Read a checkpoint, a shared folder or a hub's USER/NAME; options: as above.

        Raises:
            UserError: no such file, or no checkpoint of this repository.
        """
        path = located(path)
        checkpoint = load_checkpoint(path)
        fused = checkpoint.config.get("fusion", {}).get("members")
        return (FusedModel if fused else cls)(path, checkpoint, **options)

    @property
    def title(self) -> str:
        """Name in figures and tables, such as FiLM-AST."""
        return self.config.title

    def headline(self) -> str:
        """Task, protocol, data, epochs and date: which model this is, at most 100 columns."""
        config, checkpoint = self.config, self.checkpoint
        saved = datetime.fromtimestamp(self.path.stat().st_mtime)
        text = caption(f"{self.title}, {self.task.n_cls}-class", self.selection,
                       bool(checkpoint.partial), self.synthetic, self.leaky)  # fmt: skip
        text += (
            f"; {config.dataset.split_strategy} split, seed {config.training.seed}, epoch "
            f"{checkpoint.epoch + 1} of {config.training.epochs}, saved {saved:%Y-%m-%d %H:%M}"
        )
        if self.corpus_file:
            text += f"; judged on {config.dataset.name} {', '.join(config.dataset.folders)}"
        return textwrap.fill(text, 100, subsequent_indent="  ")

    # ---------------------------------------------------------------- without data

    @cached_property
    def statistics(self) -> MetadataStatistics:
        """Vocabularies, imputation and scaling of the training cycles."""
        return self.checkpoint.metadata_statistics()

    @cached_property
    def runtime(self) -> Runtime:
        runtime = Runtime(self._device, self.config.training.precision, "false")
        logger.info("%s on %s", self.checkpoint.run, describe(runtime))
        return runtime

    @cached_property
    def model(self) -> ConditionedAST:
        """In eval mode, on the device."""
        return self.checkpoint.build_model().to(self.runtime.device)

    @cached_property
    def frontend(self) -> AudioFrontend:
        """On the device."""
        return build_frontend(self.config).to(self.runtime.device)

    @property
    def is_conditioned(self) -> bool:
        """Whether the metadata can change a prediction: all variants but the plain AST."""
        return type(self.model.conditioner) is not Conditioner

    def logits(self, batch: Batch) -> Tensor:
        """[B, K] float32 on the device."""
        return self.under(batch, [batch.metadata])[0]

    @torch.no_grad()
    def under(self, batch: Batch, metadata: Sequence[Metadata]) -> Tensor:
        """[M, B, K] float32 on the device: the same sounds with each of M metadata."""
        return self._heard(
            batch, metadata, len(self.task.outputs), lambda *x: self.model(*x).logits
        )

    @torch.no_grad()
    def embedded(self, batch: Batch, metadata: Sequence[Metadata]) -> Tensor:
        """[M, B, D] float32 on the device: what the head sees, as `under`."""
        width = self.config.backbone.embed_dim
        return self._heard(batch, metadata, width, lambda *x: self.model.embed(*x)[1])

    def _heard(
        self,
        batch: Batch,
        metadata: Sequence[Metadata],
        width: int,
        answer: Callable[[Tensor, Metadata], Tensor],
    ) -> Tensor:
        """`answer` [B, width] to a batch's spectrograms and each of M metadata: [M, B, width]."""
        device, lengths = self.runtime.device, batch.length.numpy(force=True)
        out = torch.empty(len(metadata), len(batch), width, device=device)
        bucket = buckets_of(lengths, self.config.audio.clip_samples)
        for part in batches_of(np.arange(len(batch)), bucket, len(batch)):
            longest, rows = int(lengths[part].max()), torch.from_numpy(part)
            waveform, length = batch.waveform[rows, :longest], batch.length[rows]
            with self.runtime.autocast():
                sound = waveform.to(device), length.to(device), None
                features = heard(self.frontend, self.model.methods.hears, *sound)
                for own, one in zip(out, metadata, strict=True):
                    own[rows] = answer(features, one[rows].to(device)).float()
        return out

    # ---------------------------------------------------------------- with data

    @property
    def leaky(self) -> bool:
        """Patients of the test part were in training by design of the split."""
        return is_leaky(self.config.dataset.split_strategy)

    @property
    def synthetic(self) -> bool:
        """Whether the recordings were generated, those of the training or those evaluated."""
        return self.checkpoint.synthetic or is_synthetic(*self.config.dataset.folders)

    def _find_data(self) -> None:
        """Said here with the remedy for a checkpoint; a corpus would give a configuration's."""
        for folder in self.config.dataset.folders:
            if not Path(folder).expanduser().exists():
                there = f"correct it in {self.corpus_file}"
                remedy = there if self.corpus_file else "name it with --data-folder DIR"
                raise UserError(f"the data folder {folder} does not exist; {remedy}")

    @cached_property
    def corpus(self) -> tuple[pd.DataFrame, Split]:
        """Cycle table and split, without opening any sound."""
        self._find_data()
        return build_split(self.config, judged=self.corpus_file is not None)

    @cached_property
    def data(self) -> Cycles:
        """The cycles, encoded with the checkpoint's statistics."""
        self._find_data()
        return build_data(self.config, self.statistics, judged=self.corpus_file is not None)

    @cached_property
    def predictor(self) -> Predictor:
        inputs = build_inputs(self.config, self.data, self.model, self.runtime)
        return Predictor(self.data, self.model, inputs, self.runtime, self.batch_size)

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of a part; `all` is every cycle that is in one.

        Raises:
            UserError: the run has no such part.
        """
        parts = self.data.split
        if split == "all":
            return np.sort(np.concatenate([parts.train, parts.val, parts.test]))
        rows = getattr(parts, split)
        if not len(rows) and self.corpus_file:
            raise UserError(f"{self.corpus_file} has no {split} part; evaluate --split all")
        if not len(rows):
            raise UserError(
                f"{self.path} was trained with training.selection={self.selection.value}, "
                f"which has no {split} part; evaluate another --split"
            )
        return rows

    def default_part(self) -> str:
        """`test`; `all` of another corpus that has no test part."""
        return "all" if self.corpus_file and not len(self.data.split.test) else "test"

    def predictions(self, split: str) -> pd.DataFrame:
        """Predictions table of a part, decided by the checkpoint's thresholds."""
        rows = self.rows(split)
        logits = self.predictor(rows)
        return make_predictions(self.task, self.data.table, rows, logits, self.thresholds)

    @torch.no_grad()
    def embeddings(self, rows: np.ndarray, metadata: Metadata | None = None) -> np.ndarray:
        """[n, D] float32: what the head sees of the given rows, in their order.

        metadata: of length n, instead of the cycles' own.
        """
        inputs = self.predictor.inputs
        inputs.prepare(rows)
        places = batches_of(np.arange(len(rows)), self.data.bucket[rows], self.batch_size)
        out = np.empty((len(rows), self.model.backbone.embed_dim), np.float32)
        batches = inputs.batches(rows[place] for place in places)
        for place, batch in zip(places, batches, strict=True):
            given = batch.metadata
            if metadata is not None:
                given = metadata[torch.from_numpy(place)].to(self.runtime.device)
            with self.runtime.autocast():
                _, fused = self.model.embed(inputs(batch, None), given)
            out[place] = fused.float().cpu().numpy()
        return out

    def other_data(self) -> str:
        """How the data differ from what the run saw, by their counts; empty: not at all."""
        if self.corpus_file:
            return self._other_corpus()
        then, now = self.checkpoint.counts, count_parts(self.data)
        parts = [
            f"{part} {then[part]['cycles']:,} cycles of {then[part]['patients']} patients then, "
            f"{now[part]['cycles']:,} of {now[part]['patients']} now"
            for part in now
            if now[part] != then[part]
        ]
        if not parts:
            return ""
        return (
            f"OTHER DATA: {self.config.dataset.data_folder} is not what the run was made with "
            f"({'; '.join(parts)}). A patient of this test part may have been in training."
        )

    def _other_corpus(self) -> str:
        dataset, trained = self.config.dataset, self.checkpoint.counts["train"]
        text = (
            f"OTHER CORPUS: trained on {trained['cycles']:,} cycles of {trained['patients']} "
            f"patients of {self.checkpoint.config['dataset'].get('name', 'icbhi')}, judged on "
            f"{dataset.name} {', '.join(dataset.folders)}."
        )
        known = self.checkpoint.fingerprint.get("recordings", {})
        shared = len(set(self.data.table["Filename"].unique()) & known.keys())
        if shared:
            text += (
                f" {shared} recordings have names of the run's own: they may have been trained on."
            )
        return text

    def unknown_metadata(self, rows: np.ndarray) -> str:
        """What a model that sees metadata does not know of the given rows; empty: nothing."""
        table = self.data.table.iloc[rows]
        parts = [f"{name} ({n:,} cycles)" for name, n in self.statistics.unseen(table).items()]
        missing = {name: int(table[name].isna().sum()) for name in SCALAR_COLUMNS}
        medians = dict(zip(SCALAR_COLUMNS, self.statistics.medians, strict=True))
        text = f"UNKNOWN METADATA: not seen in training: {', '.join(parts)}." if parts else ""
        scale = dict(zip(SCALAR_COLUMNS, self.statistics.scale, strict=True))
        if unused := [name for name, value in scale.items() if value == float("inf")]:
            text += f" UNUSED METADATA: {', '.join(unused)} did not differ in training."
        used = {name: n for name, n in missing.items() if n and name not in unused}
        filled = [f"{k} ({n:,} cycles, {medians[k]:g})" for k, n in used.items()]
        if filled:
            text += f" MISSING METADATA: training median instead: {', '.join(filled)}."
        return text.strip()

    def partial_message(self) -> str:
        """Everything that makes the metrics incomparable with those on the whole database."""
        partial = self.data.completeness.message
        if self.checkpoint.partial and not partial:
            partial = f"TRAINED ON {self.checkpoint.partial}"
        return " ".join(filter(None, (self.other_data(), partial)))

    def need_own_weights(self, what: str) -> None:
        """Refuse a checkpoint that is not all of its model."""

    # ---------------------------------------------------------------- its run

    @cached_property
    def run_folder(self) -> RunFolder | None:
        """The folder of the run that wrote the checkpoint, where it is still there.

        Evaluation writes into it, so the folder that the checkpoint names counts only if its best
        is this very file; anyone may have written the name.
        """
        above = RunFolder(self.path.resolve().parent.parent)
        if above.config.is_file() and above.path.name == self.checkpoint.run:
            return above
        named = RunFolder(Path(self.config.training.output_dir) / self.checkpoint.run)
        there = named.config.is_file() and named.best.is_file()
        return named if there and filecmp.cmp(named.best, self.path, shallow=False) else None

    def origin(self, part: str) -> Origin:
        """What a report says of the model and of this evaluation."""
        return Origin(
            run=self.checkpoint.run,
            variant=self.config.variant,
            title=self.title,
            n_cls=self.task.n_cls,
            split_strategy=self.config.dataset.split_strategy,
            selection=self.selection.value,
            seed=self.config.training.seed,
            epoch=self.checkpoint.epoch,
            revision=self.checkpoint.revision,
            part=part,
            data_folder=self.config.dataset.data_folder,
            evaluated_with={"revision": git_revision(), "machine": describe(self.runtime)},
        )


class FusedModel(TrainedModel):
    """Several trained models as one (`utils.runs.fuse`).

    The checkpoint holds the fusion alone; the fused checkpoints are opened where they lie.
    """

    def __init__(self, path: str | Path, checkpoint: Checkpoint, **options):
        super().__init__(path, checkpoint, **options)
        self._options = {"device": self._device, **options}

    @cached_property
    def members(self) -> list[TrainedModel]:
        """The fused models, on the device.

        Raises:
            UserError: a checkpoint is not what was fused.
        """
        fusion = self.config.fusion
        return [
            member(path, digest, self.path, **self._options)
            for path, digest in zip(fusion.checkpoints, fusion.members, strict=True)
        ]

    @property
    def is_conditioned(self) -> bool:
        return any(member.is_conditioned for member in self.members)

    def features(self, rows: np.ndarray, metadata: Metadata | None = None) -> Tensor:
        """What is fused of the given rows, [n, V, W]: embeddings, or logits for the mean."""
        return member_features(self.config.fusion.kind, self.members, rows, metadata)

    @torch.no_grad()
    def under(self, batch: Batch, metadata: Sequence[Metadata]) -> Tensor:
        mean = self.config.fusion.kind == "mean"
        asked = (m.under if mean else m.embedded for m in self.members)
        values = torch.stack([ask(batch, metadata) for ask in asked], dim=2)  # [M, B, V, W]
        return torch.stack([self.model(one, None).logits for one in values])

    @cached_property
    def predictor(self) -> Predictor:
        return FusedPredictor(self)

    @torch.no_grad()
    def embeddings(self, rows: np.ndarray, metadata: Metadata | None = None) -> np.ndarray:
        values = self.features(rows, metadata).to(self.runtime.device)
        return self.model.embed(values).cpu().numpy()

    def need_own_weights(self, what: str) -> None:
        raise UserError(
            f"{self.path} is a fusion of {len(self.config.fusion.members)} checkpoints, which it "
            f"names but does not hold, so {what} is not possible; use the checkpoints one by one"
        )


class FusedPredictor(Predictor):
    """A `FusedModel`'s; under other metadata its members are asked again."""

    def __init__(self, model: FusedModel):
        self.fused = model
        inputs = KnownInputs(model.features, model.runtime, model.data)
        super().__init__(model.data, model.model, inputs, model.runtime, model.batch_size)

    @torch.no_grad()
    def under(self, rows: np.ndarray, metadata: Sequence[Metadata]) -> np.ndarray:
        device = self.runtime.device
        values = (self.fused.features(rows, one).to(device) for one in metadata)
        return np.stack([self.model(one, None).logits.cpu().numpy() for one in values])


def member(path: str, digest: str, whose: Path, **options) -> TrainedModel:
    """Open a checkpoint that was fused.

    Raises:
        UserError: it is gone, or another one by now.
    """
    if not Path(path).is_file():
        raise UserError(f"{whose} fuses {path}, which is not there; put it back")
    if sha256(Path(path)) != digest:
        raise UserError(f"{whose} fuses {path}, which is another file by now; put it back")
    return TrainedModel.open(path, **options)


def member_features(
    kind: str, members: Sequence[TrainedModel], rows: np.ndarray, metadata: Metadata | None = None
) -> Tensor:
    """What `kind` fuses of the given rows, in their order, without augmentation: [n, V, W]."""

    def one(model: TrainedModel) -> np.ndarray:
        if kind == "gated":
            return model.embeddings(rows, metadata)
        if metadata is None:
            return model.predictor(rows)
        return model.predictor.under(rows, [metadata])[0]

    return torch.from_numpy(np.stack([one(model) for model in members], axis=1))
