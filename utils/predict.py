"""What a trained model hears in any recording: one row per cycle, or per step of sliding windows.

    model = TrainedModel.open("checkpoints/softfilm_best.pt")
    prediction = predict_recording(model, "recording.wav", metadata={"site": "Tc", "age": 61})
    prediction.table        # start, end, probabilities, class, thresholds
    draw(prediction, "recording.png")

`predict.py` is the command. n segments, M kinds of metadata, K outputs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from data.batch import Batch, Metadata
from data.corpora.manifest import NUMBERS
from data.recordings import NAMES
from data.segments import Segment, average, cycle_spans, window_spans
from data.statistics import MetadataStatistics
from data.stream import Stream, pieces
from data.task import SCALARS, Task
from utils.common.errors import UserError
from utils.common.files import plain, write_json, write_text
from utils.evaluation.trained_model import TrainedModel
from utils.figures.recording import Overview
from utils.metrics.calibration import undo_pos_weight

HOP, WINDOW = 0.5, 2.5  # s; the window where the training cycles' median duration is unknown
DISCLAIMER = "For research only: not a medical device."


@dataclass
class Prediction:
    """What a model says of one recording.

    Attributes:
        file: path of the recording; seconds: its length; rate: Hz; channels: of the file.
        table: a row per segment: file, start, end (s); `windows`, how many were averaged, without
            cycles; `p_<output>` as trained, which the thresholds are for; `calibrated_<output>`
            without the loss's pos_weight; pred_class; `threshold_<output>`; metadata_known;
            true_class where cycles are annotated.
        window, hop: s; None: the segments are cycles.
        metadata: what was given; notes: what a reader must know.
        task, thresholds: of the model; title: its name and task.
        synthetic: the model was trained on generated recordings.
        annotation: annotated cycles to draw; overview: what `draw` needs of the sound, or None.
    """

    file: str
    seconds: float
    rate: int
    channels: int
    table: pd.DataFrame
    window: float | None
    hop: float | None
    metadata: dict[str, Any]
    notes: list[str]
    task: Task
    thresholds: tuple[float, ...]
    title: str
    synthetic: bool
    annotation: list[Segment] = field(default_factory=list)
    overview: Overview | None = None

    def summary(self) -> dict[str, Any]:
        """One row: length, share of the segments' time in each class, and each output's mean over
        that time, its maximum and where that is (s)."""
        table = self.table
        weight = (table["end"] - table["start"]).to_numpy()
        weight = weight / weight.sum()
        out = {"file": self.file, "seconds": round(self.seconds, 3), "segments": len(table)}
        out |= {"of": "cycles" if self.window is None else "windows"}
        for name in self.task.classes:
            out[f"share_{name}"] = float(weight[table["pred_class"] == name].sum())
        for name in self.task.outputs:
            for kind in ("p", "calibrated"):
                out[f"{kind}_{name}_mean"] = float(weight @ table[f"{kind}_{name}"])
                out[f"{kind}_{name}_max"] = float(table[f"{kind}_{name}"].max())
            out[f"{name}_max_at"] = float(table["start"][table[f"p_{name}"].argmax()])
        return out

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        named = ("file", "seconds", "rate", "channels", "window", "hop", "metadata", "notes")
        own = {name: getattr(self, name) for name in named}
        segments = self.table.drop(columns="file").to_dict("records")
        return plain(own | {"summary": self.summary(), "segments": segments})


def check_model(model: TrainedModel) -> None:
    """Refuse a model that cannot hear."""
    if model.config.dataset.ready_made:
        raise UserError(
            f"{model.path} was trained on ready-made spectrograms, not on sound, and cannot hear a "
            "recording; use a checkpoint that was trained on audio"
        )


def check_metadata(statistics: MetadataStatistics, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of device, site, age and bmi; None and "" mean unknown, as leaving out does.

    Raises:
        UserError: another key, a name that the model does not know, a number out of range.
    """
    known = {key: value for key, value in given.items() if value is not None and value != ""}
    if strange := sorted(known.keys() - {*NAMES, *NUMBERS}):
        raise UserError(f"no metadata {', '.join(strange)}; {', '.join((*NAMES, *NUMBERS))} exist")
    for key, vocabulary in (("device", statistics.devices), ("site", statistics.sites)):
        if known.get(key, vocabulary[0]) not in vocabulary:
            raise UserError(
                f"{key} {known[key]!r} is none that the model knows ({', '.join(vocabulary)}); "
                "leave it out where it is unknown"
            )
    for key, (low, high) in NUMBERS.items():
        if key in known and not low <= known[key] <= high:
            raise UserError(f"{key} is {known[key]:g}, outside {low:g}..{high:g}; correct it")
    return known


def default_window(model: TrainedModel) -> float:
    """Median duration of the training cycles, s, at most a clip."""
    median = model.statistics.medians[SCALARS.index("duration")]
    return min(round(median, 3) or WINDOW, model.config.audio.clip_seconds)


def _window_and_hop(
    model: TrainedModel, window: float | None, hop: float | None
) -> tuple[float, float]:
    """Both in s, the default where None is given; refused where the model cannot use them."""
    audio = model.config.audio
    window = default_window(model) if window is None else window
    hop = min(HOP, window) if hop is None else hop
    if not (hop * audio.sample_rate >= 1 and hop <= window <= audio.clip_seconds):
        raise UserError(
            f"windows of {window:g} s every {hop:g} s cannot be; the model hears at most "
            f"{audio.clip_seconds:g} s, and a hop is above 0 and not longer than the window"
        )
    return window, hop


def predict_recording(
    model: TrainedModel, path: str | Path, *, metadata: Mapping[str, Any] | None = None, **options
) -> Prediction:
    """Predictions of one recording; options as in `predict_under`.

    metadata: what is known of device, site, age (years) and bmi (kg/m2).
    """
    return predict_under(model, path, [metadata or {}], **options)[0]


def predict_under(
    model: TrainedModel,
    path: str | Path,
    metadata: Sequence[Mapping[str, Any]],
    *,
    cycles: Sequence[Sequence] | None = None,
    window: float | None = None,
    hop: float | None = None,
    duration: str = "unknown",
    annotation: Sequence[Sequence] = (),
    overview: bool = True,
    progress: str | None = None,
) -> list[Prediction]:
    """Predictions of one recording under each of M metadata; every sound is heard once.

    Args:
        path: anything that soundfile reads, of any length.
        metadata: M times what is known, see `check_metadata`.
        cycles: (start, end) in s, or (start, end, crackle, wheeze); None: windows of `window`
            seconds (None: `default_window`) every `hop` seconds (None: 0.5, at most a window),
            whose probabilities are averaged for each step of a hop.
        duration: of a window: "unknown" to the model, or "window", as if it were a breath's.
        annotation: further annotated cycles, for the picture only.
        overview: collect what `draw` needs.
        progress: text before a progress bar (on a terminal); None: no bar.

    Raises:
        UserError: the recording, the cycles or an argument cannot be used.
    """
    check_model(model)
    audio = model.config.audio
    known = [check_metadata(model.statistics, given) for given in metadata]
    cycles = None if cycles is None else [Segment(*cycle) for cycle in cycles]
    if cycles is None:
        window, hop = _window_and_hop(model, window, hop)
    stream = Stream.open(path, audio.sample_rate, audio.resampler)
    if cycles is None:
        spans = window_spans(stream.samples, *(round(s * audio.sample_rate) for s in (window, hop)))
        seconds = np.full(len(spans), window) if duration == "window" else None
    else:
        spans = cycle_spans(cycles, stream)
        seconds = np.array([cycle.end - cycle.start for cycle in cycles]).round(6)
    encoded = [encode(model.statistics, one, len(spans), seconds) for one in known]
    view = Overview(stream.samples, model.frontend) if overview else None
    logits = _logits(model, stream, spans, encoded, view, progress)
    steps = None if cycles is not None else round(hop * audio.sample_rate)
    return [
        Prediction(
            file=str(path),
            seconds=stream.seconds,
            rate=stream.rate,
            channels=stream.channels,
            table=_table(model, str(path), one, spans, stream, cycles, steps).assign(
                metadata_known=" ".join([*given, *([] if seconds is None else ["duration"])])
            ),
            window=None if steps is None else window,
            hop=None if steps is None else hop,
            metadata=given,
            notes=_notes(model, given, stream, spans, seconds is not None),
            task=model.task,
            thresholds=tuple(model.thresholds),
            title=f"{model.title}, {model.task.n_cls}-class",
            synthetic=model.synthetic,
            annotation=[Segment(*cycle) for cycle in (annotation or cycles or ())],
            overview=view,
        )
        for one, given in zip(logits, known, strict=True)
    ]


def encode(
    statistics: MetadataStatistics, known: Mapping[str, Any], n: int, seconds: np.ndarray | None
) -> Metadata:
    """`Metadata` [n] of one recording's segments, an unknown age or BMI as training has it.

    Args:
        known: as `check_metadata` gives it.
        seconds: [n] duration of each segment; None: unknown to the model (z = 0).
    """
    row = {"Device": known.get("device"), "AuscLoc": known.get("site")}
    row |= {"Age": known.get("age", np.nan), "BMIDerived": known.get("bmi", np.nan)}
    duration = np.nan if seconds is None else seconds
    table = pd.DataFrame(row | {"Duration": duration}, index=range(n))
    encoded = statistics.transform(table, warn=False)
    return encoded.without("duration") if seconds is None else encoded


def _logits(
    model: TrainedModel,
    stream: Stream,
    spans: np.ndarray,
    metadata: Sequence[Metadata],
    view: Overview | None,
    progress: str | None,
) -> np.ndarray:
    """Logits [M, n, K] float64 of the segments [n, 2], in one pass over the sound."""
    longest = round(model.config.audio.clip_seconds * stream.sample_rate)
    order = np.argsort(spans[:, 0], kind="stable")
    starts, stops = spans[order, 0], np.minimum(spans[order, 1], spans[order, 0] + longest)
    blocks = stream.blocks() if view is None else view.watch(stream.blocks())
    sounds = pieces(blocks, list(zip(starts.tolist(), stops.tolist(), strict=True)))
    out = torch.empty(len(metadata), len(spans), len(model.task.outputs), dtype=torch.float64)
    bar = tqdm(
        total=len(spans), desc=progress, unit="segment", leave=False,
        disable=None if progress else True,
    )  # fmt: skip
    with bar:
        for first in range(0, len(spans), model.batch_size):
            rows = torch.from_numpy(order[first : first + model.batch_size])
            batch = _batch(list(islice(sounds, len(rows))), metadata[0][rows])
            out[:, rows] = model.under(batch, [one[rows] for one in metadata]).double().cpu()
            bar.update(len(rows))
    if view is not None:  # the picture shows the sound after the last cycle too
        deque(blocks, maxlen=0)
    if not out.isfinite().all():
        raise UserError(
            f"the model's logits are not finite in {stream.path}: its training diverged or its "
            "weights are damaged; use another checkpoint"
        )
    return out.numpy()


def _batch(clips: Sequence[np.ndarray], metadata: Metadata) -> Batch:
    """Segments of any lengths as the loader would give them; labels are not looked at."""
    lengths = [len(clip) for clip in clips]
    waveform = np.zeros((len(clips), max(lengths)), np.float32)
    for row, clip in zip(waveform, clips, strict=True):
        row[: len(clip)] = clip
    nothing = torch.zeros(len(clips), dtype=torch.int64)
    return Batch(
        waveform=torch.from_numpy(waveform),
        length=torch.tensor(lengths),
        metadata=metadata,
        label=nothing[:, None].float(),
        cycle=nothing,
        patient=nothing,
    )


def _table(
    model: TrainedModel,
    file: str,
    logits: np.ndarray,
    spans: np.ndarray,
    stream: Stream,
    cycles: Sequence[Segment] | None,
    hop: int | None,
) -> pd.DataFrame:
    """`Prediction.table` without metadata_known; hop: samples of a step, None for cycles."""
    task, weight = model.task, model.checkpoint.pos_weight
    raw = task.probabilities(logits)
    calibrated = task.probabilities(undo_pos_weight(logits, weight)) if weight else raw
    if hop is None:
        columns = {"file": file, "start": [c.start for c in cycles], "end": [c.end for c in cycles]}
    else:
        edges = np.append(np.arange(max(1, round(stream.samples / hop))) * hop, stream.samples)
        count, (raw, calibrated) = average(spans, edges, raw, calibrated)
        start, end = (edges[:-1] / stream.sample_rate, edges[1:] / stream.sample_rate)
        columns = {"file": file, "start": start.round(6), "end": end.round(6), "windows": count}
    for kind, values in (("p", raw), ("calibrated", calibrated)):
        columns |= {f"{kind}_{name}": values[:, k] for k, name in enumerate(task.outputs)}
    classes = np.array(task.classes)
    columns["pred_class"] = classes[task.predicted_classes(raw, model.thresholds)]
    named = ("abnormal",) if task.exclusive else task.outputs
    columns |= {f"threshold_{n}": t for n, t in zip(named, model.thresholds, strict=False)}
    if cycles and all(cycle.crackle is not None for cycle in cycles):
        events = np.array([cycle[2:] for cycle in cycles])
        columns["true_class"] = classes[task.true_classes(task.labels(*events.T))]
    return pd.DataFrame(columns)


def _notes(
    model: TrainedModel,
    known: Mapping[str, Any],
    stream: Stream,
    spans: np.ndarray,
    duration: bool,
) -> list[str]:
    """What a reader of these predictions must know."""
    notes, statistics, audio = [], model.statistics, model.config.audio
    if not model.is_conditioned:
        notes.append("this model takes no metadata")
    else:
        if missing := [name for name in NAMES if name not in known]:
            notes.append(f"{' and '.join(missing)} unknown")
        for name in NUMBERS:
            if np.isinf(statistics.scale[SCALARS.index(name)]):
                notes.append(f"{name} did not differ in training: it is not used")
            elif name not in known:
                median = statistics.medians[SCALARS.index(name)]
                notes.append(f"{name} unknown: the training median {median:g} is used")
        for name, names, counts in (
            ("device", statistics.devices, statistics.device_counts),
            ("site", statistics.sites, statistics.site_counts),
        ):
            if name in known and not counts[names.index(known[name])]:
                notes.append(f"{name} {known[name]} does not occur in training: treated as unknown")
        if not duration:
            notes.append("a window's duration is not a breath's: unknown to the model (z = 0)")
    longer = int((np.diff(spans)[:, 0] > audio.clip_seconds * stream.sample_rate).sum())
    if longer:
        cycles = "1 cycle is" if longer == 1 else f"{longer} cycles are"
        notes.append(f"{cycles} longer than {audio.clip_seconds:g} s: only the start is heard")
    if stream.channels > 1:
        notes.append(f"mean of {stream.channels} channels")
    if stream.resampler != audio.resampler:
        notes.append(f"resampled from {stream.rate} Hz by {stream.resampler}, unlike in training")
    return notes


def draw(prediction: Prediction, path: str | Path) -> Path:
    """Picture of a prediction as PNG: waveform, log-mel, probabilities, classes, annotation.

    Raises:
        ValueError: it was made with `overview=False`.
    """
    from utils.figures import recording, style

    if prediction.overview is None:
        raise ValueError("a picture needs predict_recording(..., overview=True)")
    figure = recording.recording_figure(
        prediction.overview, prediction.table, prediction.task, prediction.thresholds,
        annotation=prediction.annotation, cycles=prediction.window is None,
    )  # fmt: skip
    given = prediction.metadata.items()
    known = ", ".join(f"{k} {v:g}" if k in NUMBERS else f"{k} {v}" for k, v in given)
    text = f"{Path(prediction.file).name}: {prediction.title}; metadata: {known or 'none given'}. "
    text += "; ".join(prediction.notes) + ("." if prediction.notes else "")
    if prediction.synthetic:
        text += "\nThe model was trained on SYNTHETIC recordings: it knows nothing about patients."
    style.caption(figure, f"{text}\n{DISCLAIMER}")
    path = Path(path)
    return style.save(figure, path.parent, path.stem, ("png",))[0]


def describe(model: TrainedModel) -> dict[str, Any]:
    """The model, for the JSON."""
    weighted = "pos_weight of the loss undone" if model.checkpoint.pos_weight else "as trained"
    return {
        "checkpoint": str(model.path),
        "run": model.checkpoint.run,
        "title": model.title,
        "variant": model.config.variant,
        "n_cls": model.task.n_cls,
        "outputs": model.task.outputs,
        "classes": model.task.classes,
        "thresholds": model.thresholds,
        "selection": model.selection.value,
        "calibrated": weighted,
        "devices": model.statistics.devices,
        "sites": model.statistics.sites,
        "synthetic": model.synthetic,
        "trained_on": model.checkpoint.partial or "the whole corpus",
        "use": DISCLAIMER,
    }


def write_predictions(
    model: TrainedModel,
    predictions: Sequence[Prediction],
    failed: Mapping[str, str],
    folder: str | Path,
) -> None:
    """predictions.csv (a row per segment), summary.csv (a row per recording), predictions.json.

    failed: recording -> why it could not be used.
    """
    folder = Path(folder)
    tables = {"predictions.csv": pd.concat([p.table for p in predictions], ignore_index=True)}
    tables["summary.csv"] = pd.DataFrame([p.summary() for p in predictions])
    for name, table in tables.items():
        write_text(folder / name, table.to_csv(index=False, lineterminator="\n"))
    content = {"model": describe(model), "failed": dict(failed)}
    content["recordings"] = [prediction.to_dict() for prediction in predictions]
    write_json(folder / "predictions.json", content)
