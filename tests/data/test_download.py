"""The downloader against a local server that breaks off, lies and misbehaves."""

from __future__ import annotations

import re
import struct
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data import download as module
from data.corpora.icbhi import BASE_URL, TABLES
from data.download import ARCHIVE, SIZES, download, fetch, main, unpack
from utils.common.errors import UserError

TABLE_NAMES = [names[0] for names in TABLES.values()]
NOWHERE = "http://127.0.0.1:9/"


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
        asked = request.headers.get("Range")
        self.requests.append((name, asked))
        if self.status and (status := self.status.pop(0)) != 200:
            return request.send_error(status)
        if name not in self.files:
            return request.send_error(404)
        body = self.files[name]
        start = 0
        if asked and self.ranges != "ignored":
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
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


@pytest.fixture
def server(make_icbhi, tmp_path, monkeypatch):
    """Has the four files of a database of six recordings, whose archive's size is known."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    folder = make_icbhi(tmp_path / "source")
    for name in TABLE_NAMES:
        server.files[name] = (folder / name).read_bytes()
    with zipfile.ZipFile(tmp_path / "source.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.glob("1*")):
            archive.write(file, f"ICBHI_final_database/{file.name}")
    server.files[ARCHIVE] = (tmp_path / "source.zip").read_bytes()
    monkeypatch.setattr(module, "SIZES", {ARCHIVE: len(server.files[ARCHIVE])})
    yield server
    server.stop()


def test_addresses_and_sizes():
    assert BASE_URL + ARCHIVE == (
        "https://bhichallenge.med.auth.gr/sites/default/files/ICBHI_final_database/"
        "ICBHI_final_database.zip"
    )
    assert {ARCHIVE: 1978998275, TABLES["demographics"][0]: 2586} == SIZES


def test_everything_is_fetched_and_unpacked(server, tmp_path):
    data = tmp_path / "data"
    state = download(data, base_url=server.url, wait=0)
    assert state.partial
    assert (state.counts["all_recordings"], state.counts["all_cycles"]) == (6, 24)
    for name, content in server.files.items():
        assert (data / name).read_bytes() == content
    assert len(list((data / "ICBHI_final_database").iterdir())) == 12
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    server.requests.clear()
    download(data, base_url=server.url, wait=0)  # again: nothing is fetched or written
    assert server.requests == []
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


def test_a_broken_connection_is_resumed(server, tmp_path):
    server.break_after = [1000, 500]
    path = fetch(server.url, ARCHIVE, tmp_path, 0)
    assert path.read_bytes() == server.files[ARCHIVE]
    assert [asked for _, asked in server.requests] == [None, "bytes=1000-", "bytes=1500-"]


def test_a_later_call_resumes(server, tmp_path):
    server.break_after = [1000]
    with pytest.raises(UserError, match=r"broke after 1,000 of .*it resumes"):
        fetch(server.url, ARCHIVE, tmp_path, 0, attempts=1)
    assert not (tmp_path / ARCHIVE).exists()  # no half file is taken for a whole one
    fetch(server.url, ARCHIVE, tmp_path, 0)
    assert server.requests[-1] == (ARCHIVE, "bytes=1000-")
    assert (tmp_path / ARCHIVE).read_bytes() == server.files[ARCHIVE]


@pytest.mark.parametrize("ranges", ["ignored", "wrong"])
def test_a_server_that_cannot_resume_sends_all(server, tmp_path, ranges):
    server.break_after, server.ranges = [1000], ranges
    fetch(server.url, ARCHIVE, tmp_path, 0)
    assert (tmp_path / ARCHIVE).read_bytes() == server.files[ARCHIVE]


@pytest.mark.parametrize(
    ("name", "claim"), [(ARCHIVE, 10), (ARCHIVE, 10**9), (TABLE_NAMES[0], 10**10)]
)
def test_a_wrong_size_is_refused(server, tmp_path, name, claim):
    server.announce = claim
    with pytest.raises(UserError, match=rf"{claim:,} bytes, .* expected"):
        fetch(server.url, name, tmp_path, 0)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("content", [b"\n<!DOCTYPE html><html>log in</html>", b"", b" \r\n"])
def test_a_log_in_page_or_nothing_is_no_table(server, tmp_path, content):
    server.files[TABLE_NAMES[0]] = content
    with pytest.raises(UserError, match="a web page or nothing"):
        fetch(server.url, TABLE_NAMES[0], tmp_path, 0)
    assert not list(tmp_path.glob("ICBHI*"))


def test_server_errors_are_retried_but_not_404(server, tmp_path):
    server.status = [503, 200]
    fetch(server.url, TABLE_NAMES[0], tmp_path, 0)
    server.requests.clear()
    with pytest.raises(UserError, match="404"):
        fetch(server.url, "gone.txt", tmp_path, 0)
    assert len(server.requests) == 1


def test_offline_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"cannot be fetched.*check the connection"):
        download(tmp_path / "data", base_url=NOWHERE, wait=0)


def test_a_file_of_another_size_is_noticed(server, tmp_path):
    (tmp_path / ARCHIVE).write_bytes(server.files[ARCHIVE][:-5])
    with pytest.raises(UserError, match="delete it, or rename it"):
        fetch(server.url, ARCHIVE, tmp_path, 0)


def test_what_is_there_needs_no_network(server, tmp_path, caplog):
    data = tmp_path / "data"
    data.mkdir()
    for name in TABLE_NAMES:
        (data / name).write_bytes(server.files[name])
    assert main(["--output", str(data), "--zip", str(tmp_path / "source.zip")]) == 2
    assert "PARTIAL DATA" in caplog.text
    assert server.requests == []
    assert main(["--output", str(data), "--zip", str(tmp_path / "none.zip")]) == 2
    assert "none.zip" in caplog.text


# --- unpacking -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/tmp/evil.txt", "link/x"])
def test_nothing_is_written_outside(tmp_path, name):
    output = tmp_path / "deep" / "out"
    output.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (output / "link").symlink_to(tmp_path / "elsewhere")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, "x")
    with pytest.raises(UserError, match="leads out of"):
        unpack(tmp_path / "a.zip", output)
    assert [path.name for path in output.parent.rglob("*")] == ["out", "link"]
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("fault", ["cut", "flipped", "text", "size"])
def test_a_damaged_archive_is_named(tmp_path, fault):
    """ "size": the directory says 4 bytes, the entry unpacks to a million."""
    path, out = tmp_path / "a.zip", tmp_path / "out"
    out.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a.txt", "some words " * 50)
    content = path.read_bytes()
    if fault == "cut":
        content = content[: len(content) // 2]
    elif fault == "flipped":
        content = content.replace(b"some words some", b"some wards some", 1)
    elif fault == "size":
        content = content.replace(struct.pack("<I", 550), struct.pack("<I", 4))
    else:
        content = b"not an archive"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.zip is damaged"):
        unpack(path, out)
    assert list(out.iterdir()) == []


def test_unpacking_continues_after_a_kill(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/a.txt", "1234")
        archive.writestr("x/b.txt", "5678")
    out = tmp_path / "out"
    (out / "x").mkdir(parents=True)
    (out / "x" / "a.txt").write_text("12")  # cut off
    (out / "x" / "b.txt").write_text("5678")
    before = (out / "x" / "b.txt").stat().st_mtime_ns
    unpack(tmp_path / "a.zip", out)
    assert (out / "x" / "a.txt").read_text() == "1234"
    assert (out / "x" / "b.txt").stat().st_mtime_ns == before
