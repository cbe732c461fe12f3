"""Tracking: what arrives in MLflow, and what a run loses when MLflow does not answer (nothing)."""

import logging
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Thread

import pytest

from utils import tracking
from utils.common.errors import UserError
from utils.config.schema import MLflowConfig
from utils.tracking import check_tracking_uri, continue_tracking, main, replay, start_tracking

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 20


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Whatever `start_tracking` sets by default is gone after each test."""
    for name in tracking.ENVIRONMENT:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setattr(tracking, "FIRST_PAUSE", 0.2)


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


def start(uri, folder, enabled=True, **options):
    section = MLflowConfig(enabled=enabled, tracking_uri=uri, experiment_name="lungs")
    options = {"run_name": "a run", "tags": {"variant": "ast"}, "params": {"lr": 1e-3}} | options
    return start_tracking(section, folder, **options)


def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def all_runs(uri):
    store = client(uri)
    return store.search_runs([e.experiment_id for e in store.search_experiments()])


def history(uri, run_id, key="train/loss"):
    return sorted((m.step, m.value) for m in client(uri).get_metric_history(run_id, key))


def epoch(tracker, number):
    """What the loop does: the history into metrics.csv, the epoch to the tracker."""
    rows = [{"epoch": n, "train_loss": 1 / (n + 1), "val_score": 0.5} for n in range(number)]
    text = "".join(f"{r['epoch']},{r['train_loss']},{r['val_score']}\n" for r in rows)
    (tracker.folder / "metrics.csv").write_text("epoch,train_loss,val_score\n" + text)
    tracker.metrics(*tracking.epoch_metrics(rows[-1]))


def train(tracker, first=1):
    """What a run does; returns the seconds that tracking took and the closing message."""
    begin = time.monotonic()
    for number in range(first, EPOCHS + 1):
        epoch(tracker, number)
    (tracker.folder / "report.md").write_text("report")
    tracker.artifact(tracker.folder / "report.md")
    tracker.metrics({"test/score": 61.5})
    message = tracker.finish()
    return time.monotonic() - begin, message


def assert_complete(uri, points=EPOCHS):
    """One run has everything that `train` records, once."""
    (run,) = all_runs(uri)
    assert run.info.status == "FINISHED" and run.info.run_name == "a run"
    assert run.data.params == {"lr": "0.001"} and run.data.metrics["test/score"] == 61.5
    expected = [(n, 1 / n) for n in range(1, points + 1)]
    assert history(uri, run.info.run_id) == expected
    assert len(history(uri, run.info.run_id, "test/score")) == 1
    assert "report.md" in {f.path for f in client(uri).list_artifacts(run.info.run_id)}
    return run


def eventually(condition, seconds=20):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def dead_uri():
    """A port of this machine that refuses connections."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


# ------------------------------------------------------------------ all is well


def test_off_imports_nothing_and_can_be_sent_later(tmp_path, uri):
    code = f"""
import sys
from utils.config.schema import MLflowConfig
from utils.tracking import start_tracking
off = MLflowConfig(enabled=False, tracking_uri="http://user:secret@host")
t = start_tracking(off, {str(tmp_path / "run")!r}, run_name="off", tags={{}}, params={{"a": 1}})
t.metrics({{"test/score": 1.0}}); t.tags({{"a": "b"}})
assert t.finish("FINISHED") is None
assert "mlflow" not in sys.modules and "sqlalchemy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
    assert "secret" not in (tmp_path / "run" / "tracking.json").read_text()
    with pytest.raises(UserError, match="--tracking-uri"):
        replay(tmp_path / "run")
    replay(tmp_path / "run", uri)
    (run,) = all_runs(uri)
    assert run.data.metrics == {"test/score": 1.0} and run.data.params == {"a": "1"}


def test_everything_arrives(tmp_path, uri, warnings):
    folder = tmp_path / "run"
    params = {f"section.key{i}": i for i in range(230)} | {"long": "y" * 9000}
    parent = start(uri, tmp_path / "parent", run_name="parent")
    assert parent.finish() is None
    tracker = start(uri, folder, params=params, parent=tmp_path / "parent")
    (folder / "figures").mkdir()
    (folder / "figures" / "confusion.png").write_bytes(b"png")
    tracker.metrics({"train/loss": 0.7, "val/score": float("nan")}, 0)
    tracker.metrics({"train/loss": 0.6, "val/score": 0.5}, 1)
    tracker.metrics({"test/se (4-class)": 0.25})
    tracker.artifact(folder / "figures" / "confusion.png", "figures")
    tracker.tags({"protocol": "validation"})
    assert tracker.finish() is None and warnings() == []

    run, above = sorted(all_runs(uri), key=lambda run: run.info.run_name)
    assert (run.info.run_name, run.info.status) == ("a run", "FINISHED")
    assert len(run.data.params) == 231 and run.data.params["section.key229"] == "229"
    assert run.data.params["long"] == "y" * 6000
    assert run.data.tags["variant"] == "ast" and run.data.tags["protocol"] == "validation"
    assert run.data.tags["mlflow.parentRunId"] == above.info.run_id
    assert history(uri, run.info.run_id) == [(0, 0.7), (1, 0.6)]
    assert run.data.metrics["val/score"] == 0.5 and run.data.metrics["test/se _4-class_"] == 0.25
    # artifacts lie next to the database, wherever the current folder is
    artifact = next((tmp_path / "store" / "mlruns" / "lungs").rglob("confusion.png"))
    assert artifact.parent.name == "figures" and artifact.read_bytes() == b"png"


def test_resuming_continues_the_run_and_doubles_nothing(tmp_path, uri):
    first = start(uri, tmp_path / "run")
    for number in (1, 2, 3):
        epoch(first, number)
    assert first.finish("KILLED") is None
    assert all_runs(uri)[0].info.status == "KILLED"
    again = start(uri, tmp_path / "run", params={"lr": 2})  # MLflow's are immutable
    assert train(again, first=2)[1] is None  # from a checkpoint before the third epoch
    assert_complete(uri)
    added = continue_tracking(tmp_path / "run")  # as evaluate.py does
    ended = added.record["end"]
    added.metrics({"evaluation/score": 50.0, "test/score": 61.5})
    assert added.finish(None) is None
    run = assert_complete(uri)
    assert run.data.metrics["evaluation/score"] == 50.0 and run.info.end_time == ended
    assert continue_tracking(tmp_path).finish(None) is None  # nothing is recorded there


@pytest.mark.parametrize("name", ["a%20b 100%", 'it\'s "x"', "really?", "%(here)s"])
def test_any_name_of_the_folder(tmp_path, name, empty_database, monkeypatch, warnings):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    shutil.copy(empty_database, "mlflow.db")
    assert train(start("sqlite:///mlflow.db", Path("run")))[1] is None and warnings() == []
    assert next(Path("mlruns").rglob("report.md")).read_text() == "report"
    found = sqlite3.connect("mlflow.db").execute("SELECT COUNT(*) FROM metrics").fetchone()
    assert found == (2 * EPOCHS + 1,)
    assert "complete as run" in replay(Path("run"))


# ------------------------------------------------------------------ addresses


SECRETS = [
    "http://ann:hunter2@tracking.example:5000",
    "https://hunter2@tracking.example",
    "postgresql://ann:hunter2@db/mlflow",
    "https://tracking.example/?token=hunter2",
    "mysql+pymysql://db/mlflow?password=hunter2",
]
WRONG = ["", "mlruns", "sqlite:///", "ftp://x", "http://", "http://h:p"]
GOOD = ["sqlite:///m.db", "https://h/base", "postgresql+psycopg2://ann@db/mlflow", "http://h:80"]


@pytest.mark.parametrize("address", SECRETS + WRONG)
def test_addresses_are_refused(tmp_path, address):
    message = "MLFLOW_TRACKING_USERNAME" if address in SECRETS else r"mlflow\.tracking_uri"
    with pytest.raises(UserError, match=message) as caught:
        start(address, tmp_path / "run")
    assert "hunter2" not in str(caught.value) and not (tmp_path / "run").exists()


def test_good_addresses_pass():
    for address in GOOD:
        check_tracking_uri(address)


# ------------------------------------------------------------------ outages


@contextmanager
def serving(answer):
    """A server that gives each connection to `answer`; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # closed
                    return
                Thread(target=answer, args=(connection,), daemon=True).start()

        Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def unavailable(connection):
    connection.recv(65536)
    connection.sendall(
        b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    )
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(65536):  # closed with unread data, the answer would be lost in a reset
        pass
    connection.close()


def dribbling(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while True:
        connection.sendall(b"{")
        time.sleep(0.1)


def silent(connection):
    time.sleep(60)


@pytest.mark.parametrize("answer", [unavailable, dribbling, silent, None])
def test_a_server_in_trouble_costs_seconds(answer, tmp_path, uri, monkeypatch, warnings):
    """... and one warning; later everything can be sent elsewhere."""
    monkeypatch.setattr(tracking, "CLOSING", 4)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    folder = tmp_path / "my run"
    with serving(answer or unavailable) as address:
        begin = time.monotonic()
        address = dead_uri() if answer is None else address
        tracker = start(address, folder)
        _, message = train(tracker)
        assert time.monotonic() - begin < 10  # with the import of MLflow
    assert f"python -m utils.tracking '{folder}'" in message
    warned = [text for text in warnings() if address in text]  # another test's thread may warn
    assert len(warned) <= 1
    assert answer is not unavailable or "503" in " ".join([message, *warned])
    texts = [message, *warned, (folder / "tracking.json").read_text()]
    assert not any("hunter2" in text for text in texts)
    for _ in range(2):  # the second changes nothing
        assert main([str(folder), "--tracking-uri", uri]) == 0
        run = assert_complete(uri)
    assert run.info.start_time <= run.info.end_time < run.info.start_time + 60_000


def test_replay_says_what_it_cannot_do(tmp_path, capsys):
    tracker = start(dead_uri(), tmp_path / "run")
    tracker.finish("FAILED")
    assert main([str(tmp_path / "run"), str(tmp_path)]) == 2
    errors = " ".join(capsys.readouterr().err.split())
    assert "did not reach MLflow" in errors and "no tracking.json in" in errors


def test_a_run_deleted_in_the_middle_is_made_again(tmp_path, uri, warnings):
    tracker = start(uri, tmp_path / "run")
    epoch(tracker, 1)
    eventually(lambda: any(history(uri, run.info.run_id) for run in all_runs(uri)))
    client(uri).delete_run(all_runs(uri)[0].info.run_id)
    train(tracker, first=2)
    replay(tmp_path / "run")
    assert_complete(uri)
    assert len([text for text in warnings() if uri in text]) == 1


def test_a_deleted_experiment_is_named(tmp_path, uri):
    store = client(uri)
    experiment = store.create_experiment("lungs")
    store.delete_experiment(experiment)
    assert "must be in the 'active' state" in train(start(uri, tmp_path / "run"))[1]
    store.restore_experiment(experiment)
    replay(tmp_path / "run")
    assert_complete(uri)


def other_schema(file, old="451aebb31d03"):
    with closing(sqlite3.connect(file)) as base:
        base.execute("update alembic_version set version_num = ?", (old,))
        base.commit()


def other_tables(file):
    file.unlink()
    with closing(sqlite3.connect(file)) as base:
        base.execute("create table runs (a)")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_schema, r"has the schema 451aebb31d03, .* needs \w+; copy .* db upgrade.*made it"),
        (other_tables, "no such column: runs"),
        (lambda file: file.write_text("a list of runs\n" * 50), "file is not a database"),
        (lambda file: file.write_bytes(file.read_bytes()[:5000]), "malformed|not a database"),
    ],
)
def test_another_database_is_named(change, words, tmp_path, empty_database, warnings):
    file = shutil.copy(empty_database, tmp_path / "mlflow.db")
    change(file)
    run = start(f"sqlite:///{file}", tmp_path / "run")
    message = run.finish()
    assert re.search(words, message), message
    with pytest.raises(UserError, match=words):
        replay(tmp_path / "run")


def test_a_locked_database_pauses_sending_until_it_is_free(tmp_path, uri, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(tracking, "CLOSING", 60)
    tracker = start(uri, tmp_path / "run")
    eventually(lambda: all_runs(uri))
    other = sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    begin = time.monotonic()
    for number in range(1, 6):
        epoch(tracker, number)
    assert time.monotonic() - begin < 1
    other.execute("ROLLBACK")
    other.close()
    assert train(tracker, first=6)[1] is None
    assert_complete(uri)


def test_a_record_that_cannot_be_written(tmp_path, uri, monkeypatch, warnings):
    def full(*_):
        raise UserError("the disk is full")

    monkeypatch.setattr(tracking, "write_text", full)
    (tmp_path / "run").mkdir()
    assert train(start(uri, tmp_path / "run"))[1] is None
    assert_complete(uri)
    assert "will be lost: the disk is full" in warnings()[0]


def test_what_cannot_be_tracked_does_not_stop_the_rest(tmp_path, uri, warnings):
    (tmp_path / "private.txt").write_text("private")
    tracker = start(uri, tmp_path / "run")
    tracker.artifact(tmp_path / "private.txt")
    tracker.artifact(tmp_path / "run" / "vanished.txt")
    assert train(tracker)[1] is None
    assert_complete(uri)
    assert list((tmp_path / "store").rglob("private.txt")) == []
    texts = " ".join(warnings())
    assert "private.txt" in texts and "vanished.txt" in texts


# ------------------------------------------------------------------ real processes


@pytest.mark.slow
def test_two_runs_may_create_the_database_at_once(tmp_path):
    code = """
import sys
from utils import tracking
from utils.config.schema import MLflowConfig
tracking.CLOSING = 100
section = MLflowConfig(tracking_uri="sqlite:///" + sys.argv[1] + "/new/mlflow.db")
t = tracking.start_tracking(section, sys.argv[1] + "/" + sys.argv[2], run_name="x", tags={})
t.metrics({"train/loss": 1.0}, 0)
sys.exit(t.finish())
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    options = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen([*command, name], **options) for name in ("a", "b")]
    for run in runs:
        errors = run.communicate(timeout=120)[1]
        assert run.returncode == 0 and errors == ""  # nor MLflow's own notes on its migrations
    assert len(all_runs(f"sqlite:///{tmp_path}/new/mlflow.db")) == 2


class Server:
    """A real `mlflow server` on a port of this machine."""

    def __init__(self, folder, database):
        shutil.copy(database, folder / "server.db")
        self.folder, self.uri, self.process = folder, dead_uri(), None

    def start(self):
        words = ["--host", "127.0.0.1", "--port", self.uri.rpartition(":")[2], "--workers", "1"]
        words += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        words += ["--artifacts-destination", str(self.folder / "server_artifacts")]
        with (self.folder / "server.log").open("a") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *words],
                cwd=self.folder,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # starts faster
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        eventually(self.answers, 60)

    def answers(self):
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=2).status == 200
        except OSError:
            return False

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
def test_a_server_killed_in_the_middle(tmp_path, server, warnings, capfd, monkeypatch):
    monkeypatch.setattr(tracking, "CLOSING", 100)
    tracker = start(server.uri, tmp_path / "run")
    epoch(tracker, 1)
    eventually(lambda: any(history(server.uri, r.info.run_id) for r in all_runs(server.uri)))
    server.kill()
    epoch(tracker, 2)
    eventually(warnings)
    assert server.uri in warnings()[0] and "training continues" in warnings()[0]
    server.start()
    assert train(tracker, first=3)[1] is None
    assert capfd.readouterr().out == "" and len(warnings()) == 1
    assert_complete(server.uri)
