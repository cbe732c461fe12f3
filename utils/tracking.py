"""Experiment tracking with MLflow that cannot stop a training run or lose its metrics.

The record of a run is its folder: `tracking.json` (where to, tags, parameters, final metrics, names
of files), `metrics.csv` (a row per epoch) and the files. A daemon thread makes the MLflow run equal
to it; training never waits, and the end of a run waits for seconds only. What MLflow has not taken
by then (or what was recorded with mlflow.enabled=false) is sent, at any time, by

    python -m utils.tracking RUN_FOLDER [RUN_FOLDER ...] [--tracking-uri URI]

It completes the run, or starts one where the store has none, and sends nothing twice. MLflow is
imported only when tracking is on. Credentials come from the environment, never from the URI.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import re
import shlex
import sys
import textwrap
import threading
import time
import uuid
import zlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from utils.common.cli import EXIT_USER, command
from utils.common.errors import UserError
from utils.common.files import check_sum, write_text
from utils.common.lock import held
from utils.common.readers import read_json

log = logging.getLogger(__name__)

RECORD = "tracking.json"
_KINDS = {"key": str, "tags": dict, "values": dict, "files": dict, "params": dict}  # in it
FIRST_PAUSE, LONGEST_PAUSE = 30.0, 600.0  # s between attempts while the store is down
CLOSING, BYTES_PER_S = 10.0, 20e6  # s that the end of a run waits; for large files a little more
MAX_KEY, MAX_PARAM, MAX_TAG = 250, 6000, 5000  # MLflow: characters
MAX_BATCH = 100  # MLflow: parameters or tags per call
ENVIRONMENT = {  # unless set already: seconds instead of minutes, and no telemetry
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class Tracker:
    """The tracked run of a folder. No method raises. Without a folder nothing is kept or sent."""

    def __init__(self, folder: Path | None = None, record: Mapping[str, Any] | None = None):
        self.folder = folder
        self.record = {"uri": None, "tags": {}, "values": {}, "files": {}} | dict(record or {})
        self.epochs = _read_epochs(folder) if folder else {}
        self._problem: str | None = None  # of the last attempt to send
        self._wake, self._closing, self._closed = (threading.Event() for _ in range(3))
        if self.record["uri"]:
            threading.Thread(target=self._send, name="tracking", daemon=True).start()
        self._keep()

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Metrics of one epoch, such as {"train/loss": 0.3}; without a step, of the whole run."""
        named = {_key(key): float(value) for key, value in values.items()}
        if step is None:
            self._keep(values=named)
        else:  # metrics.csv keeps it
            self.epochs = self.epochs | {step: named}
            self._wake.set()

    def tags(self, values: Mapping[str, Any]) -> None:
        """Add or change tags of the run."""
        self._keep(tags=_texts(values, MAX_TAG))

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A file of the run's folder, to appear in the artifact folder `folder`."""
        if self.folder:
            self._keep(files={os.path.relpath(path, self.folder): folder})

    def finish(self, status: str | None = "FINISHED") -> str | None:
        """End the run as FINISHED, FAILED or KILLED (None: as it ended before); returns what to
        do if MLflow has not taken everything."""
        if status:
            self.record = self.record | {"status": status, "end": _now()}
        self._keep()
        self._closing.set()
        self._wake.set()
        uri, folder = self.record["uri"], self.folder
        if not uri:
            return None
        files = [file for file in map(folder.joinpath, self.record["files"]) if file.is_file()]
        self._closed.wait(CLOSING + sum(file.stat().st_size for file in files) / BYTES_PER_S)
        if self._closed.is_set() and not self._problem:
            return None
        return (
            f"MLflow at {uri} has not taken all of this run\n"
            f"({self._problem or 'no answer yet'}). Nothing is lost; when it answers again:\n"
            f"  python -m utils.tracking {shlex.quote(str(folder))}"
        )

    def _keep(self, **parts: Mapping[str, Any]) -> None:
        """Add to the record (by replacing it: the thread reads it without a lock) and save it."""
        self.record = self.record | {name: self.record[name] | new for name, new in parts.items()}
        if self.folder:
            try:
                content = self.record | {"crc32": _crc(self.record)}
                write_text(self.folder / RECORD, json.dumps(content, indent=1) + "\n")
            except UserError as error:
                log.warning("what does not reach MLflow now will be lost: %s", error)
        self._wake.set()

    def _send(self) -> None:
        store, pause, warned = None, FIRST_PAUSE, False
        while not self._closed.is_set():
            closing = self._closing.is_set()  # before the record is read
            self._wake.clear()
            try:
                store = store or _Store(self.record["uri"], self.folder, self.record)
                store.complete(self.record, self.epochs)
            except Exception as error:  # whatever a store throws must not end a training run
                store, self._problem = None, _reason(error)
                if not warned:
                    text = "MLflow at %s has a problem (%s); training continues, nothing is lost"
                    log.warning(text, self.record["uri"], self._problem)
                    warned = True
                self._closing.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                if warned:
                    log.info("MLflow answers again; nothing was lost")
                self._problem, pause, warned = None, FIRST_PAUSE, False
                if not closing:
                    self._wake.wait()
            if closing:
                self._closed.set()


def start_tracking(
    mlflow: Any,
    folder: str | Path,
    *,
    run_name: str,
    tags: Mapping[str, Any],
    params: Mapping[str, Any] | None = None,
    parent: str | Path | None = None,
) -> Tracker:
    """Start or continue the tracked run that belongs to a run folder.

    Args:
        mlflow: the section of the configuration (`utils.config.schema.MLflowConfig`).
        params: flat {dotted key: value}; of a continued run, they stay as they were.
        parent: folder of the tracked run that this one is shown below.

    Raises:
        UserError: the URI holds credentials or is of no known kind, or MLflow is not installed.
    """
    if mlflow.enabled:
        check_tracking_uri(mlflow.tracking_uri)
        _import_mlflow()
    record = {"key": uuid.uuid4().hex, "start": _now(), "values": {}, "files": {}, "tags": {}}
    record |= {"params": _texts(params or {}, MAX_PARAM)} | read_record(Path(folder))
    record["tags"] |= {"mlflow.source.name": Path(sys.argv[0]).name} | _texts(tags, MAX_TAG)
    record |= {
        "uri": _absolute(mlflow.tracking_uri) if mlflow.enabled else None,
        "experiment": mlflow.experiment_name,
        "run_name": mlflow.run_name or run_name,
        "parent": parent and os.path.relpath(parent, folder),
        "status": "RUNNING",
        "end": None,
    }
    record["tags"] |= _texts(mlflow.tags, MAX_TAG)
    return Tracker(Path(folder), record)


def continue_tracking(folder: str | Path) -> Tracker:
    """The tracked run of a finished run's folder, to add to; end it with `finish(None)`."""
    record = read_record(Path(folder))
    if record.get("uri"):
        _import_mlflow()
    return Tracker(Path(folder), record) if record else Tracker()


def replay(folder: Path, tracking_uri: str | None = None) -> str:
    """Make MLflow (the run's own store by default) hold all that a run's folder holds.

    Raises:
        UserError: nothing was recorded there, or the store does not take it.
    """
    record = read_record(folder)
    if not record:
        damaged = (folder / RECORD).is_file()
        what = f"{folder / RECORD} is damaged" if damaged else f"no {RECORD} in {folder}"
        raise UserError(f"{what}; give the folder of a run")
    check_sum(folder / "metrics.csv")
    uri = tracking_uri or record["uri"]
    if not uri:
        raise UserError(f"{folder} was made without tracking; say where to: --tracking-uri")
    check_tracking_uri(uri)
    uri = _absolute(uri)
    _import_mlflow(MLFLOW_HTTP_REQUEST_TIMEOUT="120")
    try:
        with held(folder / RECORD, f"the record of {folder}", wait=60):
            store = _Store(uri, folder, record)
            store.complete(record, _read_epochs(folder))
    except Exception as error:
        problem = f"{folder} did not reach MLflow at {uri}: {_reason(error)}"
        raise UserError(f"{problem}; try again, or give another --tracking-uri") from error
    return f"{folder}: complete as run {store.run_id} at {uri}"


class _Store:
    """One MLflow store and what it holds of one run, which is created if need be. May raise."""

    def __init__(self, uri: str, folder: Path, record: Mapping[str, Any]):
        from mlflow import MlflowClient
        from sqlalchemy.engine import URL

        self.folder, place = folder, None
        file, name = _database(uri), record["experiment"]
        if file:  # MLflow would put files into the current folder, wherever the database is
            place = (file.parent / "mlruns" / re.sub(r"[^\w.-]", "_", name)).as_uri()
            uri = URL.create("sqlite", database=str(file)).render_as_string()  # %, ? in a path
        # MLflow creates a database's tables without a lock: two runs at once would crash
        with held(file, "the MLflow database", wait=30) if file else nullcontext():
            self.client = client = MlflowClient(uri)
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                client.create_experiment(name, place)
                experiment = client.get_experiment_by_name(name)
        self.experiment = experiment.experiment_id
        self.run_id = self._find(record["key"])  # by its tag: ids differ from store to store
        if self.run_id is None:
            options = {"start_time": record["start"], "run_name": record["run_name"]}
            tags = {"journal_key": record["key"]}
            self.run_id = client.create_run(self.experiment, tags=tags, **options).info.run_id
        self.there = client.get_run(self.run_id).data
        histories = (client.get_metric_history(self.run_id, k) for k in self.there.metrics)
        self.points = {(point.key, point.step) for history in histories for point in history}
        self.files: set[str] = set()
        client.update_run(self.run_id, "RUNNING")

    def complete(self, record: Mapping[str, Any], epochs: Mapping[int, Any]) -> None:
        """Send whatever the store does not have."""
        from mlflow.entities import Metric, Param, RunTag

        there, tags, now = self.there, dict(record["tags"]), record["end"] or _now()
        if record["parent"] and "mlflow.parentRunId" not in there.tags:
            parent = self._find(read_record(self.folder / record["parent"]).get("key"))
            tags |= {"mlflow.parentRunId": parent} if parent else {}
        tags = {k: v for k, v in tags.items() if there.tags.get(k) != v}
        params = {k: v for k, v in record["params"].items() if k not in there.params}
        values = record["values"].items()
        metrics = [Metric(k, v, now, 0) for k, v in values if str(v) != str(there.metrics.get(k))]
        for step, row in epochs.items():
            new = [(k, v) for k, v in row.items() if (k, step) not in self.points]
            metrics += [Metric(k, v, now, step) for k, v in new]
        calls = [{"metrics": metrics[i : i + 1000]} for i in range(0, len(metrics), 1000)]
        for kind, make, new in (("params", Param, params), ("tags", RunTag, tags)):
            made = [make(k, v) for k, v in new.items()]
            calls += [{kind: made[i : i + MAX_BATCH]} for i in range(0, len(made), MAX_BATCH)]
        for call in calls:
            self.client.log_batch(self.run_id, **call)
        self.points |= {(metric.key, metric.step) for metric in metrics}
        there.metrics.update(record["values"])
        there.params.update(params)
        there.tags.update(tags)
        for name in record["files"].keys() - self.files:
            path = (self.folder / name).resolve()
            if path.is_file() and path.is_relative_to(self.folder.resolve()):
                self.client.log_artifact(self.run_id, str(path), record["files"][name])
            else:
                log.warning("%s is not a file of %s and is not sent to MLflow", name, self.folder)
            self.files.add(name)
        if record["status"] != "RUNNING":
            self.client.set_terminated(self.run_id, record["status"], record["end"])

    def _find(self, key: str | None) -> str | None:
        query = f"tags.journal_key = '{key}'"
        found = self.client.search_runs([self.experiment], query, max_results=1)
        return found[0].info.run_id if found else None


def check_tracking_uri(uri: str) -> None:
    """Refuse a URI with credentials or of an unknown kind; the message never repeats the secret.

    Raises:
        UserError: with what to write instead.
    """
    try:
        parts = urlsplit(uri)
        _ = parts.port  # raises on "http://host:port"
    except ValueError:
        raise UserError("mlflow.tracking_uri is not a valid address; check host and port") from None
    web = parts.scheme in ("http", "https")
    secret = re.search(r"(pass|pwd|token|secret|key)\w*=", parts.query.lower())
    if parts.password or (parts.username and web) or secret:
        raise UserError(
            "mlflow.tracking_uri holds credentials, which would be stored with every run; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) in "
            "the environment instead; for a database its own means, such as ~/.pgpass"
        )
    server = web or parts.scheme.partition("+")[0] in ("postgresql", "mysql", "mssql")
    if not (server and parts.hostname) and not re.match("sqlite:///.", uri):
        raise UserError(
            f"mlflow.tracking_uri {uri!r} is not supported; write sqlite:///mlflow.db, a server's "
            "address such as http://localhost:5000, or a postgresql, mysql or mssql address"
        )


def epoch_metrics(row: Mapping[str, Any]) -> tuple[dict[str, float], int]:
    """A row of metrics.csv -> metrics such as "train/loss", and their step (epochs from 1)."""
    values = {key.replace("_", "/", 1): float(value) for key, value in row.items() if value != ""}
    return values, int(values.pop("epoch")) + 1


def _read_epochs(folder: Path) -> dict[int, dict[str, float]]:
    try:
        lines = (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()
        return {step: row for row, step in map(epoch_metrics, csv.DictReader(lines))}
    except (OSError, ValueError, TypeError, KeyError, csv.Error):
        return {}


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a run folder; empty where there is none, or a damaged one."""
    try:
        record = read_json(folder / RECORD, "")
    except UserError:
        return {}
    crc = record.pop("crc32", None)  # records of earlier versions have none
    whole = all(isinstance(record.get(name), kind) for name, kind in _KINDS.items())
    return record if whole and crc in (None, _crc(record)) else {}


def _crc(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _import_mlflow(**environment: str) -> None:
    for name, value in (ENVIRONMENT | environment).items():
        os.environ.setdefault(name, value)
    try:
        import mlflow  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"MLflow cannot be imported ({error}); run pip install -r requirements.txt, or turn "
            "tracking off with mlflow.enabled=false"
        ) from None
    for name in ("mlflow", "alembic", "urllib3"):  # an outage is reported once, by us
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _database(uri: str) -> Path | None:
    """The file of a SQLite URI; None for other stores."""
    return Path(uri[len("sqlite:///") :]).resolve() if uri.startswith("sqlite:///") else None


def _absolute(uri: str) -> str:
    file = _database(uri)
    return f"sqlite:///{file}" if file else uri


def _reason(error: BaseException) -> str:
    """One short line that says what went wrong, without the layers that passed it on."""
    if found := re.search(r"found version (\w+), but expected (\w+)", str(error)):
        return (
            f"the database has the schema {found[1]}, this version of MLflow needs {found[2]}; "
            "copy the file, then run `python -m mlflow db upgrade` with its address, or use the "
            "version that made it"
        )
    line = (str(error).strip().splitlines() or [""])[0]
    line = re.sub(r"^.*(?:Caused by|failed with exception) ", "", line)
    return textwrap.shorten(line or type(error).__name__, 160, placeholder=" ...")


def _now() -> int:
    return int(time.time() * 1000)


def _key(name: str) -> str:
    """A name that MLflow accepts for parameters, metrics and tags."""
    return re.sub(r"[^\w\-. :/]", "_", str(name))[:MAX_KEY]


def _texts(values: Mapping[str, Any], longest: int) -> dict[str, str]:
    return {_key(key): str(value)[:longest] for key, value in values.items()}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m utils.tracking", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--tracking-uri", help="send it there instead of to the run's own store")
    options = parser.parse_args(arguments)
    status = 0
    for folder in options.folders:
        try:
            print(replay(folder, options.tracking_uri))
        except UserError as error:
            log.error("%s", error)
            status = EXIT_USER
    return status


if __name__ == "__main__":
    raise SystemExit(main())
