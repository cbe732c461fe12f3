"""The downloader against a local server that breaks off, lies and misbehaves."""

from __future__ import annotations

import hashlib
import re
import stat
import struct
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data import download as module
from data.corpora.icbhi import BASE_URL, TABLES
from data.download import ARCHIVE, CHECKSUMS, SIZES, download, fetch, main, unpack
from utils.common.errors import UserError

TABLE_NAMES = [names[0] for names in TABLES.values()]


class Server:
    """Serves `files`; `break_after` bytes per answer, `status`, `announce` and `ranges` lie."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.break_after: list[int] = []  # one per coming answer of more bytes than that
        self.status: list[int] = []  # one per coming answer
        self.announce: int | None = None  # total size that is claimed
        self.silent = False  # no size at all
        self.ranges = "honest"  # honest | ignored | wrong
        self.requests: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/files/"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,))
        self.thread.start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.rsplit("/", 1)[1]
        wanted = request.headers.get("Range")
        self.requests.append((name, wanted))
        if self.status and (status := self.status.pop(0)) != 200:
            return request.send_error(status)
        if name not in self.files:
            return request.send_error(404)
        body = self.files[name]
        start = 0
        if wanted and self.ranges != "ignored":
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if start >= len(body):
                return request.send_error(416)
        total = self.announce or len(body)
        request.send_response(206 if start else 200)
        if not self.silent:
            request.send_header("Content-Length", str(total - start))
        if start:
            shown = 0 if self.ranges == "wrong" else start
            request.send_header("Content-Range", f"bytes {shown}-{total - 1}/{total}")
        request.end_headers()
        content = body[start:]
        if self.break_after and len(content) > self.break_after[0]:
            content = content[: self.break_after.pop(0)]
        request.wfile.write(content)
        request.close_connection = True

    def stop(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server():
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def database(server, make_icbhi, tmp_path):
    """Server with the four files of a database of six recordings; returns their sizes."""
    folder = make_icbhi(tmp_path / "source")
    for name in TABLE_NAMES:
        server.files[name] = (folder / name).read_bytes()
    path = tmp_path / "source.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.glob("1*")):
            archive.write(file, f"ICBHI_final_database/{file.name}")
    server.files[ARCHIVE] = path.read_bytes()
    return {name: len(content) for name, content in server.files.items()}


def get(server, tmp_path, sizes, **options):
    return download(
        tmp_path / "data", base_url=server.url, sizes=sizes, **{"wait": 0, "attempts": 3, **options}
    )


def test_addresses_and_sizes():
    assert BASE_URL + ARCHIVE == (
        "https://bhichallenge.med.auth.gr/sites/default/files/ICBHI_final_database/"
        "ICBHI_final_database.zip"
    )
    assert SIZES[ARCHIVE] == 1978998275
    assert SIZES[TABLES["demographics"][0]] == 2586


def test_everything_is_fetched_checked_and_unpacked(server, database, tmp_path):
    state = get(server, tmp_path, database)
    assert state.partial
    assert (state.counts["all_recordings"], state.counts["all_cycles"]) == (6, 24)
    data = tmp_path / "data"
    sums = dict(reversed(line.split("  ")) for line in (data / CHECKSUMS).read_text().splitlines())
    assert set(sums) == {ARCHIVE, *TABLE_NAMES}
    for name, content in server.files.items():
        assert (data / name).read_bytes() == content
        assert sums[name] == hashlib.sha256(content).hexdigest()
    assert not list(data.rglob("*.part")) and not list(data.rglob("*.tmp"))
    assert len(list((data / "ICBHI_final_database").iterdir())) == 12


def test_a_second_call_fetches_and_writes_nothing(server, database, tmp_path):
    get(server, tmp_path, database)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    server.requests.clear()
    get(server, tmp_path, database)
    assert server.requests == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before


def test_a_broken_connection_is_taken_up_where_it_broke(server, database, tmp_path):
    content = server.files[ARCHIVE]
    server.break_after = [1000, 500]
    server.files = {ARCHIVE: content}
    path = fetch(server.url, ARCHIVE, tmp_path, len(content), 3, 0)
    assert path.read_bytes() == content
    assert [asked for _, asked in server.requests] == [None, "bytes=1000-", "bytes=1500-"]


def test_a_later_call_goes_on_with_the_part(server, database, tmp_path):
    size = database[ARCHIVE]
    server.break_after = [1000]
    with pytest.raises(UserError, match=rf"broke off after 1,000 of {size:,} bytes.*run the comm"):
        fetch(server.url, ARCHIVE, tmp_path, size, 1, 0)
    assert not (tmp_path / ARCHIVE).exists()  # no half file is taken for a whole one
    assert (tmp_path / f"{ARCHIVE}.part").stat().st_size == 1000
    fetch(server.url, ARCHIVE, tmp_path, size, 1, 0)
    assert server.requests[-1] == (ARCHIVE, "bytes=1000-")
    assert (tmp_path / ARCHIVE).read_bytes() == server.files[ARCHIVE]


def test_a_server_that_can_not_resume_sends_all_again(server, database, tmp_path):
    server.break_after, server.ranges = [1000], "ignored"
    fetch(server.url, ARCHIVE, tmp_path, database[ARCHIVE], 2, 0)
    assert (tmp_path / ARCHIVE).read_bytes() == server.files[ARCHIVE]


def test_a_part_at_another_place_is_refused(server, database, tmp_path):
    server.break_after, server.ranges = [1000], "wrong"
    with pytest.raises(UserError, match="asked for bytes from 1000 on"):
        fetch(server.url, ARCHIVE, tmp_path, database[ARCHIVE], 2, 0)
    assert not (tmp_path / ARCHIVE).exists()


@pytest.mark.parametrize("claim", [10, 10**9])
def test_a_size_that_is_not_the_expected_one_is_refused(server, database, tmp_path, claim):
    server.announce = claim
    with pytest.raises(UserError, match=rf"announces {claim:,} bytes, {database[ARCHIVE]:,} exp"):
        fetch(server.url, ARCHIVE, tmp_path, database[ARCHIVE], 2, 0)
    assert not (tmp_path / ARCHIVE).exists()


def test_a_server_that_announces_more_than_it_sends(server, database, tmp_path):
    name = TABLE_NAMES[0]
    server.announce = len(server.files[name]) + 7
    with pytest.raises(UserError, match="can not be fetched"):
        fetch(server.url, name, tmp_path, None, 2, 0)
    assert not (tmp_path / name).exists()


def test_a_table_of_absurd_size_is_refused(server, database, tmp_path):
    server.announce = 10**10
    with pytest.raises(UserError, match="for a small table"):
        fetch(server.url, TABLE_NAMES[0], tmp_path, None, 2, 0)


@pytest.mark.parametrize("name", [ARCHIVE, TABLE_NAMES[0]])
def test_a_body_without_a_size_that_does_not_end_is_refused(server, tmp_path, name):
    server.files[name] = b"PK" + b"x" * (3 << 20)
    server.silent = True
    with pytest.raises(UserError, match="more than the expected"):
        fetch(server.url, name, tmp_path, 1000 if name == ARCHIVE else None, 2, 0)
    assert not (tmp_path / name).exists()


def test_a_part_longer_than_the_file_is_fetched_anew(server, database, tmp_path):
    (tmp_path / f"{ARCHIVE}.part").write_bytes(b"x" * (database[ARCHIVE] + 5))
    fetch(server.url, ARCHIVE, tmp_path, database[ARCHIVE], 2, 0)
    assert (tmp_path / ARCHIVE).read_bytes() == server.files[ARCHIVE]


def test_a_part_that_does_not_fit_a_table_is_fetched_anew(server, database, tmp_path):
    name = TABLE_NAMES[0]
    (tmp_path / f"{name}.part").write_bytes(b"x" * 10_000)
    fetch(server.url, name, tmp_path, None, 2, 0)
    assert (tmp_path / name).read_bytes() == server.files[name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n<!DOCTYPE html><html>please log in</html>", "a web page arrives in place"),
        (b"", "nothing arrives in place"),
        (b" \r\n", "nothing arrives in place"),
    ],
)
def test_a_log_in_page_or_nothing_is_no_table(server, tmp_path, content, message):
    server.files[TABLE_NAMES[0]] = content
    with pytest.raises(UserError, match=message):
        fetch(server.url, TABLE_NAMES[0], tmp_path, None, 2, 0)
    assert list(tmp_path.iterdir()) == []


def test_server_errors_are_tried_again_and_missing_files_are_not(server, database, tmp_path):
    server.status = [503, 200]
    fetch(server.url, TABLE_NAMES[0], tmp_path, None, 2, 0)
    server.requests.clear()
    with pytest.raises(UserError, match="answers 404"):
        fetch(server.url, "gone.txt", tmp_path, None, 5, 0)
    assert len(server.requests) == 1


def test_offline_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"can not be fetched.*--zip"):
        download(tmp_path / "data", base_url="http://127.0.0.1:9/", attempts=2, wait=0)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_cut_or_changed_file_is_noticed(server, database, tmp_path):
    get(server, tmp_path, database)
    archive = tmp_path / "data" / ARCHIVE
    content = archive.read_bytes()
    archive.write_bytes(content[:-5])
    with pytest.raises(UserError, match=r"bytes, .* expected; delete it, or rename it"):
        get(server, tmp_path, database)
    archive.write_bytes(content[:-1] + b"x")
    with pytest.raises(UserError, match="has changed since it was fetched"):
        get(server, tmp_path, database)


def test_zip_and_tables_that_are_there_need_no_network(database, server, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for name in TABLE_NAMES:
        (data / name).write_bytes(server.files[name])
    source = tmp_path / "elsewhere.zip"
    source.write_bytes(server.files[ARCHIVE])
    nowhere = "http://127.0.0.1:9/"
    state = download(data, archive=source, base_url=nowhere, attempts=1, wait=0)
    assert state.counts["all_recordings"] == 6
    assert server.requests == []


def test_command_ends_with_an_error_when_the_counts_are_not_reached(
    database, server, tmp_path, caplog
):
    source = tmp_path / "elsewhere.zip"
    source.write_bytes(server.files[ARCHIVE])
    data = tmp_path / "data"
    data.mkdir()
    for name in TABLE_NAMES:
        (data / name).write_bytes(server.files[name])
    assert main(["--output", str(data), "--zip", str(source)]) == 2
    assert "PARTIAL DATA" in caplog.text
    assert main(["--output", str(data), "--zip", str(tmp_path / "none.zip")]) == 2
    assert "does not exist" in caplog.text


def test_an_interruption_keeps_the_part_and_needs_no_traceback(
    server, database, tmp_path, monkeypatch, caplog
):
    def stop(response):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_next_block", stop)
    assert main(["--output", str(tmp_path / "data"), "--base-url", server.url]) == 130
    assert "goes on from here" in caplog.text
    assert [path.suffix for path in (tmp_path / "data").iterdir()] == [".part"]


def test_command_line(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "--output" in out
    assert "--zip" in out


# --- unpacking -----------------------------------------------------------------------------------


def make_zip(path, entries):
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in entries:
            archive.writestr(entry, content)
    return path


def link(name):
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("good.txt", "1"), ("../evil.txt", "x")], "leads out of the folder"),
        ([("good.txt", "1"), ("a/../../evil.txt", "x")], "leads out of the folder"),
        ([("good.txt", "1"), ("/tmp/evil.txt", "x")], "leads out of the folder"),
        ([("good.txt", "1"), ("..\\evil.txt", "x")], "leads out of the folder"),
        ([("good.txt", "1"), ("C:evil.txt", "x")], "leads out of the folder"),
        ([("good.txt", "1"), (link("link"), "/etc")], "is a link"),
        ([("good.txt", "1"), ("good.txt", "2")], "is there twice"),
        ([("good.txt", "1"), ("GOOD.txt", "2")], "is there twice"),
    ],
)
def test_an_unsafe_archive_is_refused_before_anything_is_written(tmp_path, entries, message):
    output = tmp_path / "deep" / "out"
    output.mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        unpack(make_zip(tmp_path / "a.zip", entries), output)
    assert list(output.iterdir()) == []
    assert [path.name for path in output.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [("MAX_MEMBER", 3, "at most 3"), ("MAX_UNPACKED", 6, "8 bytes unpacked"),
     ("MAX_MEMBERS", 1, "2 files, at most 1")],
)  # fmt: skip
def test_absurd_sizes_are_refused(tmp_path, monkeypatch, limit, value, message):
    monkeypatch.setattr(module, limit, value)
    archive = make_zip(tmp_path / "a.zip", [("a.txt", "1234"), ("b.txt", "1234")])
    with pytest.raises(UserError, match=message):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_declared_size_that_lies_is_refused(tmp_path):
    """The directory says 4 bytes, the entry unpacks to a million: nothing is taken."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", b"0" * 1_000_000)
    content = path.read_bytes().replace(struct.pack("<I", 1_000_000), struct.pack("<I", 4))
    path.write_bytes(content)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="is damaged"):
        unpack(path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("fault", ["cut", "flipped", "text"])
def test_a_damaged_archive_is_named(tmp_path, fault):
    path = make_zip(tmp_path / "a.zip", [("a.txt", "some words " * 50)])
    content = path.read_bytes()
    if fault == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif fault == "flipped":
        path.write_bytes(content.replace(b"some words some", b"some wards some", 1))
    else:
        path.write_text("not an archive")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"a\.zip is damaged; delete it"):
        unpack(path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_unpacking_goes_on_after_a_kill(tmp_path):
    archive = make_zip(tmp_path / "a.zip", [("x/a.txt", "1234"), ("x/b.txt", "5678")])
    out = tmp_path / "out"
    (out / "x").mkdir(parents=True)
    (out / "x" / "a.txt").write_text("12")  # cut off
    (out / "x" / "b.txt").write_text("5678")
    assert unpack(archive, out) == 1
    assert (out / "x" / "a.txt").read_text() == "1234"


def test_a_link_in_the_output_folder_is_not_followed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "x").symlink_to(tmp_path / "elsewhere")
    archive = make_zip(tmp_path / "a.zip", [("x/a.txt", "1234")])
    with pytest.raises(UserError, match="leads out of"):
        unpack(archive, tmp_path / "out")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_too_little_space_is_said_before_unpacking(tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 3})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage)
    archive = make_zip(tmp_path / "a.zip", [("a.txt", "1234")])
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"GB are needed.*--output"):
        unpack(archive, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
