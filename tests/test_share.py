"""Shared models: a folder that opens anywhere, on a hub and from one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import save

from tests.test_export import trained
from tests.utils.tiny import differing
from utils import share as sharing
from utils.common.errors import UserError
from utils.evaluation.exported import forms_of, random_case
from utils.evaluation.trained_model import TrainedModel
from utils.training.checkpoint import load_checkpoint, save_checkpoint

SECRET = "secret-place"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> TrainedModel:
    """A checkpoint file whose configuration names places of this machine."""
    made = trained("ast_film", **{"dataset.data_folder": f"/home/{SECRET}/data"}).checkpoint
    made.config["training"]["output_dir"] = f"/home/{SECRET}"
    made.config["mlflow"]["tracking_uri"] = f"https://{SECRET}.example"
    made.config["backbone"]["weights_path"] = f"/home/{SECRET}/ast.pth"
    made.fingerprint = {"recordings": {f"{SECRET}_1b1_Al_sc_Meditron": "0"}}
    made.counts = {"train": {"cycles": 24, "recordings": 6, "patients": 6, "normal": 24}}
    made.score = float("nan")
    path = tmp_path_factory.mktemp("trained") / "best.pt"
    save_checkpoint(path, made)
    return TrainedModel.open(path, device="cpu")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shared") / "model"
    sharing.share(model, folder)
    return folder


def test_a_folder_is_the_checkpoint(model, folder):
    own, other = model.checkpoint, load_checkpoint(folder)
    assert not differing(own.weights, other.weights)
    assert other.score != other.score and other.thresholds == own.thresholds
    for name in ("statistics", "selection", "counts", "run", "layer_norm_eps", "versions"):
        assert getattr(other, name) == getattr(own, name), name


def test_an_opened_folder_answers_the_same_without_data(model, folder):
    one = random_case(model, 3, 0.5, seed=0)
    opened = TrainedModel.open(folder, device="cpu")
    core = forms_of(opened)["waveform"]
    with torch.no_grad():
        probability = core.module(*(one.inputs[name] for name in core.axes)).numpy()
    assert abs(probability - one.probability).max() < 1e-6
    with pytest.raises(UserError, match=r"data folder not-shared .* --data-folder DIR"):
        _ = opened.corpus
    with pytest.raises(UserError, match=r"data folder not-shared .* --data-folder DIR"):
        _ = opened.data


def test_nothing_of_the_machine_is_shared(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.safetensors", "config.json", "README.md"}
    assert all(SECRET.encode() not in path.read_bytes() for path in folder.iterdir())


def test_the_card_has_the_hubs_head(model, folder, tmp_path, monkeypatch):
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: mit\n") and "24 cycles, 6 recordings, 6 patients" in card
    assert "- **Data**: ICBHI 2017 Respiratory Sound Database (Rocha" in card
    for part in ("Protocol", "Intended use", "Licence", "Not a medical device", "BSD 3-Clause"):
        assert (part in card) == (part != "BSD 3-Clause"), part  # started from random weights
    monkeypatch.setitem(vars(model), "run_folder", SimpleNamespace(path=tmp_path))
    (tmp_path / "model_card.md").write_text("# Card\n\nScore 61.2 [55.0, 66.1]\n")
    assert "Score 61.2 [55.0, 66.1]" in sharing.model_card(model, "mit")


def changed(folder: Path, to: Path, **fields) -> Path:
    """A copy with other fields; weights are bytes."""
    to.mkdir()
    (to / "model.safetensors").write_bytes(
        fields.pop("weights", (folder / "model.safetensors").read_bytes())
    )
    content = json.loads((folder / "config.json").read_text()) | fields
    (to / "config.json").write_text(json.dumps(content))
    return to


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weights": b"no tensors"}, "cannot be read as a shared model"),
        ({"weights": save({"x": torch.zeros(2)})}, "weights of a-run do not fit"),
        ({"format": "another"}, "is not a model checkpoint"),
        ({"epoch": "three"}, "damaged: epoch is a str"),
        ({"surprise": 1}, "damaged: .*surprise"),
        ({"config": {"models": {"ast": {}}, "training": {"lr": "${oc.env:HOME}"}}}, "plain values"),
    ],
)
def test_foreign_folders_are_refused(fields, words, folder, tmp_path):
    place = changed(folder, tmp_path / "other", **fields)
    with pytest.raises(UserError, match=words):
        _ = TrainedModel.open(place, device="cpu").model


def test_a_pickle_in_a_folder_is_not_opened(folder, tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"needs model\.safetensors and config\.json"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


class Hub(BaseHTTPRequestHandler):
    """What the client asks of a hub to create, fill and read one repository."""

    def log_message(self, *_):
        pass

    def answer(self, content: bytes, code: int = 200, **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        body, files = self.rfile.read(int(self.headers["Content-Length"])), self.server.files
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            answer = {"url": f"{self.server.address}/user/model"}
        elif self.path.endswith("/preupload/main"):
            named = [one["path"] for one in json.loads(body)["files"]]
            answer = {
                "files": [
                    {"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in named
                ]
            }
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    files[value["path"]] = base64.b64decode(value["content"])
            answer = {"commitUrl": f"{self.server.address}/user/model/commit/{'0' * 40}",
                      "commitOid": "0" * 40, "hookOutput": ""}  # fmt: skip
        else:  # validate-yaml and the like
            answer = {"warnings": [], "errors": []}
        self.answer(json.dumps(answer).encode(), Content_Type="application/json")

    def do_GET(self):
        found = re.fullmatch(r"/user/model/resolve/[^/]+/(.+)", self.path)
        content = self.server.files.get(found[1]) if found else None
        if content is None:
            self.answer(b"{}", 404 if found else 200, Content_Type="application/json")
            return
        tag = hashlib.sha256(content).hexdigest()
        self.answer(content, ETag=f'"{tag}"', X_Repo_Commit="0" * 40)

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A local hub that the client library talks to."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.created = {}, []
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    api, download = huggingface_hub.HfApi, huggingface_hub.hf_hub_download

    def from_here(name, file):
        return download(
            name, file, endpoint=server.address, cache_dir=tmp_path / "cache", token=False
        )

    monkeypatch.setattr(
        huggingface_hub, "HfApi", lambda: api(endpoint=server.address, token="hf_none")
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", from_here)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_pushed_and_opened_by_name(hub, folder, model):
    (folder.parent / "x").write_text("not sent")
    assert sharing.push(folder, "user/model", private=True) == f"{hub.address}/user/model"
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    (asked,) = hub.created  # the first by older versions of the client
    assert asked.get("private") is True or asked.get("visibility") == "private"
    opened = TrainedModel.open("user/model", device="cpu")
    assert not differing(opened.model.state_dict(), model.model.state_dict())
    with pytest.raises(UserError, match=r"no checkpoint user/other: .* hub does not give it"):
        TrainedModel.open("user/other")


def test_offline_is_one_sentence(folder, monkeypatch):
    api = huggingface_hub.HfApi
    monkeypatch.setattr(
        huggingface_hub, "HfApi", lambda: api(endpoint="http://127.0.0.1:9", token="hf_none")
    )
    with pytest.raises(UserError, match=r"is written, but the Hugging Face hub does not take it"):
        sharing.push(folder, "user/model")
