"""The run folder: what a run leaves on disk, where, and in which order.

    runs/<variant>-<n_cls>cls-<selection>-s<seed>-<hash of the resolved config>/
        config.yaml             every resolved key
        record.json             when it was started, its pace; once published, what it replaced
        run.log                 what was printed
        metrics.csv             one row per finished epoch
        tracking.json           what MLflow is to show, in addition to metrics.csv and the files
        checkpoints/last.pt     training state, replaced at every checkpoint; removed at the end
        checkpoints/best.pt     the finished model: weights and all that evaluation needs
        predictions/val.csv, test.csv   one row per cycle
        figures/                pictures of this run
        report.md, model_card.md    for reading
        evaluation/<split>/     what evaluate.py adds later
        SHA256SUMS              of the files that the finished run's results rest on
        report.json             results of the finished run; its presence means "finished"

Every file is written under a temporary name and renamed, so that none is ever half there; only
run.log grows line by line.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.common.errors import UserError
from utils.common.files import TEMPORARY, check_sum, summed, write_json, write_last, write_text
from utils.common.readers import read_json, read_results
from utils.config.schema import RunConfig, config_hash, config_to_yaml

logger = logging.getLogger(__name__)


def run_name(config: RunConfig) -> str:
    """Folder name of the run that a configuration describes."""
    what = f"fused_{config.fusion.kind}" if config.fusion.members else config.variant
    return (
        f"{what}-{config.dataset.n_cls}cls-{config.training.selection}"
        f"-s{config.training.seed}-{config_hash(config)}"
    )


class RunFolder:
    """Paths of one run, and the small files in it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.record = self.path / "record.json"
        self.log = self.path / "run.log"
        self.metrics = self.path / "metrics.csv"
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last.pt"
        self.best = self.checkpoints / "best.pt"
        self.predictions = self.path / "predictions"
        self.figures = self.path / "figures"
        self.report = self.path / "report.json"

    @classmethod
    def of(cls, config: RunConfig) -> RunFolder:
        """The folder that belongs to a configuration; nothing is created."""
        return cls(Path(config.training.output_dir) / run_name(config))

    @property
    def finished(self) -> bool:
        """Whether the run was trained and tested to its end."""
        return self.report.is_file() and self.best.is_file()

    def prepare(self, config: RunConfig, *, fresh: bool) -> None:
        """Create the folder and write the configuration.

        `fresh` removes an earlier attempt; otherwise only what a killed one left half-written.

        Raises:
            UserError: something else lies there, or it cannot be removed or written.
        """
        try:
            if fresh and self.path.exists():
                if not self.path.is_dir() or (
                    not self.config.is_file() and any(self.path.iterdir())
                ):
                    raise UserError(f"{self.path} is not a run folder; move it away")
                shutil.rmtree(self.path)
            self.tidy()
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be tidied ({error.strerror}: {error.filename}); check its "
                "permissions"
            ) from error
        write_text(self.config, config_to_yaml(config))
        if not self.record.is_file():
            self.write_record(started=time.strftime("%Y-%m-%d %H:%M:%S"))

    @property
    def leftovers(self) -> list[Path]:
        """What a killed process left: half-written files, and a finished run's training state."""
        state = [self.last] if self.finished and self.last.is_file() else []
        return [*self.path.rglob(TEMPORARY), *state]

    def tidy(self) -> None:
        """Remove `leftovers`; only whoever holds the folder's lock may."""
        for path in self.leftovers:
            path.unlink(missing_ok=True)

    def read_record(self) -> dict[str, Any]:
        """record.json; empty where there is none, as in runs of earlier versions."""
        with suppress(UserError):
            return read_json(self.record, "")
        return {}

    def write_record(self, **changed: Any) -> None:
        """Add to record.json."""
        write_json(self.record, self.read_record() | changed)

    def write_metrics(self, history: list[dict[str, float]]) -> None:
        """metrics.csv from the whole history; an empty cell is a figure that does not exist."""
        text = io.StringIO()
        columns = list(dict.fromkeys(key for row in history for key in row))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        for row in history:
            writer.writerow({k: "" if _is_nan(v) else v for k, v in row.items()})
        write_text(self.metrics, text.getvalue())

    def read_metrics(self) -> list[dict[str, float]]:
        """The rows of metrics.csv, NaN for an empty cell; none before the first epoch ends."""
        try:
            rows = list(csv.DictReader(self.metrics.read_text(encoding="utf-8").splitlines()))
            return [{k: float(v or "nan") for k, v in row.items()} for row in rows]
        except (OSError, ValueError, TypeError, AttributeError):
            return []

    def write_report(self, report: dict[str, Any]) -> None:
        """report.json; NaN becomes null, so that any JSON reader takes it."""
        write_last(self.report, report, self._results())

    def check(self) -> None:
        """Refuse a finished run whose results have been changed or damaged since.

        Raises:
            UserError: names the file.
        """
        for name in summed(self.path):
            check_sum(self.path / name)

    def _results(self) -> list[Path]:
        """What a finished run's results rest on."""
        files = [self.config, self.metrics, self.best, *sorted(self.predictions.glob("*.csv"))]
        return [path for path in files if path.is_file()]

    def read_report(self) -> dict[str, Any]:
        """The finished run's report."""
        return read_results(self.report)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
