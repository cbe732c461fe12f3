"""Two real processes compute what one computes. `python -m torch.distributed.run -m` this module
runs every scenario below in two processes; the tests compare what they wrote with one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from data.loader import epoch_plan
from data.splits import Split
from tests.utils.tiny import (
    BUCKETS,
    LIVELY,
    QUIET,
    comparable,
    cycle_table,
    differing,
    gradient_norms,
    tiny_config,
    tiny_data,
    tiny_trainer,
    weights,
)
from utils.common.errors import Preempted

ROOT = Path(__file__).resolve().parents[2]
TRAINED = 25  # cycles: the last of four steps has one, so that the second process has none

#: Regularisation as large as the task loss: a wrong share of it would show.
EXACT = QUIET | {"models.*.mask_overlap_lambda": 2.0, "models.*.mask_coverage_lambda": 1.0}
SCENARIOS = {
    "softfilm": ("ast_softfilm", EXACT),
    "accumulated": ("ast_softfilm", EXACT | {"training.accumulation_steps": 2}),
    "grf": ("ast_grf", QUIET | {"training.sampler": "balanced"}),
    "buckets": (
        "ast_film",
        QUIET | BUCKETS | {"training.accumulation_steps": 2},
    ),
    "lora_sam_add_rsc": (
        "ast_film",
        QUIET
        | {"backbone.adapter": "lora", "training.sam_rho": 0.05, "training.accumulation_steps": 2}
        | {"methods.add_rsc": {}},
    ),
    "shift": (
        "ast_film",
        QUIET
        | {"training.accumulation_steps": 2, "methods.prior_product": {}}
        | {"methods.group_dro": {"step_size": 0.5}},
    ),
    "frozen": ("ast", QUIET | {"backbone.trainable_blocks": 0}),
}
#: Contrasts live inside a micro-batch: one process computes those of the two, with their seeds.
STILL = LIVELY | {"models.*.dropout": 0.0}
METHODS = {
    "patchmix_dat_pafa": (
        "ast_softfilm",
        STILL | {"methods.patchmix_cl": {}, "methods.dat": {}, "methods.pafa": {}},
    ),
    "sg_scl": ("ast", STILL | {"methods.sg_scl": {}}),
}
SCENARIOS |= METHODS
#: With everything random switched on; compared with itself only.
RANDOM = LIVELY | {"models.*.metadata_dropout": 0.2}


def data_of(config):
    data = tiny_data(config, cycle_table(45, seed=1))
    data.split = Split(data.split.train[:TRAINED], data.split.val, data.split.test)
    return data


def trainer_of(name: str, folder: Path):
    variant, overrides = SCENARIOS[name]
    config = tiny_config(variant, **overrides, **{"dataset.cache_dir": str(folder / "cache")})
    return tiny_trainer(config, folder / name, data_of(config))


def dealt(order, *, rank, world, **options):
    """The steps of one process with the micro-batches of two."""
    first, second = (epoch_plan(order, rank=r, world=2, **options) for r in (0, 1))
    return [[*ours, *theirs] for ours, theirs in zip(first, second, strict=True)]


def record(name: str, folder: Path) -> dict:
    """Losses of every cycle in every epoch, history, weights and predictions of a scenario."""
    trainer = trainer_of(name, folder)
    losses, close = [], trainer.close_epoch

    def watched():
        rows, values = trainer.gather(trainer.seen)
        losses.append(sorted(zip(rows.tolist(), values[:, 0].tolist(), strict=True)))
        return close()

    trainer.close_epoch = watched
    norms = gradient_norms(trainer)
    alone = name in METHODS and trainer.runtime.world == 1
    with patch("utils.training.trainer.epoch_plan", dealt) if alone else nullcontext():
        trainer.fit()
    test = trainer.data.split.test
    return {
        "losses": losses,
        "norms": norms,
        "history": comparable(trainer.progress.history),
        "weights": weights(trainer),
        "logits": torch.from_numpy(trainer.predict(test)),
        "one": torch.from_numpy(trainer.predict(test[:1])),  # the second process has none
    }


# ------------------------------------------------------------------ in two processes


def worker(folder: Path) -> None:
    from accelerate.utils import gather_object

    import utils.training.checkpointer as state

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    writers = []
    save = state.save_state
    state.save_state = lambda *arguments: (writers.append(rank), save(*arguments))
    found = {name: record(name, folder) for name in SCENARIOS}
    found["resume"] = resume(folder, rank)
    world = torch.distributed.get_world_size()
    found["runtime"] = {
        "world": world,
        "backend": torch.distributed.get_backend(),
        "pids": gather_object([os.getpid()]),
        "writers": gather_object([sorted(set(writers))]),
    }
    same = gather_object([{k: v["weights"] for k, v in found.items() if "weights" in v}])
    found["apart"] = {k: differing(same[0][k], same[-1][k]) for k in same[0]}
    if rank == 0:
        torch.save(found, folder / "found.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def resume(folder: Path, rank: int) -> dict:
    """Uninterrupted, and stopped by a signal that only the second process gets."""
    config = tiny_config(**RANDOM)
    data = data_of(config)
    whole = tiny_trainer(config, folder / "whole", data)
    whole.fit()
    first = tiny_trainer(config, folder / "parts", data)
    step, steps = first.step, [0]

    def watched(parts, batches):
        steps[0] += 1
        if steps[0] == 6 and rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(parts, batches)

    first.step = watched
    try:
        first.fit()
        preempted = False
    except Preempted:
        preempted = True
    torch.manual_seed(7)
    second = tiny_trainer(config, folder / "parts", data)
    second.fit()
    return {
        "preempted": preempted,
        "steps": steps[0],
        "weights": weights(second),
        "differing": differing(weights(second), weights(whole)),
        "histories": (comparable(second.progress.history), comparable(whole.progress.history)),
    }


# ------------------------------------------------------------------ compared with one

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", "-m", "tests.utils.test_distributed", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return torch.load(folder / "found.pt", weights_only=False)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("one")
    return {name: record(name, folder) for name in SCENARIOS}


def test_there_were_two_processes(found):
    runtime = found["runtime"]
    assert runtime["world"] == 2
    assert runtime["backend"] == "gloo"
    assert len(set(runtime["pids"])) == 2


def test_one_process_writes(found):
    assert found["runtime"]["writers"] == [[0], []]


def test_both_processes_hold_the_same_weights(found):
    assert found["apart"] == {name: [] for name in (*SCENARIOS, "resume")}


@pytest.mark.parametrize("name", list(SCENARIOS))
def test_every_cycle_counts_once_with_the_loss_of_one_process(name, found, expected):
    two, one = found[name]["losses"], expected[name]["losses"]
    assert len(two) == len(one) == 3
    for ours, theirs in zip(two, one, strict=True):
        assert len(ours) == TRAINED
        assert [row for row, _ in ours] == [row for row, _ in theirs]
        np.testing.assert_allclose(
            [loss for _, loss in ours], [loss for _, loss in theirs], atol=1e-5
        )


@pytest.mark.parametrize("name", list(SCENARIOS))
def test_every_gradient_is_the_one_of_one_process(name, found, expected):
    np.testing.assert_allclose(found[name]["norms"], expected[name]["norms"], rtol=2e-3)


@pytest.mark.parametrize("name", list(SCENARIOS))
def test_history_and_predictions_are_those_of_one_process(name, found, expected):
    two, one = found[name], expected[name]
    for ours, theirs in zip(two["history"], one["history"], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == (value if value == "nan" else pytest.approx(value, abs=1e-4)), key
    torch.testing.assert_close(two["logits"], one["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(two["one"], one["one"], atol=1e-4, rtol=0)
    for key, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][key], value, atol=1e-4, rtol=1e-3, msg=key)


def test_the_regularisation_moved_the_masks(found, expected):
    """Else the comparison above says nothing about it."""
    start = trainer_of("softfilm", Path("unused")).model.state_dict()
    for run in (found, expected):
        moved = run["softfilm"]["weights"]["conditioner.masks.logits"]
        assert (moved - start["conditioner.masks.logits"]).abs().max() > 1e-3


def test_two_processes_resume_exactly(found):
    resumed = found["resume"]
    assert resumed["preempted"]
    assert resumed["steps"] == 7  # the flag is read one step later, by both
    assert resumed["differing"] == []
    ours, theirs = resumed["histories"]
    assert ours == theirs


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
