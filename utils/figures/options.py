"""What a figure's command line says, and the one way its figure is captioned and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from utils.figures import style
from utils.figures.sources import Evaluation

BASELINE, SOFTFILM = "checkpoints/ast_best.pt", "checkpoints/softfilm_best.pt"


@dataclass
class Options:
    """What a command line says.

    Attributes:
        output_dir: where figures go.
        formats: file formats.
        checkpoint, baseline, softfilm: model checkpoints; None: not given.
        runs: run folders, or output folders of an evaluation.
        evaluation: drawn instead of `runs`, by a run that has not written its report yet.
        part: part of the run that is drawn (test | val).
        data_folder: read instead of the folder that a checkpoint names.
        cycles: at most so many test cycles in the t-SNE; 0: all.
    """

    output_dir: Path = Path("figs")
    formats: Sequence[str] = style.FORMATS
    checkpoint: str | None = None
    baseline: str | None = None
    softfilm: str | None = None
    runs: Sequence[str] = ()
    evaluation: Evaluation | None = None
    part: str = "test"
    data_folder: str | None = None
    cycles: int = 0

    def write(
        self, figure: Figure, name: str, text: str = "", notice: style.Notice | None = None
    ) -> list[Path]:
        """Caption the figure and write it."""
        style.caption(figure, text, notice)
        return style.save(figure, self.output_dir, name, self.formats)
