"""Predict recordings with a trained model; the checkpoint holds all that is needed.

    python predict.py --checkpoint checkpoints/softfilm_best.pt recording.wav
    python predict.py --checkpoint FILE FOLDER --metadata metadata.csv --output DIR
    python predict.py --checkpoint FILE a.wav --cycles cycles.csv \\
        --device-name Meditron --site Tc --age 61 --bmi 27

A recording may have any format that soundfile reads, any sampling rate, channels and length. With
cycles (an ICBHI annotation of the same name next to it, --annotation or --cycles) there is one row
per cycle; without, sliding windows are averaged for each step of --hop seconds.

predictions.csv (a row per segment), summary.csv (a row per recording), predictions.json and a
picture per recording go to --output. Probabilities stand there twice: p_ as trained, which the
thresholds are for, and calibrated_, without the weight that the loss gave to positives. What is
not known of device, site, age and BMI is left out; the notes say what the model then assumes.
For research only: not a medical device.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.common.cli import command
from utils.common.errors import UserError

if TYPE_CHECKING:
    from utils.predict import Prediction

logger = logging.getLogger(__name__)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recordings", nargs="+", type=Path, help="files, or folders of them")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="trained model")
    parser.add_argument("--output", type=Path, default=Path("predictions"), metavar="DIR")
    parser.add_argument("--no-pictures", action="store_true")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: as configured")
    parser.add_argument("--batch-size", type=int, metavar="N", help="segments per forward pass")
    what = parser.add_argument_group("segments").add_mutually_exclusive_group()
    what.add_argument("--annotation", type=Path, metavar="FILE", help="of the only recording")
    what.add_argument("--cycles", type=Path, metavar="CSV", help="start, end (s) and perhaps file")
    what.add_argument(
        "--windows", action="store_true", help="even where there are cycles, which are only drawn"
    )
    sliding = parser.add_argument_group("windows (any of these implies --windows)")
    sliding.add_argument("--window", type=float, metavar="S", help="default: training's median")
    sliding.add_argument("--hop", type=float, metavar="S", help="default: 0.5, at most a window")
    sliding.add_argument(
        "--duration", choices=("unknown", "window"), default="unknown",
        help="what the model knows of a window's duration (default: unknown)",
    )  # fmt: skip
    about = parser.add_argument_group("metadata of every recording")
    about.add_argument("--device-name", dest="device_name", metavar="NAME")
    about.add_argument("--site", metavar="NAME")
    about.add_argument("--age", type=float, metavar="YEARS")
    about.add_argument("--bmi", type=float, metavar="KG/M2")
    about.add_argument(
        "--metadata", type=Path, metavar="CSV",
        help="file and any of device, site, age, bmi: of each recording, before the above",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.batch_size is not None and options.batch_size < 1:
        parser.error("--batch-size must be at least 1")
    if options.window or options.hop or options.duration == "window":
        if options.annotation or options.cycles:
            parser.error("cycles have their own length: leave out --window, --hop and --duration")
        options.windows = True
    return options


class Job:
    """What is known of each recording, checked before any is opened."""

    def __init__(self, options: argparse.Namespace, statistics):
        from data.recordings import Cycles, MetadataTable, find_audio
        from utils.predict import check_metadata

        self.options, self.files = options, find_audio(options.recordings)
        self.alone = len(self.files) == 1
        if options.annotation and not self.alone:
            raise UserError("--annotation is of one recording; put each next to its recording")
        given = {"device": options.device_name, "site": options.site}
        self.given = check_metadata(statistics, given | {"age": options.age, "bmi": options.bmi})
        self.cycles = Cycles(options.cycles) if options.cycles else None
        self.table = MetadataTable(options.metadata) if options.metadata else None
        for where, known in self.table or ():
            try:
                check_metadata(statistics, known)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
        lost = [file for file in self.files if self.table and not self.table.names(file)]
        if lost:
            logger.warning(
                "%s has no row for %d of %d recordings, such as %s; correct the column file where "
                "that is not meant",
                *(options.metadata, len(lost), len(self.files), lost[0]),
            )

    def metadata(self, file: Path) -> dict:
        return self.given | (self.table.metadata(file) if self.table else {})

    def segments(self, file: Path) -> dict:
        """Arguments `cycles` and `annotation` of `predict_recording`."""
        from data.recordings import read_annotation

        if self.cycles:
            return {"cycles": self.cycles.cycles(file, self.alone)}
        own = self.options.annotation or file.with_suffix(".txt")
        if not (self.options.annotation or own.is_file()):
            return {}
        try:
            return {"annotation" if self.options.windows else "cycles": read_annotation(own)}
        except UserError as error:
            if not self.options.windows:
                raise
            logger.warning("%s; it is not drawn", error)
            return {}


def line(prediction: Prediction) -> str:
    """A recording on the console."""
    found = prediction.summary()
    kind = found["of"] if prediction.window is None else "steps"
    shares = [f"{name} {100 * found[f'share_{name}']:.0f} %" for name in prediction.task.classes]
    head = f"{Path(prediction.file).name}: {found['seconds']:.1f} s, {found['segments']} {kind}"
    return f"{head}; {', '.join(shares)}"


def predict(options: argparse.Namespace) -> None:
    from utils.evaluation.trained_model import TrainedModel
    from utils.predict import check_model, draw, predict_recording, write_predictions

    model = TrainedModel.open(
        options.checkpoint, device=options.device, batch_size=options.batch_size
    )
    print(model.headline(), flush=True)
    check_model(model)
    job = Job(options, model.statistics)
    done, failed, notes, names = [], {}, {}, {}
    took, _ = 0.0, model.model
    for number, file in enumerate(job.files, start=1):
        began = time.monotonic()
        try:
            prediction = predict_recording(
                model, file, metadata=job.metadata(file), **job.segments(file),
                window=options.window, hop=options.hop, duration=options.duration,
                overview=not options.no_pictures, progress=f"{number}/{len(job.files)} {file.name}",
            )  # fmt: skip
        except UserError as error:
            logger.error("%s", error)
            failed[str(file)] = str(error)
            continue
        took += time.monotonic() - began
        print(line(prediction), flush=True)
        for note in prediction.notes:
            notes.setdefault(note, []).append(file.name)
        if not options.no_pictures:
            names[file.stem] = names.get(file.stem, 0) + 1
            twice = f"-{names[file.stem]}" if names[file.stem] > 1 else ""
            draw(prediction, options.output / f"{file.stem}{twice}.png")
            prediction.overview = None  # memory
        done.append(prediction)
    if done:
        write_predictions(model, done, failed, options.output)
        for note, files in notes.items():
            share = "" if len(files) == len(done) else f" ({len(files)} of {len(done)} files)"
            print(f"note: {note}{share}")
        seconds = sum(prediction.seconds for prediction in done)
        print(f"{seconds:.1f} s of sound in {took:.1f} s: {seconds / took:.1f} times real time")
        print(f"written to {options.output}")
    if failed:
        raise UserError(f"{len(failed)} of {len(job.files)} recordings could not be used")


@command
def main() -> None:
    predict(parse())


if __name__ == "__main__":
    raise SystemExit(main())
