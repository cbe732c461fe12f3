"""The demo's page: the answers of predict.py, one sentence per fault, nothing kept, a browser."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlencode

import pytest

pytest.importorskip("flask", reason="Flask, which mlflow brings, is not installed")

from tests.data.sounds import spoil, tone_in_noise, write
from tests.test_export import trained
from utils import demo as demos
from utils.common.errors import UserError
from utils.demo import Demo, create_app, listen
from utils.evaluation.trained_model import TrainedModel
from utils.predict import predict_recording
from utils.training.checkpoint import save_checkpoint

PNG = b"\x89PNG"


def opened(variant: str, folder: Path, max_mb: float = 1) -> Demo:
    save_checkpoint(folder / f"{variant}.pt", trained(variant).checkpoint)
    (folder / "uploads").mkdir(exist_ok=True)
    model = TrainedModel.open(folder / f"{variant}.pt", device="cpu")
    return Demo(model, folder / "uploads", max_mb)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Demo:
    return opened("ast_film", tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def wav(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("sound") / "a b.wav", tone_in_noise(2, 16000), 16000)


@pytest.fixture
def client(demo):
    yield create_app(demo).test_client()
    assert not list(demo.folder.iterdir()), "an upload was kept"


@pytest.fixture(scope="module")
def address(demo):
    server = listen(demo, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://{server.host}:{server.port}"
    server.shutdown()
    thread.join()


def post(address: str, what: str, body: bytes, **fields) -> dict:
    request = urllib.request.Request(f"{address}/{what}?{urlencode(fields)}", body)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def classes(answer: dict) -> list[str]:
    return [row[2] for row in answer["rows"]]


def test_page_offers_what_the_model_knows(demo, client):
    page = client.get("/")
    text = page.get_data(as_text=True)
    for name in (*demo.model.statistics.devices, *demo.model.statistics.sites):
        assert f"<option>{name}</option>" in text
    assert "not a medical device" in text and "uses no metadata" not in text
    assert "http" not in text.replace(str(demo.model.path), ""), "nothing comes from elsewhere"
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]


def test_answer_is_that_of_predict(demo, client, wav):
    site = demo.model.statistics.sites[1]
    fields = {"name": "../../x/é b.wav", "site": site, "age": "61", "device": "", "bmi": ""}
    answer = client.post("/predict", query_string=fields, data=wav.read_bytes()).get_json()
    found = predict_recording(demo.model, wav, metadata={"site": site, "age": 61.0})
    assert classes(answer) == list(found.table["pred_class"]) and len(answer["rows"]) > 2
    assert [float(row[3]) for row in answer["rows"]] == list(found.table["p_crackle"].round(3))
    assert answer["columns"][3] == "crackle (threshold 0.40)"
    assert answer["notes"] == found.notes and answer["title"] == "_.._x_é b.wav: 2.0 s"
    assert base64.b64decode(answer["picture"]).startswith(PNG)


def test_other_metadata_take_their_turns(demo, client, wav):
    device, *others = demo.model.statistics.devices
    sites = demo.model.statistics.sites
    heard = [name for name, n in zip(sites, demo.model.statistics.site_counts, strict=False) if n]
    answer = client.post("/compare", query_string={"device": device}, data=wav.read_bytes())
    rows = {name: values for name, *values in answer.get_json()["rows"]}
    expected = {"as chosen", "device unknown"} | {f"device {name}" for name in others}
    assert set(rows) == expected | {f"site {name}" for name in heard} and heard != list(sites)
    assert rows["as chosen"][0] == "0"
    for name, values in rows.items():
        key, _, value = name.partition(" ")
        given = {"device": device} | ({} if name == "as chosen" else {key: value})
        given = {k: v for k, v in given.items() if v != "unknown"}
        found = predict_recording(demo.model, wav, metadata=given, overview=False)
        assert float(values[-1]) == pytest.approx(found.summary()["p_wheeze_mean"], abs=6e-4)
    assert len({tuple(values) for values in rows.values()}) > 3, "conditioning shows"


def test_plain_ast_says_it_uses_no_metadata(tmp_path, wav):
    client = create_app(opened("ast", tmp_path)).test_client()
    assert "<fieldset disabled>" in client.get("/").get_data(as_text=True)
    answer = client.post("/compare", data=wav.read_bytes()).get_json()
    assert "uses no metadata" in answer["note"] and "rows" not in answer


@pytest.mark.parametrize("what", ["predict", "compare"])
@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("nan", {}, "x.wav has 1 NaN or infinite samples"),
        ("empty file", {}, "x.wav cannot be read as audio"),
        ("no samples", {}, "x.wav has no samples"),
        ("text", {"name": "/"}, "_ cannot be read as audio"),
        (None, {"age": "old"}, "age is 'old'; give a number, or nothing"),
        (None, {"age": "300"}, "age is 300, outside 0..130"),
        (None, {"site": "Xx"}, "site 'Xx' is none that the model knows"),
    ],
)
def test_a_fault_is_one_sentence(what, kind, fields, words, demo, client, wav, tmp_path):
    body = (spoil(tmp_path / "x.wav", kind) if kind else wav).read_bytes()
    refused = client.post(f"/{what}", query_string={"name": "x.wav"} | fields, data=body)
    assert refused.status_code == 422
    message = refused.get_json()["error"]
    assert message.startswith(words) and str(demo.folder) not in message


class Endless(io.RawIOBase):
    """A body without end, of which the read parts are counted."""

    given = 0

    def read(self, size=-1):
        self.given += size
        return bytes(size)


def test_a_body_without_end_is_not_stored(demo):
    body = Endless()
    with pytest.raises(UserError, match=r"x\.wav is larger than 1 MB; .* --max-mb"):
        demo.answer("predict", {"name": "x.wav"}, body)
    assert 1e6 < body.given < 1.1e6 and not list(demo.folder.iterdir())


def test_too_large_is_413_to_a_real_client(address):
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(address, "predict", bytes(10_000_000), name="x.wav")
    assert refused.value.code == 413 and "larger than 1 MB" in json.load(refused.value)["error"]


def test_deleted_when_prediction_dies(demo, client, wav, monkeypatch):
    def dies(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(demos, "predict_recording", dies)
    assert client.post("/predict", data=wav.read_bytes()).status_code == 500


def test_two_requests_at_once(demo, address, tmp_path):
    sites = demo.model.statistics.sites
    wavs = [write(tmp_path / f"{n}.wav", tone_in_noise(1 + n, 16000), 16000) for n in range(2)]

    def ask(n: int) -> dict:
        return post(address, "predict", wavs[n].read_bytes(), name=f"{n}.wav", site=sites[n])

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(ask, range(2)))
    for n, answer in enumerate(answers):
        found = predict_recording(demo.model, wavs[n], metadata={"site": sites[n]}, overview=False)
        assert [float(row[3]) for row in answer["rows"]] == list(found.table["p_crackle"].round(3))


def test_only_this_machine_and_a_free_port(demo, address):
    assert address.startswith("http://127.0.0.1:")
    with pytest.raises(UserError, match=r"cannot be used \(.*\); choose another with --port"):
        listen(demo, int(address.rpartition(":")[2]))


def test_absent_flask_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(demos, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["demo", "--checkpoint", "none.pt"])
    assert demos.main() == 2
    assert "the demo needs Flask, which the whole mlflow package" in capsys.readouterr().err


# ------------------------------------------------------------------------ a browser


class Browser:
    """Headless Chromium through chromedriver's HTTP interface (W3C WebDriver)."""

    OPTIONS = ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-sync",
               "disable-background-networking", "disable-component-update", "window-size=1100,1900",
               "use-fake-ui-for-media-stream", "use-fake-device-for-media-stream")  # fmt: skip

    def __init__(self, folder: Path):
        command = ["chromedriver", "--port=0", f"--log-path={folder / 'log'}"]
        self.driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while "started successfully on port" not in (line := self.driver.stdout.readline()):
            assert line, "chromedriver did not start"
        self.session = f"http://127.0.0.1:{line.split()[-1].rstrip('.')}/session"
        options = {"args": [f"--{word}" for word in self.OPTIONS]}
        options["args"].append(f"--user-data-dir={folder / 'profile'}")
        options["binary"] = shutil.which("chromium") or shutil.which("google-chrome")
        asked = {"goog:chromeOptions": options}
        made = self("", {"capabilities": {"alwaysMatch": asked}})
        self.session += f"/{made['sessionId']}"

    def __call__(self, path: str, content: dict | None = None):
        body = None if content is None else json.dumps(content).encode()
        with urllib.request.urlopen(self.session + path, body, timeout=60) as response:
            return json.load(response)["value"]

    def run(self, script: str):
        return self("/execute/sync", {"script": script, "args": []})

    def until(self, condition: str, seconds: float = 30):
        stop = time.monotonic() + seconds
        while not (value := self.run(f"return {condition}")):
            assert time.monotonic() < stop, (
                f"{condition}: {self.run('return document.body.innerText')}"
            )
            time.sleep(0.05)
        return value

    def close(self):
        request = urllib.request.Request(self.session, method="DELETE")
        urllib.request.urlopen(request, timeout=20).close()
        self.driver.terminate()
        self.driver.wait(10)


@pytest.fixture
def browser(tmp_path):
    if not (
        shutil.which("chromedriver") and (shutil.which("chromium") or shutil.which("google-chrome"))
    ):
        pytest.skip(
            "no Chromium with its chromedriver; Debian's packages: chromium chromium-driver"
        )
    browser = Browser(tmp_path)
    yield browser
    browser.close()


TEXT = "document.getElementById('{}').textContent"


@pytest.mark.slow
def test_in_a_real_browser(browser, address, demo, wav, tmp_path):
    browser("/url", {"url": address})
    (field,) = browser("/element", {"using": "css selector", "value": "#file"}).values()
    browser(f"/element/{field}/value", {"text": str(wav)})
    site = demo.model.statistics.sites[1]
    browser.run(f"document.querySelector('[name=site]').value = {site!r}")
    click = "document.getElementById('go').click()"
    browser.run(click)
    browser.until("document.querySelectorAll('#others tbody tr').length > 5")
    assert browser.run(f"return {TEXT.format('title')}") == "a b.wav: 2.0 s"
    assert browser.run("return document.getElementById('picture').naturalWidth") > 500
    rows = "document.querySelectorAll('#segments tbody tr')"
    shown = browser.run(f"return [...{rows}].map(row => row.cells[2].textContent)")
    found = predict_recording(demo.model, wav, metadata={"site": site}, overview=False)
    assert shown == list(found.table["pred_class"])
    image = base64.b64decode(browser("/screenshot"))
    assert image.startswith(PNG) and len(image) > 50_000

    bad = spoil(tmp_path / "bad.wav", "nan")
    browser(f"/element/{field}/value", {"text": str(bad)})
    browser.run(click)
    assert "bad.wav has 1 NaN" in browser.until(TEXT.format("error"))
    assert browser.run("return document.getElementById('result').hidden")

    browser.run("document.getElementById('record').click()")
    browser.until("recorder !== null")
    time.sleep(1)
    browser.run("document.getElementById('record').click()")
    browser.until("sound && sound.name === 'microphone.wav' && sound.size > 20000")
    browser.run(click)
    browser.until("!document.getElementById('result').hidden && !busy")
    assert browser.run(f"return {TEXT.format('title')}").startswith("microphone.wav: ")
    assert not list(demo.folder.iterdir())
