"""benchmarks.gpu where there is no GPU: what it refuses, records, keeps; a tiny run on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_data, gpu_model
from benchmarks.gpu_report import STEP_PEERS, STEP_VARIANTS, targets
from benchmarks.gpu_runner import NeedsCuda, Setting, measure
from utils.common.cli import command
from utils.common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
#: what a lent machine lacks although requirements.txt names it
ABSENT = ("mlflow", "librosa", "seaborn", "jupyter", "notebook", "nbclient", "IPython")
BLOCKED = """
import runpy, sys
from importlib.machinery import PathFinder
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] not in {absent}:
            return PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
sys.argv[0] = "gpu"
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


def run_without(absent: tuple[str, ...], *words: str) -> subprocess.CompletedProcess:
    """The program in a process that can not import some packages."""
    code = BLOCKED.format(absent=set(absent))
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True
    )


class Fake:
    """A section made of (name, figures) pairs; anything else among them is called."""

    share = 1.0

    def __init__(self, *parts):
        self.parts = parts

    def load(self):
        pass

    def run(self, setting: Setting):
        for part in self.parts:
            if isinstance(part, tuple):
                yield part
            else:
                part()


def fail():
    raise ValueError("tensor of 3 rows\nand more of it")


def lack():
    raise ModuleNotFoundError("No module named 'soundfile'", name="soundfile._x")


def own_fault():
    raise ModuleNotFoundError("No module named 'data.nothing'", name="data.nothing")


def need_cuda():
    raise NeedsCuda


def record_of(*parts, seconds: float = 5.0) -> dict:
    record: dict = {}
    measure(Fake(*parts).run, Setting("cpu", True, Path()), seconds, record, lambda: None)
    return record


# ---------------------------------------------------------------------- the command line


def test_without_cuda_one_sentence_and_no_file(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command(lambda: gpu.main(["--output", str(tmp_path)]))() == 2
    assert "no CUDA device was found" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu"], "add --quick"),
        (["--device", "cpu", "--quick"], "--output"),
        (["--quick"], "--output"),
    ],
)
def test_figures_that_would_mislead_are_refused(monkeypatch, words, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=message):
        gpu.parse(words)


def test_only_a_few_packages_are_needed_to_start():
    run = run_without((*ABSENT, "soundfile", "soxr", "omegaconf", "transformers", "timm"), "-h")
    assert run.returncode == 0, run.stderr


# ---------------------------------------------------------------------- records and files


def test_a_section_that_raises_is_recorded_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    sections = {"good": Fake(("a", {"x": 1.0})), "bad": Fake(("b", {"x": 2.0}), fail)}
    monkeypatch.setattr(gpu, "SECTIONS", {**sections, "last": Fake(("c", {"x": 1 / 3}))})
    gpu.main(["--device", "cpu", "--quick", "--output", str(tmp_path)])
    (path,) = tmp_path.glob("cpu_*.json")
    content = json.loads(path.read_text())
    states = {name: section["status"] for name, section in content["sections"].items()}
    assert states == {"good": "done", "bad": "failed", "last": "done"}
    bad = content["sections"]["bad"]
    assert bad["message"] == "ValueError: tensor of 3 rows"
    assert bad["results"] == {"b": {"x": 2.0}}  # what it had measured before
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == content
    page = path.with_suffix(".md").read_text()
    assert "## bad: failed" in page and "| c | 0.3333 |" in page


@pytest.mark.parametrize(
    ("part", "status", "message"),
    [
        (lack, "skipped", "package soundfile is not installed"),
        (own_fault, "failed", "ModuleNotFoundError: No module named 'data.nothing'"),
        (need_cuda, "skipped", "needs CUDA"),
    ],
)
def test_why_a_section_gave_nothing(part, status, message):
    record = record_of(part)
    assert (record["status"], record["message"]) == (status, message)


def test_a_section_out_of_time_keeps_what_it_has():
    began = time.monotonic()
    record = record_of(("a", {"x": 1}), lambda: time.sleep(30), seconds=0.2)
    assert time.monotonic() - began < 10
    assert record["status"] == "out of time"
    assert record["results"] == {"a": {"x": 1}}


def test_time_that_runs_out_in_an_import_leaves_no_half_module(tmp_path, monkeypatch):
    (tmp_path / "takes_its_time.py").write_text("import time\ntime.sleep(0.5)\nWHOLE = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    record = record_of(lambda: __import__("takes_its_time"), lambda: time.sleep(30), seconds=0.1)
    assert record["status"] == "out of time"
    assert sys.modules.pop("takes_its_time").WHOLE


def test_files_are_written_after_every_part(monkeypatch, tmp_path):
    seen = []

    def look():
        (path,) = tmp_path.glob("*.json")
        seen.append(json.loads(path.read_text())["sections"]["one"]["results"])

    monkeypatch.setattr(gpu, "SECTIONS", {"one": Fake(("a", {"x": 1}), look, ("b", {"x": 2}))})
    gpu.main(["--device", "cpu", "--quick", "--output", str(tmp_path)])
    assert seen == [{"a": {"x": 1}}]


def test_no_file_for_a_device_on_which_nothing_was_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "SECTIONS", {"bad": Fake(fail), "none": Fake(need_cuda)})
    gpu.main(["--device", "cpu", "--quick", "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_files_carry_the_devices_name_and_keep_earlier_sections(monkeypatch, tmp_path):
    card = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", total_memory=2**36, multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    sections = {name: Fake((name, {"x": 1})) for name in ("one", "two")}
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    for name in ("one", "two"):
        gpu.main(["--output", str(tmp_path), "--sections", name])
    (path,) = tmp_path.glob("*.json")
    assert path.name.startswith("nvidia-h100-80gb-hbm3_20")
    content = json.loads(path.read_text())
    assert list(content["sections"]) == ["one", "two"]
    # another torch: other figures, not to be mixed with these
    path.write_text(json.dumps({**content, "torch": "1.0"}))
    gpu.main(["--output", str(tmp_path), "--sections", "two"])
    assert list(json.loads(path.read_text())["sections"]) == ["two"]


def test_targets_say_what_was_met():
    rows = {"ast": {"time_over_base": 1.0}, "ast_film": {"time_over_base": 1.04}}
    sections = {
        "correctness": {"ast": {"fp32": {"logits": 1e-6, "gradients": 2e-4, "limit": 1e-4}}},
        "model_step": {
            STEP_PEERS: {
                "ours": {"of_matmul": 0.45},
                "ours, compiled": {"of_matmul": 0.55},
                "eager": {"note": "out of memory"},
            },
            STEP_VARIANTS: {**rows, "matmul": {"time_over_base": 0.1}},
        },
        "frontend": {"batch 64": {"front_end_clips_per_s": 2e4}},
        "loop": {"film": {"synchronisations": "data/augment.py:139"}},
    }
    content = {"sections": {name: {"results": results} for name, results in sections.items()}}
    assert [(measured, met) for *_, measured, met in targets(content)] == [
        ("0.0002", False),
        ("55.0%", True),
        ("1.040", False),
        ("20000", True),
        ("data/augment.py:139", False),
    ]


# ---------------------------------------------------------------------- what needs CUDA, imitated


def test_memory_grows_until_it_does_not_fit(monkeypatch):
    batches = []

    def call_of(module, x, *_):
        def call():
            batches.append(len(x))
            if len(x) > 16:
                raise torch.OutOfMemoryError("CUDA out of memory")

        return call

    from benchmarks import model_step

    monkeypatch.setattr(model_step, "actions", call_of)
    for name in ("reset_peak_memory_stats", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30 * batches[-1])
    size = gpu_model.quick_size()
    for model in (
        model_step.our_model("ast_film", size),
        model_step.transformers_model(size, "sdpa"),
    ):
        figures = gpu_model._peak_by_batch(model, size, "cpu")
        assert figures == {"batch 8": 8.0, "batch 16": 16.0, "batch 32": "does not fit"}


def test_contestants_that_can_not_run_leave_the_turns():
    def crash():
        raise torch.OutOfMemoryError("CUDA out of memory")

    working, failed = gpu_model.usable({"a": lambda: None, "b": crash, "c": fail})
    assert list(working) == ["a"]
    assert failed == {"b": "out of memory", "c": "ValueError: tensor of 3 rows"}


def test_waiting_for_the_device_is_told_by_its_place(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: modes.append(mode))
    modes: list[str] = []

    class Loop:
        runtime = SimpleNamespace(device=torch.device("cpu"))
        progress = SimpleNamespace(step=0)

        def _step(self, parts, batches):
            if self.progress.step == 4:
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("something else", stacklevel=1)

        def _train_epoch(self):
            for self.progress.step in range(6):
                self._step(None, None)
            self.progress.step += 1

    with pytest.warns(UserWarning, match="something else"):
        figures = gpu_data._waits(Loop())
    line = Loop._step.__code__.co_firstlineno + 2
    assert figures["synchronisations"] == f"tests/benchmarks/test_gpu.py:{line}"
    assert modes == ["warn", "default"] * 3


# ---------------------------------------------------------------------- the whole, tiny


@pytest.mark.slow
def test_every_section_runs_at_tiny_size_with_the_packages_of_a_lent_machine(tmp_path):
    words = ["--device", "cpu", "--quick", "--minutes", "60"]  # the machine may be busy
    run = run_without(ABSENT, *words, "--output", str(tmp_path))
    assert run.returncode == 0, run.stderr
    content = json.loads(run.stdout.splitlines()[-1])
    (path,) = tmp_path.glob("cpu_*.json")
    assert json.loads(path.read_text()) == content
    assert {"device", "date", "torch", "cuda", "python", "quick", "sections"} <= content.keys()
    assert content["device"] == "cpu" and content["quick"]
    states = {name: section["status"] for name, section in content["sections"].items()}
    assert states == dict.fromkeys(gpu.SECTIONS, "done") | {"memory": "skipped"}, run.stderr
    for name, section in content["sections"].items():
        assert section.keys() == {"command", "status", "message", "seconds", "results"}
        assert bool(section["results"]) == (name != "memory")
    met = {what: ok for what, _, _, ok in targets(content) if what.startswith("error of")}
    assert len(met) == 2 * 5 + 1 and all(met.values()), met
    trained = content["sections"]["training"]["results"]
    assert sorted(trained) == ["ast", "ast_film", "ast_grf", "ast_softfilm", "ast_tafilm"]
    assert path.with_suffix(".md").read_text() in run.stdout


@pytest.mark.slow
def test_a_missing_package_skips_its_sections_only(tmp_path):
    words = ["--device", "cpu", "--quick", "--output", str(tmp_path), "--sections"]
    run = run_without((*ABSENT, "soundfile"), *words, "matmul", "frontend")
    assert run.returncode == 0, run.stderr
    sections = json.loads(run.stdout.splitlines()[-1])["sections"]
    assert sections["matmul"]["status"] == "done"
    assert sections["frontend"]["message"] == "package soundfile is not installed"
