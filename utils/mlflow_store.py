"""The MLflow side of `utils.tracking`: journal records become calls of one tracking store.

Everything here may raise; `utils.tracking` decides what an error means for a run. What MLflow's
own client would do for minutes (retries, waiting for a locked database) is bounded to seconds.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit
from urllib.request import getproxies, proxy_bypass

from utils.common.errors import UserError

log = logging.getLogger(__name__)

PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
PROBE_SECONDS = 2.0  # within which the store has to accept a connection or give its lock
CREATION_SECONDS = 30.0  # wait while another process creates the same SQLite database
MAX_METRICS, MAX_ITEMS = 1000, 100  # MLflow: metrics, and parameters or tags, per batch
REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS"}  # wrong whenever it is sent
# MLflow's own defaults (seven retries of 120 s) would stop training for minutes. One retry renews
# a connection that went stale during a long epoch. Hospitals do not expect telemetry.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class Refused(Exception):
    """A record that no store will ever take; the others can still be sent."""


def import_mlflow(**environment: str) -> None:
    """Import MLflow with our limits; what the user has set in the environment wins.

    Raises:
        UserError: MLflow is not installed.
    """
    for name, value in (ENVIRONMENT | environment).items():
        os.environ.setdefault(name, value)
    try:
        import mlflow  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"MLflow can not be imported ({error}); run pip install -r requirements.txt, or turn "
            "tracking off with mlflow.enabled=false"
        ) from None


def check_tracking_uri(uri: str) -> None:
    """Refuse a URI with credentials or of an unknown kind; the message never repeats the secret.

    Raises:
        UserError: with what to write instead.
    """
    try:
        parts = urlsplit(uri)
        secret = parts.password or (parts.username if parts.scheme in ("http", "https") else None)
        query = {key.lower() for key, _ in parse_qsl(parts.query, keep_blank_values=True)}
        _ = parts.port  # raises on "http://host:port"
    except ValueError:
        raise UserError("mlflow.tracking_uri is not a valid address; check host and port") from None
    if secret or any(re.search("pass|pwd|token|secret|key", name) for name in query):
        raise UserError(
            "mlflow.tracking_uri holds credentials, which would be stored with every run; take "
            "them out of the address and set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) in the environment; for a "
            "database its own means, such as PGPASSWORD or ~/.pgpass"
        )
    kind = parts.scheme.partition("+")[0]
    if not (uri.startswith("sqlite:///") and uri != "sqlite:///") and not (
        kind in PORTS and parts.hostname
    ):
        raise UserError(
            f"mlflow.tracking_uri {uri!r} is not supported; write sqlite:///mlflow.db, a server's "
            "address such as http://localhost:5000, or a postgresql, mysql or mssql address"
        )


def absolute_uri(uri: str) -> str:
    """A SQLite file's URI with its full path, so that it holds in any current folder."""
    file = sqlite_file(uri)
    return f"sqlite:///{file}" if file else uri


def sqlite_file(uri: str) -> Path | None:
    """The database file of a SQLite URI; None for other stores."""
    return Path(uri[len("sqlite:///") :]).resolve() if uri.startswith("sqlite:///") else None


def reason(error: BaseException) -> str:
    """One short line that says what went wrong, without the layers that passed it on."""
    line = (str(error).strip().splitlines() or [""])[0]
    line = re.sub(r"^.*(?:Caused by|failed with exception) ", "", line)
    return (line or type(error).__name__)[:160]


class Sender:
    """Turns journal records into calls of one MLflow store."""

    def __init__(self, uri: str, journal: Any):
        self.uri = uri
        self.journal = journal
        self.client: Any = None
        self.refused = 0

    def send_pending(self) -> int:
        """Send everything pending, in order, and return how many records that were.

        Raises:
            Exception: of any kind, at the first record that the store does not take now; what was
                sent before it counts as sent.
        """
        if self.client is None:
            self._connect()
        else:
            _probe(self.uri)
        pending = self.journal.pending
        try:
            with _quiet():
                for record in pending:
                    self._send(record)
                    self.journal.sent = record["n"]
        finally:
            try:
                self.journal.save_position(self.uri)
            except OSError as error:  # only costs sending these records again
                log.debug("%s: %s", self.journal.marker, error)
        return len(pending)

    def _connect(self) -> None:
        from mlflow import MlflowClient

        with _creation_lock(self.uri):
            _probe(self.uri)
            with _quiet():
                client = MlflowClient(tracking_uri=self.uri)
                client.search_experiments(max_results=1)  # creates the tables of a fresh database
                known = self.journal.run_id
                if known and not _run_exists(client, known):
                    log.warning(
                        "MLflow run %s of %s is not at %s; a new run is started there with all "
                        "that was recorded",
                        known,
                        self.journal.folder,
                        self.uri,
                    )
                    self.journal.run_id, self.journal.sent = None, 0
        self.client = client

    def _send(self, record: dict[str, Any]) -> None:
        from mlflow.exceptions import MlflowException

        if record["op"] == "start":  # nothing can follow without a run: never skipped
            self._start(record)
            return
        send = {
            "metrics": self._metrics,
            "tags": self._tags,
            "artifact": self._artifact,
            "finish": self._finish,
        }.get(record["op"])
        try:
            if send is None:
                raise Refused(f"no record is called {record['op']!r}")
            send(record)
        except (Refused, MlflowException) as error:
            if isinstance(error, MlflowException) and error.error_code not in REFUSALS:
                raise
            self.refused += 1
            log.warning("MLflow record %s is left out: %s", record["n"], reason(error))

    def _start(self, record: dict[str, Any]) -> None:
        from mlflow.entities import Param

        client, wanted = self.client, record["run_id"]
        run_id = self.journal.run_id
        if run_id is None and wanted and _run_exists(client, wanted):
            run_id = wanted
        elif run_id is None:
            if wanted:
                log.warning("no MLflow run %s at %s; a new one is started", wanted, self.uri)
            run_id = self._create_run(record)
        self.journal.run_id = run_id
        client.update_run(run_id, status="RUNNING")
        self._tags({"values": record["tags"]})
        there = client.get_run(run_id).data.params  # MLflow does not let a parameter change
        new = [Param(key, value) for key, value in record["params"].items() if key not in there]
        self._batches("params", new, MAX_ITEMS)

    def _create_run(self, record: dict[str, Any]) -> str:
        experiment = self._experiment(record["experiment"])
        key = record["key"]  # finds a run whose creation was answered too late
        found = self.client.search_runs([experiment], f"tags.journal_key = '{key}'", max_results=1)
        if found:
            return found[0].info.run_id
        run = self.client.create_run(
            experiment,
            start_time=record["time"],
            tags={"journal_key": key},
            run_name=record["run_name"],
        )
        return run.info.run_id

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            database = sqlite_file(self.uri)
            place = None  # a server decides for itself
            if database:  # MLflow would take the current folder, wherever the database is
                place = (database.parent / "mlruns" / re.sub(r"[^\w.-]", "_", name)).as_uri()
            try:
                return self.client.create_experiment(name, artifact_location=place)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = self.client.get_experiment_by_name(name)  # another run was faster
        if experiment.lifecycle_stage == "deleted":
            raise RuntimeError(
                f"experiment {name!r} was deleted there; restore it or set mlflow.experiment_name"
            )
        return experiment.experiment_id

    def _metrics(self, record: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        when, step = record["time"], record["step"]
        items = [Metric(key, value, when, step) for key, value in record["values"].items()]
        self._batches("metrics", items, MAX_METRICS)

    def _tags(self, record: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        items = [RunTag(key, value) for key, value in record["values"].items()]
        self._batches("tags", items, MAX_ITEMS)

    def _artifact(self, record: dict[str, Any]) -> None:
        root = self.journal.folder.resolve()
        path = (root / record["path"]).resolve()
        if not path.is_relative_to(root):
            raise Refused(f"{record['path']} is not inside {root}")
        if not path.is_file():
            raise Refused(f"no file {path}")
        self.client.log_artifact(self.journal.run_id, str(path), record["folder"])

    def _finish(self, record: dict[str, Any]) -> None:
        self.client.set_terminated(self.journal.run_id, record["status"], record["time"])

    def _batches(self, kind: str, items: Sequence[Any], size: int) -> None:
        iterator = iter(items)
        while batch := list(islice(iterator, size)):
            self.client.log_batch(self.journal.run_id, **{kind: batch})


def _run_exists(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return False
        raise


def _probe(uri: str) -> None:
    """Raise OSError or sqlite3.Error within seconds if the store takes nothing now."""
    file = sqlite_file(uri)
    if file:
        connection = sqlite3.connect(file, timeout=PROBE_SECONDS, isolation_level=None)
        try:  # needs write access and the lock, for which MLflow would wait 20 s
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        finally:
            connection.close()
        return
    parts = urlsplit(uri)
    kind = parts.scheme.partition("+")[0]
    if kind in getproxies() and not proxy_bypass(parts.hostname):
        return  # reached through a proxy only
    socket.create_connection((parts.hostname, parts.port or PORTS[kind]), PROBE_SECONDS).close()


@contextmanager
def _creation_lock(uri: str) -> Iterator[None]:
    """MLflow creates a SQLite database's tables without a lock: two runs at once would crash."""
    file = sqlite_file(uri)
    if not file:
        yield
        return
    from filelock import FileLock

    artifacts = file.parent / "mlruns"
    artifacts.mkdir(parents=True, exist_ok=True)
    with FileLock(artifacts / f".{file.name}.lock", timeout=CREATION_SECONDS):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what MLflow and urllib3 log themselves: an outage is told once, by us."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic", "urllib3")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
