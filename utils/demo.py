"""A page on this machine that shows what a trained model hears in a recording.

    python -m utils.demo --checkpoint checkpoints/softfilm_best.pt

Choose a wav or record one, and say what is known of device, site, age and BMI. The page shows
predict.py's picture, the class of every step, and how the answer changes with other metadata. It
answers to this machine only (127.0.0.1); a recording is deleted as soon as it is answered.
For research only: not a medical device.
"""

from __future__ import annotations

import argparse
import base64
import re
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from data.corpora.manifest import NUMBERS
from data.recordings import NAMES
from utils.common.cli import command
from utils.common.errors import UserError
from utils.common.files import write_error
from utils.evaluation.trained_model import TrainedModel
from utils.figures import style
from utils.predict import (
    DISCLAIMER,
    Prediction,
    check_metadata,
    check_model,
    draw,
    predict_recording,
    predict_under,
)

if TYPE_CHECKING:
    from flask import Flask
    from werkzeug.serving import BaseWSGIServer

PAGE = Path(__file__).with_name("demo.html")
HOST, PORT, MAX_MB = "127.0.0.1", 7860, 100


class TooLarge(UserError):
    """An upload past the limit."""


class Demo:
    """A model and the folder in which a recording lies while it is predicted.

    Args:
        folder: for uploads; max_mb: the largest one, in 10^6 bytes.
    """

    def __init__(self, model: TrainedModel, folder: Path, max_mb: float = MAX_MB):
        check_model(model)
        self.model, self.folder, self.max_mb = model, folder, max_mb
        #: One prediction at a time. The process waits for a thread of its own when it ends; one of
        #: the server's, with torch at work in it, would abort it.
        self.worker = ThreadPoolExecutor(1)
        _ = model.model, model.frontend  # a fault in them is said before the page is there

    def about(self) -> dict[str, Any]:
        """What the page says of the model."""
        model = self.model
        return {
            "headline": " ".join(model.headline().split()),
            "disclaimer": DISCLAIMER,
            "conditioned": model.is_conditioned,
            "names": {"device": model.statistics.devices, "site": model.statistics.sites},
            "numbers": NUMBERS,
            "max_mb": self.max_mb,
            "colours": {name: style.CLASS_COLOURS[name] for name in model.task.classes},
        }

    def answer(self, what: str, fields: Mapping[str, str], body: IO[bytes]) -> dict[str, Any]:
        """Plain data for the page.

        Args:
            what: "predict" or "compare".
            fields: name (of the file), device, site, age, bmi; empty means unknown.
            body: the recording.

        Raises:
            UserError: the recording or a field cannot be used.
        """
        name = re.sub(r"[^\w. -]", "_", fields.get("name", "")).strip(". ")[-100:]
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            path = Path(place, name or "recording")
            self._receive(body, path)
            try:
                given = self._given(fields)
                return self.worker.submit(getattr(self, what), path, given).result()
            except UserError as error:
                raise UserError(str(error).replace(f"{place}/", "")) from error

    def _receive(self, body: IO[bytes], path: Path) -> None:
        """Store a body of at most the limit, whatever length it says it has."""
        size = 0
        try:
            with path.open("wb") as file:
                while chunk := body.read(1 << 16):
                    size += len(chunk)
                    if size > self.max_mb * 1e6:
                        raise TooLarge(
                            f"{path.name} is larger than {self.max_mb:g} MB; use a shorter "
                            "recording, or start the demo with a larger --max-mb"
                        )
                    file.write(chunk)
        except OSError as error:
            raise write_error(path, error) from error

    def _given(self, fields: Mapping[str, str]) -> dict[str, Any]:
        given: dict[str, Any] = {name: fields.get(name) for name in NAMES}
        for name in NUMBERS:
            text = fields.get(name, "").strip()
            try:
                given[name] = float(text) if text else None
            except ValueError:
                raise UserError(f"{name} is {text!r}; give a number, or nothing") from None
        return check_metadata(self.model.statistics, given)

    def predict(self, path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
        """Picture (PNG, base64) and table of the classes."""
        found = predict_recording(self.model, path, metadata=given)
        picture = draw(found, path.parent / "picture.png").read_bytes()
        probability = [f"p_{name}" for name in found.task.outputs]
        thresholds = found.table.filter(like="threshold_").iloc[:1].squeeze(axis=0).to_dict()
        heads = [name + _at(thresholds.get(f"threshold_{name}")) for name in found.task.outputs]
        rows = found.table[["start", "end", "pred_class", *probability]].itertuples(index=False)
        return {
            "title": f"{path.name}: {found.seconds:.1f} s",
            "notes": found.notes,
            "picture": base64.b64encode(picture).decode(),
            "columns": ["from (s)", "to (s)", "class", *heads],
            "rows": [
                [f"{start:.2f}", f"{end:.2f}", name, *(f"{p:.3f}" for p in values)]
                for start, end, name, *values in rows
            ],
        }

    def compare(self, path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
        """Table of each device and each site in turn, the rest as given."""
        if not self.model.is_conditioned:
            return {"note": "This model uses no metadata: its answer is the same with any."}
        kinds = {"as chosen": given} | self._others(given)
        found = predict_under(self.model, path, list(kinds.values()), overview=False)
        task = self.model.task
        heads = [f"{name}, % of time" for name in task.classes]
        heads += [f"mean probability of {name}" for name in task.outputs]
        return {
            "columns": ["metadata", "other class, % of time", *heads],
            "rows": [[name, *_row(one, found[0])] for name, one in zip(kinds, found, strict=True)],
        }

    def _others(self, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """name -> metadata, of everything that training had, and of unknown."""
        statistics, others = self.model.statistics, {}
        for key, names, counts in (
            ("device", statistics.devices, statistics.device_counts),
            ("site", statistics.sites, statistics.site_counts),
        ):
            trained = [name for name, n in zip(names, counts, strict=False) if n]
            for name in (*trained, None):
                if name != given.get(key):
                    others[f"{key} {name or 'unknown'}"] = {**given, key: name}
        return others


def _at(threshold: float | None) -> str:
    return "" if threshold is None else f" (threshold {threshold:.2f})"


def _row(one: Prediction, chosen: Prediction) -> list[str]:
    """How a prediction differs from that under the chosen metadata, and what it says."""
    summary, seconds = one.summary(), one.table["end"] - one.table["start"]
    other = seconds[one.table["pred_class"] != chosen.table["pred_class"]].sum() / seconds.sum()
    shares = [other, *(summary[f"share_{name}"] for name in one.task.classes)]
    means = [summary[f"p_{name}_mean"] for name in one.task.outputs]
    return [f"{100 * share:.0f}" for share in shares] + [f"{mean:.3f}" for mean in means]


def create_app(demo: Demo) -> Flask:
    """GET / is the page; POST /predict and /compare take a recording and answer as JSON."""
    from flask import Flask, render_template_string, request

    app = Flask(__name__, static_folder=None)

    @app.get("/")
    def page():
        return render_template_string(PAGE.read_text(encoding="utf-8"), **demo.about())

    @app.post("/<any(predict, compare):what>")
    def answer(what: str):
        return demo.answer(what, request.args, request.stream)

    @app.errorhandler(UserError)
    def refused(error: UserError):
        return {"error": str(error)}, 413 if isinstance(error, TooLarge) else 422

    @app.after_request
    def protect(response):
        response.headers["Cache-Control"] = "no-store"
        response.headers["Content-Security-Policy"] = (
            "default-src 'none'; connect-src 'self'; img-src data:; media-src blob:; "
            "script-src 'unsafe-inline' blob:; style-src 'unsafe-inline'"
        )
        return response

    return app


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a trained model")
    parser.add_argument("--port", type=int, default=PORT, metavar="N", help=f"default: {PORT}")
    parser.add_argument("--max-mb", type=float, default=MAX_MB, metavar="MB",
                        help=f"largest recording, default: {MAX_MB}")  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: as configured")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    options = parser.parse_args(arguments)
    if not 0 <= options.port < 1 << 16:
        parser.error("--port is 0 (any free one) to 65535")
    if not 0 < options.max_mb < float("inf"):
        parser.error("--max-mb is above 0")
    return options


def listen(demo: Demo, port: int) -> BaseWSGIServer:
    """A server whose requests have a thread each; port 0: any that is free.

    Raises:
        UserError: the port is taken, or may not be used.
    """
    from werkzeug.serving import make_server

    try:
        with socket.create_server((HOST, port)) as listener:
            return make_server(HOST, port, create_app(demo), threaded=True, fd=listener.fileno())
    except OSError as error:
        raise UserError(
            f"port {port} cannot be used ({error.strerror}); choose another with --port"
        ) from error


@command
def main() -> None:
    options = parse()
    if find_spec("flask") is None:
        raise UserError(
            "the demo needs Flask, which the whole mlflow package brings: "
            "python -m pip install mlflow -c constraints.txt"
        )
    model = TrainedModel.open(options.checkpoint, device=options.device)
    print(model.headline(), flush=True)
    with tempfile.TemporaryDirectory(prefix="demo-", ignore_cleanup_errors=True) as folder:
        demo = Demo(model, Path(folder), options.max_mb)
        server = listen(demo, options.port)
        address = f"http://{HOST}:{server.port}"
        print(f"open {address} (Ctrl-C ends it, after the answer under way)", flush=True)
        if options.open:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        server.serve_forever()  # Ctrl-C ends it
        demo.worker.shutdown(cancel_futures=True)


if __name__ == "__main__":
    raise SystemExit(main())
