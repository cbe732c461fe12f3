"""Log-mel spectrograms: one cycle of each class, as the model receives it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data.cycle_table import classes_of
from data.frontend import AudioFrontend
from data.store_build import open_store
from data.task import CLASSES
from utils.common.errors import UserError
from utils.config.schema import AudioConfig
from utils.figures import style


@dataclass(frozen=True)
class LogMel:
    """One cycle's spectrogram.

    Attributes:
        energy: [F, T], natural logarithm of the mel energies.
        duration: of the cycle itself, s; what follows in the clip is padding.
        clip_seconds: of the clip, s.
        name: recording and cycle.
    """

    energy: np.ndarray
    duration: float
    clip_seconds: float
    name: str


def typical_cycles(table: pd.DataFrame) -> dict[str, int]:
    """Class -> row of the training cycle whose length is nearest to the class's median.

    Raises:
        UserError: a class has no training cycle.
    """
    rows = {}
    classes = classes_of(table)
    for number, name in enumerate(CLASSES):
        inside = table[(classes == number) & (table["Split"] == "train").to_numpy()]
        if inside.empty:
            raise UserError(f"no training cycle of class {name} in this folder; add recordings")
        deviation = (inside["Duration"] - inside["Duration"].median()).abs()
        rows[name] = int(deviation.idxmin())
    return rows


@torch.no_grad()
def log_mels(
    table: pd.DataFrame,
    rows: Mapping[str, int],
    frontend: AudioFrontend,
    audio: AudioConfig,
) -> dict[str, LogMel]:
    """Spectrograms of the named rows; only their recordings are read.

    Args:
        audio: the front end's section, whose normalisation is undone.
    """
    sample_rate = audio.sample_rate
    chosen = table.iloc[list(rows.values())].reset_index(drop=True)
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(
            chosen, cache_dir=folder, sample_rate=sample_rate, resampler=audio.resampler, workers=1
        )
        for i, name in enumerate(rows):
            samples = torch.from_numpy(
                np.array(store[i][: round(audio.clip_seconds * sample_rate)])
            )
            image = frontend(samples[None], torch.tensor([len(samples)]), None)[0, 0]
            row = chosen.iloc[i]
            out[name] = LogMel(
                energy=(image * 2 * audio.std + audio.mean).numpy(),
                duration=len(samples) / sample_rate,
                clip_seconds=audio.clip_seconds * image.shape[1] / frontend.size[1],
                name=f"{row.Filename}, cycle {row.CycleIndex}",
            )
    return out


def log_mel_figure(mels: Mapping[str, LogMel], *, low_freq: float, high_freq: float) -> Figure:
    """Panels on one colour scale; a dashed line where the cycle ends and its repetition begins."""
    figure = style.new_figure(style.PAGE, 3.5)
    axes = figure.subplots(2, -(-len(mels) // 2), sharex=True, sharey=True, squeeze=False).ravel()
    low, high = np.percentile([mel.energy for mel in mels.values()], (1, 99.8))
    for axis, (name, mel) in zip(axes, mels.items(), strict=False):
        bands = mel.energy.shape[0]
        image = axis.imshow(
            mel.energy, origin="lower", aspect="auto", cmap="magma", vmin=low, vmax=high,
            extent=(0, mel.clip_seconds, -0.5, bands - 0.5), interpolation="nearest",
        )  # fmt: skip
        if mel.duration < mel.clip_seconds:
            axis.axvline(mel.duration, color="white", linestyle="--", linewidth=0.8)
        axis.set_title(f"{name}: {mel.name}")
        mel_ticks(axis, bands, low_freq, high_freq)
    for axis in axes[-(len(axes) // 2) :]:
        axis.set_xlabel("time in the clip (s)")
    for axis in axes[:: len(axes) // 2]:
        axis.set_ylabel("frequency (Hz)")
    bar = figure.colorbar(image, ax=list(axes), pad=0.01, shrink=0.9)
    bar.set_label("log mel energy (nat)")
    bar.outline.set_visible(False)
    return figure


LOG_MEL_CAPTION = (
    "Log-mel spectrogram of one training cycle of each class, of about its class's median length, "
    "as the model receives it; after the dashed line the cycle is repeated to fill the clip."
)


def mel_ticks(axis: Axes, bands: int, low_freq: float, high_freq: float) -> None:
    """Hz at the rows of a log-mel image."""
    ticks = [f for f in (100, 250, 500, 1000, 2000, 4000, 8000) if low_freq <= f <= high_freq]
    axis.set_yticks([_row(f, bands, low_freq, high_freq) for f in ticks], ticks)


def _row(frequency: float, bands: int, low_freq: float, high_freq: float) -> float:
    """Row of a frequency in Hz: band b is centred at low + (b + 1) delta on the mel scale."""
    low, high, mel = (1127.0 * np.log1p(f / 700.0) for f in (low_freq, high_freq, frequency))
    return (mel - low) / (high - low) * (bands + 1) - 1
