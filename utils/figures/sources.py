"""Where figures get their numbers: checkpoints, run folders, the corpus. Says what is missing."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from data import corpora
from data.splits import Split, split_cycles
from data.synthetic.corpus import is_synthetic
from models.registry import VARIANTS
from utils.common.errors import UserError
from utils.config.schema import RunConfig, config_from_dict
from utils.figures.style import Notice
from utils.training.checkpoint import Checkpoint, load_checkpoint

logger = logging.getLogger(__name__)

#: Training script and configuration of each variant that the repository ships.
SCRIPTS: dict[str, tuple[str, str]] = {
    "ast": ("ast_train.py", "ast_config"),
    "ast_grf": ("ast_meta_fus_train.py", "ast_fus_config"),
    "ast_film": ("ast_film_train.py", "ast_film_config"),
    "ast_tafilm": ("ast_tafilm_train.py", "ast_tafilm_config"),
    "ast_softfilm": ("ast_film_soft.py", "ast_film_soft_config"),
}


def training_command(variant: str) -> str:
    """The command that makes a checkpoint of a variant."""
    script, config = SCRIPTS[variant]
    return f"python {script} --config configs/{config}.yaml --mlflow-config configs/mlflow.yaml"


@dataclass
class Trained:
    """A checkpoint with the configuration to use it with.

    Attributes:
        path: where it was read.
        checkpoint: its content.
        config: its configuration, with the data folder that is to be read.
    """

    path: Path
    checkpoint: Checkpoint
    config: RunConfig

    @property
    def title(self) -> str:
        """Name in figures, such as FiLM-AST."""
        return VARIANTS[self.config.variant].title

    def notice(self) -> Notice:
        """What must stand beside every figure of this model."""
        return Notice(
            protocol=self.checkpoint.selection,
            partial=self.checkpoint.partial,
            synthetic=self.checkpoint.synthetic or is_synthetic(self.config.dataset.data_folder),
            source=f"{self.checkpoint.run}, epoch {self.checkpoint.epoch + 1}",
        )


def open_trained(
    path: str | Path, flag: str, variant: str, data_folder: str | None = None
) -> Trained:
    """Read a checkpoint.

    Args:
        flag: command line that needs it, for the message.
        variant: what is expected; its training command is named when the file is missing (that of
            <variant>_best.pt when the file is called so).
        data_folder: read instead of the configured one.

    Raises:
        UserError: the file is missing or is no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        named = [v.name for v in VARIANTS.values() if path.name == f"{v.short}_best.pt"]
        variant = next((name for name in named if name in SCRIPTS), variant)
        raise UserError(
            f"{flag}: there is no checkpoint {path}; train one first: {training_command(variant)}"
        )
    checkpoint = load_checkpoint(path)
    return Trained(path, checkpoint, checkpoint.config_to_read(data_folder))


def require_variant(trained: Trained, variant: str, flag: str, why: str) -> None:
    """Refuse a checkpoint of another variant, with the command that works.

    Raises:
        UserError: names what the file holds, why it does not do, and the right commands.
    """
    if trained.config.variant == variant:
        return
    wanted = VARIANTS[variant]
    raise UserError(
        f"{trained.path} holds {trained.title}; {why}. Give a checkpoint of {wanted.title}: "
        f"python visualize.py {flag} checkpoints/{wanted.short}_best.pt (trained by "
        f"{training_command(variant)})"
    )


def read_corpus(config: RunConfig) -> tuple[pd.DataFrame, Split]:
    """Cycle table and split of a configuration, without opening any sound.

    Raises:
        UserError: the data folder is not there, or what `read_cycles` says of it.
    """
    dataset = config.dataset
    if not Path(dataset.data_folder).is_dir():
        raise UserError(
            f"the data folder {dataset.data_folder} of the checkpoint is not there; "
            "name it with --data-folder DIR"
        )
    table = corpora.read_corpus(dataset)
    split = split_cycles(
        table,
        strategy=dataset.split_strategy,
        test_fold=dataset.test_fold,
        split_seed=dataset.split_seed,
        test_fraction=dataset.test_fraction,
        val_fraction=dataset.val_fraction,
        val_seed=dataset.val_seed,
        selection=config.training.selection,
    )
    return table, split


@dataclass
class Evaluation:
    """The report of one part of a run.

    Attributes:
        folder: the run's.
        part: test | val.
        run: what the run's report says of itself (variant, seed, ...), {} when it says nothing.
        report: as `utils.evaluation.report.evaluate_predictions` returns.
        synthetic: the recordings were generated.
    """

    folder: Path
    part: str
    run: dict[str, Any]
    report: dict[str, Any]
    synthetic: bool

    def notice(self) -> Notice:
        """What must stand beside every figure of this evaluation."""
        return Notice(
            protocol=self.report["protocol"]["selection"],
            partial=self.report["partial_message"],
            synthetic=self.synthetic,
            source=f"{self.folder.name}, {self.part} part",
        )


def read_evaluation(folder: str | Path, part: str = "test") -> Evaluation:
    """report.json of a run's folder or of an evaluation's output folder.

    Raises:
        UserError: no such file, or it has no such part.
    """
    folder = Path(folder)
    path = folder / "report.json"
    if not path.is_file():
        raise UserError(
            f"{path} is missing: give the folder of a finished run (runs/...) with --run, or "
            "finish it by starting the same training command again"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); evaluate the run again") from None
    report = content if "metrics" in content else content.get(part)
    if not isinstance(report, dict) or "confusion" not in report:
        parts = [key for key in ("test", "val") if key in content] or ["none"]
        raise UserError(f"{path} has no evaluation of the {part} part (there: {', '.join(parts)})")
    run = (
        {} if report is content else {k: v for k, v in content.items() if k not in ("test", "val")}
    )
    # the corpus may have gone since, what the report says of it has not
    synthetic = bool(content.get("synthetic")) or _run_is_synthetic(folder)
    return Evaluation(folder, part, run, report, synthetic)


def _run_is_synthetic(folder: Path) -> bool:
    """Whether the corpus that a run's own configuration names is a synthetic one."""
    from omegaconf import OmegaConf

    path = folder / "config.yaml"
    if not path.is_file():
        return False
    config = config_from_dict(OmegaConf.to_container(OmegaConf.load(path)))
    return is_synthetic(config.dataset.data_folder)
