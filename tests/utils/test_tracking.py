"""Tracking: what arrives in MLflow, and what a run loses when MLflow does not answer (nothing)."""

import json
import logging
import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from omegaconf import OmegaConf

from utils import mlflow_store, tracking
from utils.common.errors import UserError
from utils.config.schema import MLflowConfig
from utils.tracking import check_tracking_uri, main, run_name, run_tags, start_tracking, upload

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Whatever `start_tracking` sets by default is gone after each test."""
    for name in mlflow_store.ENVIRONMENT:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """MLflow's tables, made once: the migrations take seconds."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("mlflow") / "empty.db"
    MlflowClient(tracking_uri=f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def uri(tmp_path, empty_database):
    """A SQLite store of this test's own."""
    (tmp_path / "store").mkdir()
    shutil.copy(empty_database, tmp_path / "store" / "mlflow.db")
    return f"sqlite:///{tmp_path}/store/mlflow.db"


@pytest.fixture
def warnings(caplog):
    """The warnings logged so far, as a function."""
    caplog.set_level(logging.INFO)
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def start(uri, folder, **options):
    options = {"run_name": "a run", "tags": {"variant": "ast"}, "params": {"lr": 1e-3}} | options
    return start_tracking(
        enabled=True, tracking_uri=uri, experiment_name="lungs", folder=folder, **options
    )


def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def all_runs(uri):
    store = client(uri)
    return store.search_runs([e.experiment_id for e in store.search_experiments()])


def history(uri, run_id, key):
    return [(m.step, m.value) for m in client(uri).get_metric_history(run_id, key)]


def dead_uri():
    """A port of this machine that refuses connections."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


# ------------------------------------------------------------------ all is well


def test_off_imports_nothing_and_does_nothing(tmp_path):
    code = f"""
import sys
from utils.tracking import start_tracking
t = start_tracking(enabled=False, tracking_uri="http://user:secret@host", experiment_name="x",
                   folder={str(tmp_path / "run")!r}, params={{"a": 1}})
t.metrics({{"train/loss": 1.0}}, 0); t.artifact("nowhere.png"); t.tags({{"a": "b"}})
assert t.run_id is None and t.finish("FINISHED") is None
assert "mlflow" not in sys.modules and "sqlalchemy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
    assert not (tmp_path / "run").exists()


def test_everything_arrives(tmp_path, uri, warnings):
    folder = tmp_path / "run"
    params = {f"section.key{i}": i for i in range(230)} | {"long": "y" * 9000}
    parent = start(uri, tmp_path / "parent")
    tracker = start(uri, folder, params=params, parent_run_id=parent.run_id)
    assert client(uri).get_run(tracker.run_id).info.status == "RUNNING"
    (folder / "figures").mkdir()
    (folder / "figures" / "confusion.png").write_bytes(b"png")
    tracker.metrics({"train/loss": 0.7, "val/score": float("nan")}, 0)
    tracker.metrics({"train/loss": 0.6, "val/score": 0.5}, 1)
    tracker.metrics({"test/se (4-class)": 0.25})
    tracker.artifact(folder / "figures" / "confusion.png", "figures")
    tracker.tags({"protocol": "validation"})
    assert tracker.finish("FINISHED") is None

    run = client(uri).get_run(tracker.run_id)
    assert (run.info.run_name, run.info.status) == ("a run", "FINISHED")
    assert len(run.data.params) == 231 and run.data.params["section.key229"] == "229"
    assert run.data.params["long"] == "y" * 6000
    assert run.data.tags["variant"] == "ast" and run.data.tags["protocol"] == "validation"
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert history(uri, tracker.run_id, "train/loss") == [(0, 0.7), (1, 0.6)]
    assert run.data.metrics["val/score"] == 0.5 and run.data.metrics["test/se _4-class_"] == 0.25
    # artifacts lie beside the database, wherever the current folder is
    artifact = next((tmp_path / "store" / "mlruns" / "lungs").rglob("confusion.png"))
    assert artifact.parent.name == "figures" and artifact.read_bytes() == b"png"
    assert warnings() == []


def test_one_call_of_the_store_per_epoch(tmp_path, uri, monkeypatch):
    from mlflow import MlflowClient

    tracker, calls = start(uri, tmp_path / "run"), []
    log_batch = MlflowClient.log_batch
    monkeypatch.setattr(
        MlflowClient, "log_batch", lambda self, *a, **k: calls.append(k) or log_batch(self, *a, **k)
    )
    tracker.metrics({f"val/m{i}": float(i) for i in range(60)}, 3)
    assert len(calls) == 1 and len(calls[0]["metrics"]) == 60


def test_resuming_continues_the_same_run(tmp_path, uri, warnings):
    first = start(uri, tmp_path / "run", params={"lr": 1, "epochs": 5})
    first.metrics({"train/loss": 1.0}, 0)
    first.finish("KILLED")
    killed = client(uri).get_run(first.run_id).info
    assert killed.status == "KILLED" and killed.end_time

    # the folder knows the run; a copy without journal is told by the checkpoint's run id
    for folder in ("run", "elsewhere"):
        again = start(uri, tmp_path / folder, params={"lr": 2, "new": 3}, run_id=first.run_id)
        assert again.run_id == first.run_id
        assert client(uri).get_run(first.run_id).info.status == "RUNNING"
        again.metrics({"train/loss": 0.5}, 1)
        again.finish("FINISHED")
    run = client(uri).get_run(first.run_id)
    assert len(all_runs(uri)) == 1 and run.info.status == "FINISHED"
    assert run.data.params == {"lr": "1", "epochs": "5", "new": "3"}  # MLflow's are immutable
    assert {step for step, _ in history(uri, first.run_id, "train/loss")} == {0, 1}
    assert warnings() == []


def test_an_epoch_that_a_killed_run_repeats_is_tracked_once(tmp_path, uri, warnings):
    first = start(uri, tmp_path / "run")
    first.metrics({"train/loss": 0.5, "train/clips_per_s": 90.0}, 1)
    first.metrics({"test/score": 60.0})
    time.sleep(0.002)  # MLflow drops a metric that is equal in its time, too
    again = start(uri, tmp_path / "run")  # after SIGKILL: from a checkpoint before that epoch
    again.metrics({"train/loss": 0.5, "train/clips_per_s": 80.0, "val/score": 50.0}, 1)
    again.metrics({"train/loss": 0.5}, 2)
    again.metrics({"test/score": 60.0})
    assert history(uri, first.run_id, "train/loss") == [(1, 0.5), (2, 0.5)]
    assert history(uri, first.run_id, "train/clips_per_s") == [(1, 90.0)]
    assert history(uri, first.run_id, "val/score") == [(1, 50.0)]
    assert history(uri, first.run_id, "test/score") == [(0, 60.0)]
    again.metrics({"test/score": 61.0})  # evaluated anew: what has no epoch may change
    assert client(uri).get_run(first.run_id).data.metrics["test/score"] == 61.0
    assert len(again.journal.records) == 7, "a call with nothing new leaves no record"


def test_a_run_that_the_store_does_not_have_starts_anew_with_all_records(tmp_path, uri, warnings):
    first = start(uri, tmp_path / "run")
    first.metrics({"train/loss": 1.0}, 0)
    client(uri).delete_run(first.run_id)
    second = start(uri, tmp_path / "run", run_id=first.run_id)
    assert second.run_id not in (None, first.run_id)
    assert history(uri, second.run_id, "train/loss") == [(0, 1.0)]
    third = start(uri, tmp_path / "other", run_id="0" * 32)
    assert third.run_id not in (None, "0" * 32)
    assert [("a new run is started" in w, "a new one is started" in w) for w in warnings()] == [
        (True, False),
        (False, True),
    ]


def test_names_and_tags():
    assert run_name("SoftFiLM", 4, "validation", 3) == "SoftFiLM 4-class validation s3"
    tags = run_tags(
        variant="ast_film",
        n_cls=2,
        selection="test",
        seed=1,
        partial_data=True,
        git_revision=None,
        run_folder=Path("runs/x"),
    )
    assert tags == {
        "variant": "ast_film",
        "task": "2-class",
        "selection": "test",
        "seed": "1",
        "partial_data": "true",
        "git_revision": "unknown",
        "run_folder": "runs/x",
    }


def test_the_shipped_yaml_states_the_defaults():
    shipped = OmegaConf.load(ROOT / "configs" / "mlflow.yaml")
    assert OmegaConf.to_container(shipped) == {
        "mlflow": OmegaConf.to_container(OmegaConf.structured(MLflowConfig))
    }


# ------------------------------------------------------------------ credentials


@pytest.mark.parametrize(
    "address",
    [
        "http://ann:hunter2@tracking.example:5000",
        "https://hunter2@tracking.example",
        "postgresql://ann:hunter2@db/mlflow",
        "https://tracking.example/?token=hunter2",
        "mysql+pymysql://db/mlflow?password=hunter2",
    ],
)
def test_credentials_in_the_address_are_refused(tmp_path, address):
    with pytest.raises(UserError, match="MLFLOW_TRACKING_USERNAME") as caught:
        start(address, tmp_path / "run")
    assert "hunter2" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "address", ["", "mlruns", "sqlite:///", "ftp://x", "http://", "http://h:p"]
)
def test_addresses_of_no_known_kind_are_refused(address):
    with pytest.raises(UserError, match=r"mlflow\.tracking_uri"):
        check_tracking_uri(address)


@pytest.mark.parametrize(
    "address",
    ["sqlite:///mlflow.db", "https://h/base", "postgresql+psycopg2://ann@db/mlflow", "http://h:80"],
)
def test_good_addresses_pass(address):
    check_tracking_uri(address)


def test_a_password_of_the_environment_is_written_nowhere(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    with answering(503) as address:
        tracker = start(address, tmp_path / "run")
        message = tracker.finish("FAILED")
    texts = [message, caplog.text] + [p.read_text() for p in (tmp_path / "run").iterdir()]
    assert len(texts) >= 3 and not any("hunter2" in text for text in texts)


# ------------------------------------------------------------------ outages


@contextmanager
def answering(status):
    """A server that answers every request with one HTTP status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def train(tracker, epochs=20):
    """What a run does; returns the seconds that tracking took and the closing message."""
    begin = time.monotonic()
    for epoch in range(epochs):
        tracker.metrics({"train/loss": 1.0 / (epoch + 1), "val/score": 0.5}, epoch)
    (tracker.journal.folder / "report.md").write_text("report")
    tracker.artifact(tracker.journal.folder / "report.md")
    message = tracker.finish("FINISHED")
    return time.monotonic() - begin, message


def test_unreachable_from_the_start_and_uploaded_later(tmp_path, uri, warnings, capsys):
    folder = tmp_path / "my run"
    begin = time.monotonic()
    tracker = start(dead_uri(), folder)
    assert tracker.run_id is None
    seconds, message = train(tracker)
    assert time.monotonic() - begin < 10 and seconds < 2
    assert len(warnings()) == 1 and "training goes on" in warnings()[0]
    assert "23 records" in message and f"python -m utils.tracking upload '{folder}'" in message

    assert main(["upload", str(folder)]) == 2  # the server is still down
    assert "did not reach MLflow" in capsys.readouterr().err
    assert main(["upload", str(folder), "--tracking-uri", uri]) == 0
    assert "23 records sent" in capsys.readouterr().out
    (run,) = all_runs(uri)
    assert run.info.status == "FINISHED" and run.info.run_name == "a run"
    assert history(uri, run.info.run_id, "train/loss") == [(e, 1 / (e + 1)) for e in range(20)]
    assert run.info.start_time <= run.info.end_time < run.info.start_time + 60_000
    assert next((tmp_path / "store").rglob("report.md")).read_text() == "report"

    assert "0 records sent" in upload(folder, uri)
    (folder / tracking.MARKER).unlink()  # as if killed between sending and noting it
    assert "23 records sent" in upload(folder, uri)
    assert len(all_runs(uri)) == 1
    assert len(history(uri, run.info.run_id, "train/loss")) == 20


def test_upload_needs_a_journal(tmp_path, capsys):
    assert main(["upload", str(tmp_path)]) == 2
    assert "no records in" in capsys.readouterr().err


def test_a_server_in_trouble_costs_one_warning(tmp_path, warnings):
    with answering(503) as address:
        seconds, message = train(start(address, tmp_path / "run"))
    assert seconds < 5 and "23 records" in message
    assert len(warnings()) == 1 and "503" in warnings()[0]


def test_a_server_that_never_answers_costs_a_bounded_time(tmp_path, monkeypatch, warnings):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # the user's own setting wins
    monkeypatch.setattr(tracking, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(tracking, "LOST_SECONDS", 1.5)
    with socket.socket() as hanging:
        hanging.bind(("127.0.0.1", 0))
        hanging.listen(64)
        tracker = start(f"http://127.0.0.1:{hanging.getsockname()[1]}", tmp_path / "run")
        seconds, message = train(tracker)
    assert seconds < 5  # the attempt of finish() alone; without the bound 20 more
    assert "23 records" in message and len(warnings()) == 1


def test_attempts_are_spaced_out(tmp_path, monkeypatch):
    attempts = []
    monkeypatch.setattr(
        mlflow_store.Sender, "send_pending", lambda self: attempts.append(1) or 1 / 0
    )
    train(start("http://localhost:1", tmp_path / "run"))
    assert len(attempts) == 2  # at the start and in finish()


def test_a_locked_database_pauses_sending_until_it_is_free(tmp_path, uri, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(mlflow_store, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(tracking, "FIRST_PAUSE", 0.0)
    tracker = start(uri, tmp_path / "run")
    other = sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    begin = time.monotonic()
    tracker.metrics({"train/loss": 1.0}, 0)
    tracker.metrics({"train/loss": 0.9}, 1)
    assert time.monotonic() - begin < 2
    other.execute("ROLLBACK")
    other.close()
    tracker.metrics({"train/loss": 0.8}, 2)
    assert history(uri, tracker.run_id, "train/loss") == [(0, 1.0), (1, 0.9), (2, 0.8)]
    assert tracker.finish() is None
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("utils.tracking")]
    assert ["locked" in m for m in messages] == [True, False] and "again" in messages[1]


def test_a_full_disk_under_the_database(tmp_path, uri, warnings):
    tracker = start(uri, tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))  # bytes; the database is larger
    try:
        seconds, message = train(tracker)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert seconds < 5 and "22 records" in message and len(warnings()) == 1
    assert "22 records sent" in upload(tmp_path / "run")
    assert len(history(uri, tracker.run_id, "train/loss")) == 20


def test_a_database_that_can_not_be_made(tmp_path, warnings):
    (tmp_path / "mlflow.db").mkdir()
    tracker = start(f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "run")
    seconds, message = train(tracker)
    assert seconds < 5 and "23 records" in message and len(warnings()) == 1


def test_a_deleted_experiment_is_named(tmp_path, uri, warnings):
    store = client(uri)
    store.delete_experiment(store.create_experiment("lungs"))
    assert "mlflow.experiment_name" in start(uri, tmp_path / "run").finish()
    assert len(warnings()) == 1


def test_a_journal_that_can_not_be_written(tmp_path, uri, warnings):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / tracking.JOURNAL).symlink_to("/dev/full")
    tracker = start(uri, folder)
    _, message = train(tracker)
    assert message is None and len(history(uri, tracker.run_id, "train/loss")) == 20
    assert len(warnings()) == 1 and "No space left" in warnings()[0]


def test_half_a_line_in_the_journal_is_passed_over(tmp_path, uri):
    tracker = start(dead_uri(), tmp_path / "run")
    tracker.metrics({"train/loss": 1.0}, 0)
    with tracker.journal.path.open("a") as file:
        file.write('{"n": 3, "op": "metr')  # a kill in the middle of a write
    again = start(uri, tmp_path / "run")
    again.metrics({"train/loss": 0.5}, 1)
    assert again.finish() is None
    assert history(uri, again.run_id, "train/loss") == [(0, 1.0), (1, 0.5)]
    lines = [line for line in tracker.journal.path.read_text().splitlines() if line]
    assert [i for i, line in enumerate(lines) if line.endswith('"metr')] == [2]
    assert [json.loads(line)["op"] for line in lines[3:]] == ["start", "metrics", "finish"]


def test_what_can_not_be_tracked_does_not_stop_the_rest(tmp_path, uri, warnings):
    folder = tmp_path / "run"
    tracker = start(uri, folder)
    tracker.metrics({"a": "three", "b": None, "c": 3, "d": float("inf")}, 0)
    tracker.artifact(tmp_path / "outside.txt")
    tracker.artifact(folder / "vanished.txt")
    tracker.metrics({"c": 4.0}, 1)
    assert "refused 1 records" in tracker.finish()
    assert history(uri, tracker.run_id, "c") == [(0, 3.0), (1, 4.0)]
    texts = " ".join(warnings())
    assert "not a number" in texts and "outside" in texts and "vanished.txt" in texts


def test_a_tampered_journal_can_not_upload_other_files(tmp_path, uri):
    (tmp_path / "private.txt").write_text("private")
    tracker = start(dead_uri(), tmp_path / "run")
    with tracker.journal.path.open("a") as file:
        for n, path in ((2, "../private.txt"), (3, str(tmp_path / "private.txt"))):
            record = {"n": n, "op": "artifact", "time": 0, "path": path, "folder": None}
            file.write(json.dumps(record) + "\n")
        file.write(json.dumps({"n": 4, "op": "connect", "time": 0}) + "\n")
    assert "3 of them refused" in upload(tmp_path / "run", uri)
    assert list((tmp_path / "store").rglob("private.txt")) == []


# ------------------------------------------------------------------ real processes


@pytest.mark.slow
def test_two_runs_may_create_the_database_at_once(tmp_path):
    code = """
import sys
from utils.tracking import start_tracking
t = start_tracking(enabled=True, tracking_uri="sqlite:///" + sys.argv[1] + "/new/mlflow.db",
                   experiment_name="lungs", folder=sys.argv[1] + "/" + sys.argv[2])
t.metrics({"train/loss": 1.0}, 0)
sys.exit(t.finish())
"""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), name],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    for run in runs:
        errors = run.communicate(timeout=120)[1]
        assert run.returncode == 0 and errors == ""  # nor MLflow's own notes on its migrations
    assert len(all_runs(f"sqlite:///{tmp_path}/new/mlflow.db")) == 2


class Server:
    """A real `mlflow server` on a port of this machine."""

    def __init__(self, folder, database):
        shutil.copy(database, folder / "server.db")
        self.folder, self.uri = folder, dead_uri()
        self.process = None

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", self.uri.rpartition(":")[2], "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "server_artifacts")]
        with (self.folder / "server.log").open("a") as output:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # starts faster
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError((self.folder / "server.log").read_text())

    def kill(self):
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path, empty_database):
    server = Server(tmp_path, empty_database)
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
def test_a_server_that_is_killed_in_the_middle(tmp_path, server, warnings, capfd):
    folder = tmp_path / "run"
    tracker = start(server.uri, folder)
    (folder / "config.yaml").write_text("a: 1")
    tracker.artifact(folder / "config.yaml", "config")
    tracker.metrics({"train/loss": 2.0, "val/score": float("nan")}, 100)
    run_id = tracker.run_id
    assert history(server.uri, run_id, "train/loss") == [(100, 2.0)]
    server.kill()
    seconds, message = train(tracker)
    assert seconds < 5 and "22 records" in message
    assert len(warnings()) == 1 and server.uri in warnings()[0]
    assert capfd.readouterr().out == ""

    server.start()
    assert "22 records sent" in upload(folder)
    run = client(server.uri).get_run(run_id)
    assert run.info.status == "FINISHED" and len(all_runs(server.uri)) == 1
    assert len(history(server.uri, run_id, "train/loss")) == 21
    assert {f.path for f in client(server.uri).list_artifacts(run_id)} == {"config", "report.md"}
