"""The benchmarks' own arithmetic, and the GPU program at a tiny size on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import buckets, gpu, harness, loop, model_step
from models.config import TimeDomainConfig
from models.registry import METHODS
from utils.common.cli import command
from utils.common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
#: what a machine with a card may lack although requirements.txt names it
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
SMALL = ("--device", "cpu", "--small")


# ---------------------------------------------------------------------- harness


def test_contestants_take_turns():
    calls = []
    contestants = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = harness.interleave(contestants, rounds=2, warmup=1)
    assert calls == ["a", "b"] * 3
    assert len(times["a"].clock.times) == len(times["b"].processor.times) == 2


def test_a_contestant_may_time_itself():
    values = iter([9.0, 2.0, 4.0, 6.0])
    times = harness.interleave({"own": lambda: next(values)}, rounds=3, warmup=1)
    assert times["own"].clock.times == [2.0, 4.0, 6.0]
    assert harness.spread(times["own"].clock) == pytest.approx(0.5)


def test_ratios_are_taken_round_by_round():
    fast, slow = (
        harness.Rounds(harness.measurement(s), harness.measurement(s))
        for s in ([1.0, 2.0, 1.0], [2.0, 4.0, 3.0])
    )
    assert fast.faster(slow).times == [2.0, 2.0, 3.0]


# ---------------------------------------------------------------------- model step


@pytest.mark.parametrize("kind", ["forward", "step"])
def test_flops_follow_the_formula(kind):
    """A block costs 24 N D^2 + 4 N^2 D per clip, the patch embedding 2 D 256 per patch."""
    size = model_step.Size(depth=2, embed_dim=24, heads=2, n_frames=64)
    model = model_step.AllTokens(model_step.our_model("ast", size))
    x = torch.zeros(2, 1, model_step.N_MELS, size.n_frames)
    patches, d = 12 * 5, size.embed_dim
    n = 2 + patches
    head = sum(2 * m.weight.numel() for m in model.model.head if hasattr(m, "in_features"))
    products, embedding = 2 * (24 * n * d**2 + 4 * n**2 * d) + head, 2 * 256 * d * patches
    # backward: twice the forward pass, but no gradient of the spectrogram
    expected = products + embedding if kind == "forward" else 3 * products + 2 * embedding
    assert model_step.flops(model, x, kind) == 2 * expected
    if kind == "forward":  # the processor's fused attention counts as its products
        assert model_step.flops(model, x, kind, computed=True) == 2 * expected


def test_contestants_out_of_memory_leave(monkeypatch):
    action = model_step.action

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def failing(module, *arguments):
        return full if isinstance(module, model_step.AllTokens) else action(module, *arguments)

    monkeypatch.setattr(model_step, "action", failing)
    size = model_step.Size(depth=1, embed_dim=24, heads=2, n_frames=32)
    rows = model_step.compare("peers", "forward", "fp32", size, 1, "cpu", rounds=1, matmul_size=16)
    assert rows.pop("same work") == {"note": "out of memory"}
    assert rows["transformers"]["time_over_base"] == 1
    assert all(row["gflops_per_second"] > 0 for row in rows.values())


def test_what_adapters_save_and_sharpness_costs():
    size = model_step.Size(depth=2, embed_dim=48, heads=2, n_frames=32)
    rows = model_step.compare("adapters", "step", "fp32", size, 1, "cpu", rounds=1, matmul_size=16)
    assert rows["sam"]["flops_over_base"] == 2 and rows["lora"]["flops_over_base"] < 1
    plain, lora, sam = (rows[name] for name in ("ast", "lora", "sam"))
    assert (sam["state_mib"], sam["saved_mib"]) == (plain["state_mib"], plain["saved_mib"])
    trained = 2 * 2 * 8 * 2 * 48 + 2 * 48  # two blocks' adapters, the final LN; the head in both
    weights = model_step.our_model("ast", size).backbone.parameters()
    dropped = sum(p.numel() for p in weights) - trained
    saved = (plain["state_mib"] - lora["state_mib"]) * 2**20
    assert saved == 3 * 4 * dropped and lora["saved_mib"] < plain["saved_mib"]


# ---------------------------------------------------------------------- loop


def test_every_method_takes_a_timed_step(monkeypatch):
    """Also one that hears the waveform; its own model is a small one here."""
    sizes = {"embed_dim": 16, "depth": 1, "num_heads": 2, "conv_dim": 8}
    small = METHODS["time_domain"]._replace(config_class=partial(TimeDomainConfig, **sizes))
    monkeypatch.setattr(model_step, "METHODS", {**METHODS, "time_domain": small})
    size = model_step.Size(depth=1, embed_dim=24, heads=2, n_frames=32)
    rows = model_step.compare("methods", "step", "fp32", size, 4, "cpu", rounds=1, matmul_size=16)
    assert set(rows) == {"ast", "matmul", *METHODS}
    assert all(row["seconds_per_clip"] > 0 for row in rows.values())


def test_the_loop_is_timed_around_a_stub(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "STEPS", 4)
    config = loop.configure("ast", tmp_path, "training.device=cpu")
    data = loop.corpus(config)
    classes = data.classes(loop.some_rows(data, 8).split.train)
    assert len(set(np.bincount(classes).tolist())) == 1
    found = loop.overhead(config, data, loop.Runtime("cpu", "fp32", "false"), rounds=1)
    assert found["loop_ms_per_batch"] > found["bare_ms_per_batch"] > 0


# ---------------------------------------------------------------------- gpu


def test_without_cuda_one_sentence_and_no_file(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command(lambda: gpu.main(["--output", str(tmp_path)]))() == 2
    assert "no CUDA device was found" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [SMALL[:2], SMALL, SMALL[2:], (*SMALL[:2], "--output", "x")])
def test_misleading_figures_are_refused(monkeypatch, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="add --small and --output"):
        gpu.parse(list(words))


def test_sections_fail_alone_and_files_stay(monkeypatch, tmp_path, capsys):
    def good(_):
        yield "a", {"x": 1 / 3}

    def bad(_):
        yield "b", {"x": 2.0}
        raise ValueError("tensor of 3 rows\nand more of it")

    def slow(_):
        yield "c", {"x": 3.0}
        yield "d", {"x": 4.0}

    sections = {"good": (good, 1.0), "bad": (bad, 1.0), "slow": (slow, 0.0)}
    monkeypatch.setattr(gpu, "SECTIONS", {**sections, "last": (good, 1.0)})
    words = [*SMALL, "--output", str(tmp_path)]
    gpu.main(words)
    (path,) = tmp_path.glob("*-cpu.json")
    content = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == content
    found = {n: (s["status"], s["message"], s["results"]) for n, s in content["sections"].items()}
    assert found["good"] == found["last"] == ("done", "", {"a": {"x": 0.3333}})
    assert found["bad"] == ("failed", "ValueError: tensor of 3 rows", {"b": {"x": 2.0}})
    assert found["slow"][0] == "stopped" and list(found["slow"][2]) == ["c"]
    page = path.with_suffix(".md").read_text()
    assert "## bad: failed" in page and "| a | 0.3333 |" in page
    gpu.main([*words, "--sections", "good"])  # the others stay
    assert json.loads(path.read_text())["sections"].keys() == gpu.SECTIONS.keys()
    path.write_text(json.dumps({**content, "torch": "1.0"}))  # figures of another torch do not
    gpu.main([*words, "--sections", "good"])
    assert json.loads(path.read_text())["sections"].keys() == {"good"}


def test_files_carry_date_and_card(monkeypatch, tmp_path):
    card = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=2**36)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(gpu, "SECTIONS", {"one": (lambda _: iter([("a", {"x": 1})]), 1.0)})
    gpu.main(["--output", str(tmp_path)])
    (path,) = tmp_path.glob("20*-nvidia-h100-80gb-hbm3.json")
    assert json.loads(path.read_text())["memory_gib"] == 64


@pytest.mark.slow
def test_the_whole_gpu_program_runs_on_a_cpu(tmp_path):
    code = BLOCKED.format(absent=set(ABSENT))
    own = [name for name in gpu.SECTIONS if name not in ("resume", "loop")]  # other tests do
    words = [*SMALL, "--minutes", "60", "--output", str(tmp_path), "--sections", *own]
    run = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    sections = json.loads(run.stdout.splitlines()[-1])["sections"]
    states = {name: section["status"] for name, section in sections.items()}
    assert states == dict.fromkeys(own, "done"), run.stderr
    checked = [row for part in sections["correctness"]["results"].values() for row in part.values()]
    assert len(checked) == 1 + 2 * 5 and all(row["met"] for row in checked), checked
    trained = sections["training"]["results"]
    assert sorted(trained) == ["ast", "ast_film", "ast_grf", "ast_softfilm", "ast_tafilm"]


def test_an_epoch_in_buckets_is_counted(synthetic_corpus):
    found = buckets.epoch_of_icbhi(str(synthetic_corpus), np.array([0.25, 0.5, 1.0]))
    cycles = [found[f"{s}_cycles"] for s in ("2.5s", "5s", "10s")]
    assert sum(found[f"{s}_batches"] for s in ("2.5s", "5s", "10s")) >= found["steps"]
    assert found["steps"] == -(-sum(cycles) // 16)
    assert found["single_epoch_s"] == sum(cycles)
    assert found["buckets_epoch_s"] == pytest.approx(np.dot(cycles, [0.25, 0.5, 1.0]))
