"""Experiment tracking with MLflow that can neither stop a training run nor lose its figures.

Every call is first written to a journal in the run's folder (`tracking.jsonl`, one JSON record per
line) and then sent. While the tracking store does not answer, records stay in the journal, one
warning is logged and training goes on; later calls try again, within a bound on the time lost.
What is still missing at the end is sent by

    python -m utils.tracking upload RUN_FOLDER [RUN_FOLDER ...] [--tracking-uri URI]

`tracking.json` beside the journal says which run it became and how far it was sent. Sending a
record twice changes nothing: times are taken from the journal, and MLflow drops a metric that is
equal in value, step and time. An epoch that a killed run repeats is not recorded again: its time
would be another.
MLflow is imported only when tracking is on. Credentials come from the environment, never a URI.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shlex
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.common.errors import UserError
from utils.mlflow_store import Sender, absolute_uri, check_tracking_uri, import_mlflow, reason

log = logging.getLogger(__name__)

JOURNAL = "tracking.jsonl"
MARKER = "tracking.json"
FIRST_PAUSE, LONGEST_PAUSE = 30.0, 600.0  # s between attempts while the store is down
LOST_SECONDS = 15.0  # failed attempts may cost a run this much before its end
UPLOAD_TIMEOUT = "120"  # s; nobody waits, and a large checkpoint takes a server a while
MAX_KEY, MAX_PARAM, MAX_TAG = 250, 6000, 5000  # MLflow: characters


class Tracker:
    """Tracking that is off: every call does nothing. `MLflowTracker` is the one that is on."""

    run_id: str | None = None

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """One batch of metrics, such as {"train/loss": .3, "val/score": .6}, of one epoch."""

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A file of the run's folder, to appear in the artifact folder `folder`."""

    def tags(self, values: Mapping[str, Any]) -> None:
        """Add or change tags of the run."""

    def finish(self, status: str = "FINISHED") -> str | None:
        """End the run as FINISHED, FAILED or KILLED; returns how to upload what is missing."""
        return None


def start_tracking(
    *,
    enabled: bool,
    tracking_uri: str,
    experiment_name: str,
    folder: str | Path,
    run_name: str | None = None,
    tags: Mapping[str, Any] | None = None,
    params: Mapping[str, Any] | None = None,
    run_id: str | None = None,
    parent_run_id: str | None = None,
) -> Tracker:
    """Start or continue the tracked run that belongs to a run folder.

    Args:
        enabled: False gives a tracker that does nothing, and imports nothing.
        tracking_uri: sqlite:///FILE, a server's http(s) address, or a database.
        folder: the run's folder; receives the journal.
        params: flat {dotted key: value}; on continuing, only new keys are added.
        run_id: run to continue, where the folder itself does not know; a new one starts, with a
            warning, if the store does not have it.
        parent_run_id: shows the run nested below that one.

    Raises:
        UserError: the URI holds credentials or is of no known kind, or MLflow is not installed.
    """
    if not enabled:
        return Tracker()
    check_tracking_uri(tracking_uri)
    tags = dict(tags or {})
    if parent_run_id:
        tags["mlflow.parentRunId"] = parent_run_id
    import_mlflow()
    tracker = MLflowTracker(Path(folder), absolute_uri(tracking_uri))
    tracker.record(
        "start",
        key=uuid.uuid4().hex,
        tracking_uri=tracker.uri,
        experiment=experiment_name,
        run_name=run_name,
        run_id=run_id,
        tags={"mlflow.source.name": Path(sys.argv[0]).name} | _texts(tags, MAX_TAG),
        params=_texts(params or {}, MAX_PARAM),
    )
    return tracker


def continue_tracking(folder: str | Path) -> Tracker:
    """The tracked run of a finished run's folder, to add to; off where there is none.

    Its status and times stay as they are, so it needs no `finish`.
    """
    journal = Journal(Path(folder))
    starts = [record for record in journal.records if record["op"] == "start"]
    if not starts:
        return Tracker()
    import_mlflow()
    return MLflowTracker(journal.folder, starts[-1]["tracking_uri"])


def run_name(title: str, n_cls: int, selection: str, seed: int) -> str:
    """Such as "SoftFiLM-AST 4-class validation s0"."""
    return f"{title} {n_cls}-class {selection} s{seed}"


def run_tags(
    *,
    variant: str,
    n_cls: int,
    selection: str,
    seed: int,
    partial_data: bool,
    git_revision: str | None,
    run_folder: str | Path,
) -> dict[str, str]:
    """The tags that every run carries, to filter by (`tags.variant = "ast_film"`)."""
    return {
        "variant": variant,
        "task": f"{n_cls}-class",
        "selection": selection,
        "seed": str(seed),
        "partial_data": str(partial_data).lower(),
        "git_revision": git_revision or "unknown",
        "run_folder": str(run_folder),
    }


class Journal:
    """The records of one run folder, and how far they were sent."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / JOURNAL
        self.marker = folder / MARKER
        self.records = list(_read_records(self.path))
        self._torn = True  # the last line may be half of one: a kill or a full disk
        try:
            state = json.loads(self.marker.read_text(encoding="utf-8"))
            self.run_id, self.sent = state["run_id"], int(state["sent"])
        except (OSError, ValueError, KeyError, TypeError):
            self.run_id, self.sent = None, 0

    @property
    def pending(self) -> list[dict[str, Any]]:
        """Records that were not sent yet, oldest first."""
        return [record for record in self.records if record["n"] > self.sent]

    def metrics(self, step: int) -> dict[str, float]:
        """The latest value of every metric that was recorded for a step."""
        known: dict[str, float] = {}
        for record in self.records:
            if record["op"] == "metrics" and record.get("step") == step:
                known |= record.get("values", {})
        return known

    def append(self, op: str, **values: Any) -> None:
        """Keep a record in memory and on disk. Raises OSError if the disk does not take it."""
        number = self.records[-1]["n"] + 1 if self.records else 1
        record = {"n": number, "op": op, "time": int(time.time() * 1000), **values}
        self.records.append(record)
        line = ("\n" if self._torn and self.path.exists() else "") + json.dumps(record) + "\n"
        self._torn = True
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
        self._torn = False

    def save_position(self, uri: str) -> None:
        """Write the marker, whole or not at all."""
        state = {"run_id": self.run_id, "sent": self.sent, "tracking_uri": uri}
        new = self.marker.with_suffix(".new")
        new.write_text(json.dumps(state) + "\n", encoding="utf-8")
        new.replace(self.marker)


class MLflowTracker(Tracker):
    """Journals every call and sends it as soon as the store takes it. No public method raises."""

    def __init__(self, folder: Path, uri: str):
        self.uri = uri
        self.journal = Journal(folder)
        self._sender = Sender(uri, self.journal)
        self._warned: set[str] = set()
        self._reason: str | None = None  # of the last failure; None while all is well
        self._pause, self._next_attempt, self._lost = FIRST_PAUSE, 0.0, 0.0

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until the store was reached once."""
        return self.journal.run_id

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        numbers = {}
        for key, value in values.items():
            try:
                numbers[_key(key)] = float(value)
            except (TypeError, ValueError):
                self._warn("metric", f"metric {key} is not a number and is not tracked")
        known = self.journal.metrics(int(step or 0))
        # an epoch is tracked once; a figure without epoch may change, by another evaluation
        once = step is not None
        new = {k: v for k, v in numbers.items() if k not in known or not (once or known[k] == v)}
        if new:
            self.record("metrics", step=int(step or 0), values=new)

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        try:
            inside = Path(path).resolve().relative_to(self.journal.folder.resolve())
        except ValueError:
            self._warn("artifact", f"{path} is outside {self.journal.folder} and is not tracked")
            return
        self.record("artifact", path=inside.as_posix(), folder=folder)

    def tags(self, values: Mapping[str, Any]) -> None:
        self.record("tags", values=_texts(values, MAX_TAG))

    def finish(self, status: str = "FINISHED") -> str | None:
        self.record("finish", last=True, status=status)
        missing = len(self.journal.pending)
        if missing:
            return (
                f"{missing} records did not reach MLflow at {self.uri}\n({self._reason}).\n"
                f"They are kept in {self.journal.path}; when it answers again:\n"
                f"  python -m utils.tracking upload {shlex.quote(str(self.journal.folder))}"
            )
        if self._sender.refused:
            return (
                f"MLflow refused {self._sender.refused} records of this run; they are kept in "
                f"{self.journal.path}"
            )
        return None

    def record(self, op: str, *, last: bool = False, **values: Any) -> None:
        """Journal one record and send whatever is pending; `last` tries in any case."""
        try:
            self.journal.append(op, **values)
        except OSError as error:
            self._warn(
                "journal",
                f"{self.journal.path} can not be written ({reason(error)}); what does not reach "
                "MLflow during this run will be lost: make space or give write access",
            )
        start = time.monotonic()
        if not last and self._reason and (start < self._next_attempt or self._lost > LOST_SECONDS):
            return
        try:
            self._sender.send_pending()
        except Exception as error:  # whatever a store throws must not end a training run
            self._lost += time.monotonic() - start
            self._next_attempt = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._reason = reason(error)
            self._warn(
                "down",
                f"MLflow at {self.uri} does not take records ({self._reason}); training goes on, "
                f"{self.journal.path} keeps them",
            )
        else:
            if self._reason:
                log.info("MLflow takes records again; nothing was lost")
            self._reason, self._pause = None, FIRST_PAUSE

    def _warn(self, topic: str, message: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            log.warning(message)


def upload(folder: str | Path, tracking_uri: str | None = None) -> str:
    """Send what a run's journal still holds; returns a line that says what was done.

    Args:
        tracking_uri: where to; the run's own by default.

    Raises:
        UserError: no journal there, or the store still does not take it.
    """
    journal = Journal(Path(folder))
    starts = [record for record in journal.records if record["op"] == "start"]
    if not starts:
        raise UserError(f"no records in {journal.path}; was tracking on when this run was made?")
    uri = tracking_uri or starts[-1]["tracking_uri"]
    check_tracking_uri(uri)
    uri = absolute_uri(uri)
    import_mlflow(MLFLOW_HTTP_REQUEST_TIMEOUT=UPLOAD_TIMEOUT)
    sender = Sender(uri, journal)
    try:
        sent = sender.send_pending()
    except Exception as error:
        raise UserError(
            f"{len(journal.pending)} records of {folder} did not reach MLflow at {uri}: "
            f"{reason(error)}; try again when it answers, or give another --tracking-uri"
        ) from error
    refused = f", {sender.refused} of them refused" if sender.refused else ""
    return f"{folder}: {sent} records sent{refused}; run {journal.run_id} at {uri}"


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m utils.tracking upload RUN_FOLDER ...`; exit status 2 if something is missing."""
    parser = argparse.ArgumentParser(prog="python -m utils.tracking", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("upload", help="send what a run could not send to MLflow")
    command.add_argument("folders", nargs="+", metavar="RUN_FOLDER")
    command.add_argument("--tracking-uri", help="send it there instead of to the run's own store")
    options = parser.parse_args(arguments)
    status = 0
    for folder in options.folders:
        try:
            print(upload(folder, options.tracking_uri))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
    return status


def _read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Whole records in order; the half line that a kill or a full disk leaves is passed over."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and {"n", "op", "time"} <= record.keys():
                yield record


def _key(name: str) -> str:
    """A name that MLflow accepts for parameters, metrics and tags."""
    return re.sub(r"[^\w\-. :/]", "_", str(name))[:MAX_KEY]


def _texts(values: Mapping[str, Any], longest: int) -> dict[str, str]:
    return {_key(key): str(value)[:longest] for key, value in values.items()}


if __name__ == "__main__":
    raise SystemExit(main())
