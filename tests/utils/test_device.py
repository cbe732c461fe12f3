"""Where a run computes: what it does without a compiler."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.utils.tiny import BUCKETS, QUIET, step_losses, tiny_config, tiny_trainer
from utils.training.device import LAUNCHED, TORCHRUN, Runtime, describe


def test_without_a_compiler_a_run_goes_on_and_says_so_once(tmp_path, monkeypatch, caplog):
    from torch._inductor import config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch.compiler.reset()
    config = tiny_config(**QUIET | {"training.compile": "true", "training.epochs": 1})
    with inductor.patch({"cpp.cxx": (None, str(tmp_path / "no-compiler"))}):
        trainer = tiny_trainer(config, tmp_path / "run")
        losses = step_losses(trainer)
    plain = tiny_config(**QUIET | {"training.compile": "false", "training.epochs": 1})
    assert losses == step_losses(tiny_trainer(plain, tmp_path / "plain"))
    assert not trainer.runtime.compiled
    assert "compiled" not in describe(trainer.runtime)
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "utils.training.device"]
    assert "torch.compile does not work here" in warning
    assert "no-compiler" in warning


def test_a_processor_computes_in_full_precision_and_uncompiled_by_default():
    runtime = Runtime("cpu")
    assert (runtime.precision, runtime.compiled, runtime.world) == ("fp32", False, 1)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        ("WORLD_SIZE", "MASTER_ADDR"),
        ("RANK", "MASTER_ADDR"),
        ("WORLD_SIZE RANK LOCAL_RANK", "MASTER_ADDR"),
        ("PMI_SIZE PMI_RANK", "MASTER_ADDR"),  # Slurm's srun
        ("OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_LOCAL_RANK", "MASTER_ADDR"),
        ("MASTER_ADDR WORLD_SIZE", "MASTER_PORT"),
        ("MASTER_ADDR MASTER_PORT WORLD_SIZE RANK", "LOCAL_RANK"),
        ("MASTER_ADDR MASTER_PORT", None),
    ],
)
def test_variables_of_a_batch_job_start_no_group(names, missing, monkeypatch, caplog):
    for name in (*TORCHRUN, *LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    for name in names.split():
        monkeypatch.setenv(name, "2" if name.endswith("SIZE") else "1")
    assert Runtime("cpu").world == 1
    names = ", ".join(name for name in LAUNCHED if name in names.split())
    said = f"{names} without {missing}: not started by torchrun, runs alone"
    assert said in caplog.text if missing else not caplog.text


@pytest.mark.parametrize(("threads", "said"), [(1, "CPU, 1 thread, fp32"), (2, "CPU, 2 threads,")])
def test_a_processor_says_its_threads(threads, said, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert describe(Runtime("cpu")).startswith(said)


@pytest.mark.parametrize(
    ("how", "parts"), [("true", ["ConditionedAST"]), ("blocks", ["Block"] * 2), ("false", [])]
)
def test_the_model_or_its_blocks_are_compiled(how, parts, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Runtime, "_compiler_works", lambda self: True)
    monkeypatch.setattr(nn.Module, "compile", lambda self: seen.append(type(self).__name__))
    keys, config = QUIET | {"training.compile": how}, torch._dynamo.config
    with config.patch(automatic_dynamic_shapes=True, recompile_limit=8):
        tiny_trainer(tiny_config(**keys), tmp_path)
        assert seen == parts and config.automatic_dynamic_shapes
        tiny_trainer(tiny_config(**keys, **BUCKETS), tmp_path)
        assert config.automatic_dynamic_shapes == (how == "false")
        assert config.recompile_limit == (8 if how == "false" else 24)
