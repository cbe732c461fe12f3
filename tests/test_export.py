"""Exported models: what their files answer is what evaluation answers."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from models.registry import VARIANTS
from tests.utils.tiny import TINY, tiny_config, tiny_data
from utils import export as exporting
from utils.common.errors import UserError
from utils.config.schema import config_to_dict
from utils.evaluation.exported import forms_of, random_case
from utils.evaluation.trained_model import TrainedModel
from utils.training.build import build_model
from utils.training.checkpoint import Checkpoint

TINIER = TINY | {"backbone.depth": 1, "backbone.trainable_blocks": 1}


def trained(variant: str, **overrides) -> TrainedModel:
    """A model with weights of some size, as if read from a checkpoint."""
    config = tiny_config(variant, **{**TINIER, **overrides})
    statistics = tiny_data(config).statistics
    torch.manual_seed(0)
    model = build_model(config, statistics)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    model.conditioner.finalise()
    task = config.task
    checkpoint = Checkpoint(
        weights=model.state_dict(),
        config=config_to_dict(config),
        statistics=statistics.to_dict(),
        thresholds=(0.4, 0.6)[: task.n_thresholds],
        selection="validation",
        epoch=0,
        score=50.0,
        layer_norm_eps=1e-6,
        pos_weight=(),
        counts={},
        partial="",
        run="a-run",
    )
    return TrainedModel("a-run.pt", checkpoint, device="cpu")


@pytest.fixture(scope="module")
def filtering():
    """A model with a learned input filter, which acts in prediction too."""
    return trained("ast_softfilm", **{"methods.add_rsc": {}})


@pytest.fixture(scope="module")
def onnx_files(filtering, tmp_path_factory):
    """(folder, model.json) of the waveform form, as float32 and int8."""
    pytest.importorskip("onnxscript", reason="onnx, onnxscript and onnxruntime are not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    folder = tmp_path_factory.mktemp("exported")
    form = {"waveform": forms_of(filtering)["waveform"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "forms_of", lambda model, bucket: form)
        about = exporting.export(filtering, "onnx", folder, int8=True)
    return folder, about


ALONE = """
import json, sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession("waveform.onnx", providers=["CPUExecutionProvider"])
probability = session.run(None, dict(np.load("inputs.npz")))[0]
assert not {"torch", "data", "models", "utils"} & set(sys.modules)
print(json.dumps([probability.tolist(), session.get_modelmeta().custom_metadata_map]))
"""


@pytest.mark.slow
def test_onnxruntime_alone_answers_the_same(filtering, onnx_files):
    folder, about = onnx_files
    other = random_case(filtering, 5, 0.7, seed=9)  # longer than a clip, another batch
    names = [n for n in other.inputs if n != "log_mel"]
    np.savez(folder / "inputs.npz", **{n: other.inputs[n].numpy() for n in names})
    command = [sys.executable, "-I", "-c", ALONE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    probability, metadata = json.loads(done.stdout)
    assert np.abs(probability - other.probability).max() < 1e-5
    assert np.ptp(other.probability) > 0.05, "all answers alike would prove nothing"
    assert json.loads(metadata["devices"]) == list(filtering.statistics.devices)
    assert json.loads(metadata["opset"]) == about["opset"]


@pytest.mark.slow
def test_files_and_json(onnx_files):
    folder, about = onnx_files
    named = {"waveform.onnx", "waveform_int8.onnx", "model.json"}
    assert {path.name for path in folder.iterdir()} - {"inputs.npz"} == named
    assert json.loads((folder / "model.json").read_text()) == about
    found = {
        name: row["difference"]["random"] for name, row in about["files"].items() if "." in name
    }
    assert found["waveform.onnx"] <= 1e-5 < found["waveform_int8.onnx"] < 0.2
    assert about["files"]["waveform_int8.onnx"]["bytes"] < about["files"]["waveform.onnx"]["bytes"]


@pytest.mark.parametrize("loss", ["bce", "ce"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_what_is_traced_is_what_evaluates(variant, loss):
    model = trained(variant, **{"training.loss": loss})
    one = random_case(model, 6, 0.7, seed=3)
    assert one.inputs["scalars"].isnan().any() and (one.inputs["device_index"] < 0).any()
    for form in forms_of(model).values():
        with torch.no_grad():
            probability = form.module(*(one.inputs[name] for name in form.axes)).numpy()
        assert np.abs(probability - one.probability).max() < 1e-6


def test_torch_export_of_a_two_class_model(tmp_path):
    model = trained("ast", **{"dataset.n_cls": 2})
    core = forms_of(model)["log_mel"]
    one = random_case(model, 3, 0.5, seed=0)
    path = tmp_path / "log_mel.pt2"
    exporting.write_form(core, one, path, {"run": "a-run"})
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        own = {name: one.inputs[name] for name in core.axes}
        row = exporting.judge(path, core, {"random": [one]}, own)
    assert not shown
    assert row["difference"]["random"] < 1e-6
    extra = {"about.json": ""}
    torch.export.load(path, extra_files=extra)
    assert json.loads(extra["about.json"]) == {"run": "a-run"}


def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "write_form", lambda form, one, path, about: path.touch())
    monkeypatch.setattr(exporting, "opened", lambda path: lambda inputs: np.float32(0.5))
    with pytest.raises(UserError, match=r"log_mel\.pt2 differs from PyTorch by .* not kept"):
        exporting.export(trained("ast"), "torch", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UserError, match="needs onnxscript: python -m pip install onnxscript"):
        exporting.check_packages("onnx")
