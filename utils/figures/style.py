"""One look for every figure, and the one way a figure reaches the disk.

Widths are those of a two-column paper; colours are the Okabe-Ito palette (Okabe and Ito, "Color
Universal Design", 2008), which readers with any of the common colour deficiencies can tell apart;
text stays text in the PDF. Figures are made without pyplot, so that nothing is kept open.
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data.task import CLASSES
from utils.common.files import atomic_write, write_text
from utils.metrics.protocol import LEAKY_MARK, LEAKY_NOTE, PARTIAL_MARK, SYNTHETIC_MARK, Selection

COLUMN = 3.5  # inch, width of one column
PAGE = 7.16  # inch, width of both
FORMATS = ("png", "pdf")
CAPTIONS = ("below", "off", "file")

# without the palette's yellow, which thin lines and points on white do not show
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY, PALE = "#7F7F7F", "#E6E6E6"


def _colours(names: Sequence[str], *colours: str) -> dict[str, str]:
    return dict(zip(names, colours, strict=True))


CLASS_COLOURS = _colours((*CLASSES, "abnormal"), BLUE, ORANGE, GREEN, PURPLE, VERMILLION)
FACTOR_COLOURS = {"device": BLUE, "site": ORANGE, "rest": GREEN}
SPLIT_COLOURS = {"train": BLUE, "val": GREEN, "test": ORANGE, "all": GREY}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
#: Of any other values, in this order; an eighth has the first one's again.
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY, BLACK)


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, in their order; "unknown" is grey and comes last."""
    named = [name for name in names if name != "unknown"]
    return dict(zip(named, cycle(CYCLE), strict=False)) | {"unknown": GREY}


_RC = {
    "figure.dpi": 150,
    "savefig.dpi": 300,
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same everywhere
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "patch.linewidth": 0.5,
    "axes.grid": False,
    "grid.linewidth": 0.4,
    "grid.color": PALE,
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(color=CYCLE),
    "image.cmap": "viridis",
    "pdf.fonttype": 42,  # TrueType, embedded: text can be searched and edited
    "ps.fonttype": 42,
}

_CAPTION_SIZE = 6.5  # pt


def use_style() -> None:
    """Make the style below matplotlib's default in this process."""
    matplotlib.rcParams.update(_RC)
    logging.getLogger("fontTools").setLevel(logging.ERROR)  # remarks on DejaVu's creation date


def new_figure(width: float, height: float) -> Figure:
    """Figure of width x height inch in the project's style, outside pyplot."""
    use_style()
    return Figure(figsize=(width, height), layout="constrained")


@dataclass(frozen=True)
class Notice:
    """What a reader must know about the run behind a figure.

    Attributes:
        protocol: training.selection of the run (validation | fixed | test), or None when no
            selection took place (published values, data).
        partial: what is missing from the corpus; "" when it is complete.
        synthetic: the recordings were generated, no patient was recorded.
        leaky: patients of the test part were in training by design of the split.
        source: run name or file the figure was made from.
    """

    protocol: str | None = None
    partial: str = ""
    synthetic: bool = False
    leaky: bool = False
    source: str = ""

    def lines(self) -> list[str]:
        """One line per thing to know, most severe first."""
        lines = []
        if self.synthetic:
            lines.append("SYNTHETIC recordings: says nothing about patients.")
        if self.leaky:
            lines.append(LEAKY_NOTE)
        if self.partial:
            text = self.partial.rstrip(".") + "."
            marked = text.split(":")[0].isupper()
            lines.append(text if marked else f"PARTIAL DATA: {text}")
        if self.protocol is not None:
            lines.append(f"Protocol: {Selection(self.protocol).statement}")
        if self.source:
            lines.append(f"Source: {self.source}.")
        return lines

    def marks(self) -> str:
        """What a figure must show even where its caption stands elsewhere; "" for nothing."""
        marks = [SYNTHETIC_MARK] * self.synthetic + [LEAKY_MARK] * self.leaky
        head = self.partial.split(":")[0]  # such as READY-MADE SPECTROGRAMS
        marks += [head if head.isupper() else PARTIAL_MARK] * bool(self.partial)
        marks += [Selection.TEST.label] * (self.protocol == Selection.TEST)
        return " · ".join(marks)

    @property
    def grave(self) -> bool:
        """True when the figure must not be read as a result on the whole corpus."""
        return self.synthetic or self.leaky or bool(self.partial) or self.protocol == "test"


def caption(figure: Figure, text: str = "", notice: Notice | None = None) -> None:
    """Write `text` (a line break begins a paragraph) and the notice below, wrapped to the width.

    The figure grows by the height of the text, so the axes keep their size and nothing is covered.
    """
    width, height = figure.get_size_inches()
    columns = int(width * 72 / (0.56 * _CAPTION_SIZE))  # mean glyph width of DejaVu Sans
    blocks = [(paragraph, BLACK) for paragraph in text.splitlines()]
    if notice is not None:
        colour = VERMILLION if notice.grave else "#404040"
        blocks += [(line, colour) for line in notice.lines()]
    blocks = [(textwrap.wrap(block, columns), colour) for block, colour in blocks]
    line_height = 1.32 * _CAPTION_SIZE / 72  # inch
    below = line_height * sum(len(lines) for lines, _ in blocks) + 0.08
    figure.set_size_inches(width, height + below)
    figure.get_layout_engine().set(rect=(0, below / (height + below), 1, height / (height + below)))
    y = below - 0.02
    for line, colour in ((line, colour) for lines, colour in blocks for line in lines):
        figure.text(
            0.06 / width, y / (height + below), line, fontsize=_CAPTION_SIZE, color=colour, va="top"
        ).set_in_layout(False)
        y -= line_height


def save(
    figure: Figure, folder: str | Path, name: str, formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Write `folder/name.<format>` for each format, each atomically, and return the paths.

    Files of equal content are equal byte for byte: no dates inside.
    """
    paths = []
    for suffix in formats:
        path = Path(folder) / f"{name}.{suffix}"
        with atomic_write(path) as file:
            figure.savefig(
                file,
                format=suffix,
                facecolor="white",
                metadata={"CreationDate": None} if suffix == "pdf" else None,
            )
        paths.append(path)
    return paths


@dataclass(frozen=True)
class Output:
    """Where and in which formats figures are written, and where their captions go.

    Attributes:
        caption: below (in the figure), off, or file (`name.txt` next to the figure). The marks of
            `Notice.marks` are in the figure in any case.
    """

    folder: Path = Path("outputs/figures")
    formats: Sequence[str] = FORMATS
    caption: str = CAPTIONS[0]

    def write(
        self, figure: Figure, name: str, text: str = "", notice: Notice | None = None
    ) -> list[Path]:
        """Caption the figure and write it; returns the paths."""
        if self.caption == "below":
            caption(figure, text, notice)
            return save(figure, self.folder, name, self.formats)
        if notice is not None and notice.marks():
            figure.suptitle(notice.marks(), x=0.99, ha="right", fontsize=6.5, color=VERMILLION)
        paths = save(figure, self.folder, name, self.formats)
        if self.caption == "file":
            lines = [*text.splitlines(), *(notice.lines() if notice is not None else ())]
            paths.append(self.folder / f"{name}.txt")
            write_text(paths[-1], "\n".join(lines) + "\n")
        return paths


def whole_numbers(axis: Axes, values: Sequence[int]) -> None:
    """Ticks of the x axis at whole numbers only (blocks, epochs)."""
    if len(values) == 1:
        axis.set_xticks(values)
    else:
        axis.xaxis.get_major_locator().set_params(integer=True)


def panel_letters(axes: Sequence[Axes]) -> None:
    """(a), (b), ... in front of the panels' titles."""
    for letter, axis in zip("abcdefghijklmnopqrstuvwxyz", axes, strict=False):
        title = axis.get_title(loc="left") or axis.get_title()
        axis.set_title("")
        axis.set_title(f"({letter}) {title}".rstrip(), loc="left")


def annotate_cells(axis: Axes, values: np.ndarray, texts: Sequence[Sequence[str]], image) -> None:
    """Write texts[i][j] into the cells of an image, black or white, whichever can be read."""
    values = np.asarray(values, float)
    for (i, j), value in np.ndenumerate(values):
        red, green, blue, _ = image.cmap(image.norm(value))
        bright = 0.299 * red + 0.587 * green + 0.114 * blue
        axis.text(
            j, i, texts[i][j], ha="center", va="center", fontsize=6.5,
            color="black" if bright > 0.55 else "white",
        )  # fmt: skip
