"""Files of runs and tables of people, cut or of another type: valid, or one sentence."""

from __future__ import annotations

import json

import pytest

from data.corpora.icbhi import read_cycles
from data.corpora.manifest import read_manifest
from data.corpora.spectrograms import unpack
from data.corpora.sprsound import read_sprsound
from data.cycle_table import read_metadata
from data.task import Task
from utils.common import lock
from utils.common.errors import Busy, UserError
from utils.common.readers import read_csv, read_json, read_text
from utils.config.merge import read_yaml
from utils.evaluation.finished_runs import read_runs
from utils.evaluation.report import read_report
from utils.figures.training import read_metrics
from utils.metrics.predictions import read_predictions
from utils.tracking import continue_tracking, replay
from utils.training.runfolder import RunFolder

BAD = {
    "empty": b"",
    "cut": b'{"folds": [1, ',
    "list": b"[1]",
    "null": b"null",
    "object": b"{}",
    "binary": bytes(range(256)),
    "zeros": bytes(600),
    "utf-16": '{"folds": []}\n'.encode("utf-16"),
    "deep": b"[" * 100_000,
    "huge number": b'{"folds": ' + b"9" * 5000 + b"}",
}
READERS = {
    "predictions.csv": lambda p: read_predictions(p, Task(4)),
    "metrics.csv": lambda p: read_metrics(p.parent),
    "report.json": read_report,
    "group.json": lambda p: read_runs([p.parent]),
    "icbhi_metadata.csv": read_metadata,
    "manifest.csv": read_manifest,
    "config.yaml": read_yaml,
    "index.csv": lambda p: [(p.parent / "x.npy.xz").touch(), unpack(p.parent, p.parent / "out")],
    "1_2_0_p1_3.json": lambda p: [p.with_suffix(".wav").touch(), read_sprsound(p.parent)],
}
VALID = {("group.json", "object"), *(("config.yaml", kind) for kind in ("object", "empty", "null"))}


@pytest.mark.parametrize("content", BAD)
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_one_sentence(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(BAD[content])
    if (name, content) in VALID:
        READERS[name](path)
        return
    with pytest.raises(UserError) as error:
        READERS[name](path)
    text = str(error.value)
    assert path.name in text and ";" in text and len(text) < 600
    assert content != "utf-16" or "UTF-16" in text
    assert all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize("content", BAD)
def test_a_damaged_journal_stops_nothing(content, tmp_path):
    for name in ("tracking.json", "record.json", ".run.lock"):
        (tmp_path / name).write_bytes(BAD[content])
    tracker = continue_tracking(tmp_path)
    tracker.metrics({"loss": 1.0})
    assert tracker.folder is None and tracker.finish() is None
    with pytest.raises(UserError, match=r"tracking\.json is damaged"):
        replay(tmp_path)
    assert RunFolder(tmp_path).read_record() == {}
    with pytest.raises(Busy, match=r"by process . on an unknown host"), lock.held(tmp_path / "run"):
        pass  # it counts until nobody has touched it for long


@pytest.mark.parametrize("content", [{"key": 1}, {"key": "a", "tags": [1]}, {"key": "a", "uri": 3}])
def test_a_journal_of_other_types_is_damaged(content, tmp_path):
    (tmp_path / "tracking.json").write_text(json.dumps(content))
    assert continue_tracking(tmp_path).folder is None


@pytest.mark.parametrize("pid", [{}, {"pid": "x"}, {"pid": -1}, {"pid": 2**70}, {"pid": None}])
def test_a_lock_of_other_types_holds_while_touched(pid, tmp_path):
    (tmp_path / ".run.lock").write_text(json.dumps({"machine": lock._machine(), **pid}))
    with pytest.raises(Busy, match="the run is in use"), lock.held(tmp_path / "run", "the run"):
        pass


@pytest.mark.parametrize(
    "group",
    [
        {"folds": 5},
        {"folds": list("01234")},
        {"folds": list("01234"), "runs": 3},
        {"folds": list("01234"), "runs": []},
    ],
)
def test_a_group_of_other_types_is_damaged(group, tmp_path):
    (tmp_path / "group.json").write_text(json.dumps(group))
    with pytest.raises(UserError, match=r"group\.json is damaged: .*; put the group together"):
        read_runs([tmp_path])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_another_encoding_is_named(encoding, tmp_path, make_text_folder):
    name = encoding[:6].upper()
    for file in make_text_folder:
        old = file.read_bytes()
        file.write_bytes(old.decode().encode(encoding))
        with pytest.raises(UserError) as error:
            read_cycles(file.parent, require_audio=False)
        file.write_bytes(old)
        assert str(error.value) == f"{file} is {name} text; save it as UTF-8"
    (tmp_path / "t.csv").write_bytes("a,b\n1,2\n".encode(encoding))
    (tmp_path / "t.json").write_bytes('{"a": 1}'.encode(encoding))
    for read, file in ((read_csv, "t.csv"), (read_json, "t.json")):
        with pytest.raises(UserError, match=f"{file} is {name} text; save it as UTF-8"):
            read(tmp_path / file, "restore it")


@pytest.fixture
def make_text_folder(tmp_path):
    """An annotation and the three tables of one recording."""
    folder, stem = tmp_path / "icbhi", "101_1b1_Al_sc_Meditron"
    folder.mkdir()
    rows = {
        f"{stem}.txt": "0.1\t1.2\t0\t1\n",
        "ICBHI_challenge_train_test.txt": f"{stem}\ttrain\n",
        "ICBHI_Challenge_demographic_information.txt": "101 3 F NA 19 99\n",
        "ICBHI_Challenge_diagnosis.txt": "101\tURTI\n",
    }
    for name, text in rows.items():
        (folder / name).write_text(text)
    assert len(read_cycles(folder, require_audio=False)) == 1
    return [folder / name for name in rows]


def test_texts_of_people_are_read(tmp_path):
    path = tmp_path / "t.txt"
    for content in (b"\xef\xbb\xbfa\xc3\xa9", "aé".encode(), "aé".encode("latin-1")):
        path.write_bytes(content)
        assert read_text(path, "x", fallback="latin-1") == "aé"
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 1\); save"):
        read_text(path, "save it as UTF-8")
    path.write_bytes(b"1\0\x002\n" * 9)
    with pytest.raises(UserError, match="NUL byte at 1"):
        read_text(path, "x")
