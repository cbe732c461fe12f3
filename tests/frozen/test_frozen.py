"""Frozen behaviour: configurations, reports and a checkpoint as they were.

Everything goes through what a user types, so that modules may move without touching this file.

    python -m tests.frozen.test_frozen configs reports evaluation

writes the named figures again; say in the commit why they moved. checkpoint.json holds a
checkpoint that the code of revision cfadfae wrote (SoftFiLM, width 8); it is never written again.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
import os
import re
import runpy
import shlex
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from omegaconf import OmegaConf

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
#: From `type_in("-m", ...)` of a module that an earlier call imported; harmless.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
#: Old name of a report's key -> new name, at any depth: "metrics" or "metrics.chosen".
RENAMED: dict[str, str] = {}
#: Keys of a report that depend on place or revision, or hold a sentence.
LEFT_OUT = (
    "data_folder", "evaluated_with", "notes", "partial_message", "revision", "run", "statement"
)  # fmt: skip
#: Equal to the last bit on one machine. Another processor adds float32 numbers in another order,
#: which three dozen steps of Adam and a Platt fit on 23 cycles enlarge: without vector
#: instructions the figures move by at most 1e-5, those of the Platt fits by 2e-4.
RELATIVE, RELATIVE_PLATT, ABSOLUTE = 5e-5, 2e-3, 1e-7
CORPUS = ("data.synthetic", "--patients", "8", "--seed", "0")
SCRIPTS = {
    "ast": ("ast_train.py", "ast_config.yaml"),
    "ast_grf": ("ast_meta_fus_train.py", "ast_fus_config.yaml"),
    "ast_film": ("ast_film_train.py", "ast_film_config.yaml"),
    "ast_tafilm": ("ast_tafilm_train.py", "ast_tafilm_config.yaml"),
    "ast_softfilm": ("ast_film_soft.py", "ast_film_soft_config.yaml"),
}
TINY = shlex.split("""
    dataset.data_folder=corpus dataset.cycle_metadata_path=null dataset.cache_dir=cache
    dataset.store_workers=1 dataset.batch_size=8 dataset.h=32 dataset.w=48 audio.clip_seconds=2
    augment.freq_mask_width=8 augment.time_mask_width=20
    backbone.weights=none backbone.embed_dim=16 backbone.depth=2 backbone.num_heads=2
    backbone.mlp_ratio=2 backbone.freq_stride=16 backbone.time_stride=16
    backbone.trainable_blocks=2
    models.*.input_fdim=32 models.*.input_tdim=48 models.*.head_hidden_dim=16
    models.*.film_hidden_dim=8 models.*.conditioned_layers=all
    training.epochs=6 training.warmup_epochs=0 training.lr=1e-2 training.min_sensitivity=0.1
    training.selection=validation training.device=cpu training.precision=fp32
    training.compile=false mlflow.enabled=false
""")


def type_in(*words: str | Path) -> str:
    """Standard output of `python WORDS` (a script of the root, or -m and a module), which must
    succeed; in this process, because imports take longer than what is run. Draws nothing."""
    printed, module = io.StringIO(), words[0] == "-m"
    argv = [str(word) for word in words[module:]]
    argv[0] = argv[0] if module else str(ROOT / argv[0])
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch("utils.runs.end.draw_figures"),
        mock.patch("utils.figures.runs.evaluation_figures", return_value=[]),
        contextlib.redirect_stdout(printed),
    ):
        try:
            if module:
                runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"{shlex.join(argv)}: exit status {end.code}"
    return printed.getvalue()


def configs() -> dict[str, Any]:
    """Every key of the shipped configurations, and the runs that the grids expand to."""
    found: dict[str, Any] = {}
    for script, name in SCRIPTS.values():
        for more in ([], ["demo.yaml"], ["--mlflow-config", "mlflow.yaml"]):
            files = [ROOT / "configs" / f if f.endswith("yaml") else f for f in (name, *more)]
            text = type_in(script, "--config", *files, "--print-config")
            values = OmegaConf.to_container(OmegaConf.create(text))
            found["+".join([name, *more[-1:]])] = dict(flat(values))
    for name in ("conditioned_layers.yaml", "freezing.yaml"):
        (file,) = (ROOT / "configs").rglob(name)
        words = re.search(r"# +python (-m .* --dry-run)$", file.read_text("utf-8"), re.MULTILINE)
        printed = type_in(*words[1].split()).splitlines()
        lines = [shlex.split(line)[1:] for line in printed if line.startswith("python ")]
        found[name] = {
            str(cell): [w for w in line if re.search(r"\.(py|yaml)$|=", w)]
            for cell, line in enumerate(lines)
        }
    return found


def reports() -> dict[str, Any]:
    """report.json of a tiny run of every variant on corpus/."""
    found = {}
    for variant, (script, name) in SCRIPTS.items():
        type_in(script, "--config", ROOT / "configs" / name, *TINY)
        (path,) = Path("runs").glob(f"{variant}-*/report.json")
        found[variant] = essential(json.loads(path.read_text("utf-8")))
    return found


def evaluation() -> dict[str, Any]:
    """What evaluate.py makes of the old checkpoint on corpus/: report and predictions."""
    content = json.loads((HERE / "checkpoint.json").read_text("utf-8"))["zlib_base64"]
    Path("old.pt").write_bytes(zlib.decompress(base64.b64decode(content)))
    type_in("evaluate.py", "--checkpoint", "old.pt", "--data-folder", "corpus", "--output", "out")
    with Path("out/predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    logits = {k: [float(row[k]) for row in rows] for k in ("logit_crackle", "logit_wheeze")}
    texts = {k: [row[k] for row in rows] for k in ("recording", "cycle_index", "pred_class")}
    report = json.loads(Path("out/report.json").read_text("utf-8"))
    return essential({"report": report, "predictions": logits | texts})


def essential(value: Any) -> Any:
    """A report without `LEFT_OUT`, eight digits of each number."""
    if isinstance(value, dict):
        return {k: essential(v) for k, v in value.items() if k not in LEFT_OUT}
    if isinstance(value, list):
        return [essential(v) for v in value]
    return float(f"{value:.8g}") if isinstance(value, float) else value


def flat(value: Any, prefix: str = ""):
    """Nested dictionaries and lists -> (dotted key, leaf)."""
    if not isinstance(value, dict | list) or not value:
        yield prefix, value
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from flat(item, f"{prefix}.{key}" if prefix else str(key))


def frozen(name: str) -> dict[str, Any]:
    """What was written when the behaviour was frozen."""
    return json.loads((HERE / f"{name}.json").read_text("utf-8"))


def moved(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is gone or different, a line each; what is new may be."""
    found, lines = dict(flat(now)), []
    for key, value in flat(before):
        name = key
        for old, new in RENAMED.items():
            name = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, name)
        new = found.get(name, "gone")
        if isinstance(value, float) and isinstance(new, int | float):
            relative = RELATIVE_PLATT if ".platt." in key else RELATIVE
            same = new == pytest.approx(value, rel=relative, abs=ABSOLUTE)
        else:
            same = new == value and type(new) is type(value)
        if not same:
            lines.append(f"{key}: {value} became {new}")
    return lines


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """The working folder of the runs; it holds corpus/."""
    folder = tmp_path_factory.mktemp("frozen")
    type_in("-m", *CORPUS, "--output", folder / "corpus")
    return folder


@pytest.fixture(autouse=True)
def _as_from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_configurations_are_as_before():
    now = configs()
    for name, before in frozen("configs").items():
        values = now[name]
        wrong = {k: (v, values.get(k)) for k, v in before.items() if values.get(k, "gone") != v}
        assert not wrong, f"{name}: (before, now) {wrong}"


@pytest.mark.slow
def test_reports_of_tiny_runs_are_as_before(work, monkeypatch):
    monkeypatch.chdir(work)
    lines = moved(frozen("reports"), reports())
    assert not lines, f"{len(lines)} figures moved:\n" + "\n".join(lines[:40])


@pytest.mark.slow
def test_an_old_checkpoint_evaluates_to_the_same(work, monkeypatch):
    monkeypatch.chdir(work)
    lines = moved(frozen("evaluation"), evaluation())
    assert not lines, f"{len(lines)} figures moved:\n" + "\n".join(lines[:40])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for wanted in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as place:
            if wanted in ("reports", "evaluation"):
                os.chdir(place)
                type_in("-m", *CORPUS, "--output", "corpus")
            values = globals()[wanted]()
            os.chdir(ROOT)
        rows = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in values.items()]
        (HERE / f"{wanted}.json").write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
