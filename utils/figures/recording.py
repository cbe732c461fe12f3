"""One recording as a model hears it: waveform, log-mel, probabilities, classes over time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from data.frontend import AudioFrontend
from data.task import Task
from utils.figures import style
from utils.figures.spectrograms import mel_ticks

COLUMNS = 1200  # of the picture's waveform and log-mel, at most


class Overview:
    """Waveform and log-mel of a recording in `COLUMNS` columns, collected block by block.

    Attributes:
        seconds: of the recording.
        low, high: [P] lowest and highest sample of each column.
        mel: [P', F] sum of the frames' log-mel energies in each column; frames: [P'] their number.
    """

    def __init__(self, samples: int, frontend: AudioFrontend):
        self.samples, self.frontend = samples, frontend
        self.seconds = samples / frontend.audio.sample_rate
        shift, length = frontend.frame_shift, frontend.frame_length
        self.total_frames = max(0, (samples - length) // shift + 1)
        columns = min(COLUMNS, samples)
        self.low, self.high = np.full(columns, np.inf), np.full(columns, -np.inf)
        self.mel = np.zeros((min(COLUMNS, self.total_frames), frontend.n_mels))
        self.frames = np.zeros(len(self.mel), np.int64)
        self._held, self._seen, self._framed = np.empty(0, np.float32), 0, 0

    def watch(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The same blocks [n], looked at on their way."""
        for block in blocks:
            self.add(block)
            yield block

    def add(self, block: np.ndarray) -> None:
        """The next samples [n] of the recording."""
        block = block[: self.samples - self._seen]
        if not len(block):
            return
        column = np.arange(self._seen, self._seen + len(block)) * len(self.low) // self.samples
        first = np.flatnonzero(np.diff(column, prepend=-1))
        at = column[first]
        self.low[at] = np.minimum(self.low[at], np.minimum.reduceat(block, first))
        self.high[at] = np.maximum(self.high[at], np.maximum.reduceat(block, first))
        self._seen += len(block)
        self._held = np.concatenate([self._held, block])
        self._add_frames()

    def _add_frames(self) -> None:
        frontend = self.frontend
        count = (len(self._held) - frontend.frame_length) // frontend.frame_shift + 1
        if count < 1:
            return
        sound = torch.from_numpy(self._held[None]).to(frontend.window.device)
        mel = frontend.log_mel(sound)[0].cpu().numpy()  # [count, F]
        column = np.arange(self._framed, self._framed + count) * len(self.mel) // self.total_frames
        first = np.flatnonzero(np.diff(column, prepend=-1))
        self.mel[column[first]] += np.add.reduceat(mel, first)
        self.frames[column[first]] += np.diff(first, append=count)
        self._framed += count
        self._held = self._held[count * frontend.frame_shift :]


def recording_figure(
    view: Overview,
    table: pd.DataFrame,
    task: Task,
    thresholds: Sequence[float],
    *,
    annotation: Sequence[Sequence] = (),
    cycles: bool = False,
) -> Figure:
    """Panels on one time axis.

    Args:
        table: `utils.predict.Prediction.table`.
        annotation: (start, end, crackle, wheeze) in s, drawn where the events are known.
        cycles: the segments are cycles, not steps of windows.
    """
    known = [segment for segment in annotation if segment[2] is not None]
    figure = style.new_figure(style.PAGE, 4.6)
    sound, image, curve, strip = figure.subplots(
        4, 1, sharex=True, height_ratios=(1, 2, 1.6, 0.28 * (1 + bool(known)))
    )
    unit, scale = ("min", 60.0) if view.seconds > 300 else ("s", 1.0)
    time = np.linspace(0, view.seconds / scale, len(view.low))
    sound.fill_between(time, view.low, view.high, color=style.BLUE, linewidth=0.3)
    sound.set_ylabel("amplitude")
    _draw_mel(image, view, scale)
    _draw_probabilities(curve, table, task, thresholds, scale, cycles)
    rows = [("predicted", table["start"], table["end"], list(table["pred_class"]))]
    if known:
        start, end, crackle, wheeze = map(np.array, zip(*known, strict=True))
        names = np.array(task.classes)[task.true_classes(task.labels(crackle, wheeze))]
        rows.insert(0, ("annotated", start, end, list(names)))
    for y, (_, start, end, names) in enumerate(rows):
        colours = [style.CLASS_COLOURS[name] for name in names]
        edge = {"edgecolor": "white", "linewidth": 0.4 if len(names) < 200 else 0}
        left, width = np.asarray(start) / scale, (np.asarray(end) - np.asarray(start)) / scale
        strip.barh(np.full(len(names), -y), width, 0.9, left, color=colours, **edge)
    strip.set_yticks([-y for y in range(len(rows))], [row[0] for row in rows])
    strip.spines[["left", "bottom"]].set_visible(False)
    strip.tick_params(left=False)
    strip.set_xlim(0, view.seconds / scale)
    strip.set_xlabel(f"time ({unit})")
    patches = [Patch(color=style.CLASS_COLOURS[name], label=name) for name in task.classes]
    figure.legend(handles=patches, loc="outside upper right", ncols=len(patches))
    return figure


def _draw_mel(axis: Axes, view: Overview, scale: float) -> None:
    axis.set_ylabel("frequency (Hz)")
    if not len(view.mel):  # shorter than a frame
        return
    audio, bands = view.frontend.audio, view.mel.shape[1]
    energy = view.mel / np.maximum(view.frames, 1)[:, None]
    low, high = np.percentile(energy, (1, 99.8))
    axis.imshow(
        energy.T, origin="lower", aspect="auto", cmap="magma", vmin=low, vmax=high,
        extent=(0, view.seconds / scale, -0.5, bands - 0.5), interpolation="nearest",
    )  # fmt: skip
    mel_ticks(axis, bands, audio.low_freq, audio.high_freq)


def _draw_probabilities(
    axis: Axes,
    table: pd.DataFrame,
    task: Task,
    thresholds: Sequence[float],
    scale: float,
    cycles: bool,
) -> None:
    """A curve through the windows' steps, or a bar over each cycle; dashed: the thresholds."""
    start, end = table["start"] / scale, table["end"] / scale
    shown = [name for name in task.outputs if name != "normal"]
    for name in shown:
        colour, value = style.CLASS_COLOURS[name], table[f"p_{name}"]
        if cycles:
            axis.hlines(value, start, end, color=colour, linewidth=2, label=name)
        else:
            axis.plot((start + end) / 2, value, color=colour, linewidth=1.2, label=name)
    if not task.exclusive:
        for name, threshold in zip(shown, thresholds, strict=True):
            axis.axhline(threshold, color=style.CLASS_COLOURS[name], linestyle="--", linewidth=0.7)
    axis.set_ylim(0, 1)
    axis.set_ylabel(
        "probability (dashed:\nthreshold)" if thresholds and not task.exclusive else "probability"
    )
