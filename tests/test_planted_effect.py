"""Short form of experiments/planted_effect.py: only who is told the site knows what a sound means.

Clips are clicks, a tone, both or neither, half a second long and unmistakable, so that a
transformer of two narrow blocks learns them in seconds; all else is a real run.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from functools import cache

import numpy as np
import pytest
import torch

from data.loader import Cycles
from data.synthetic.planted import PLANTED_MIX, RULE, group_of, reachable_scores
from experiments import planted_effect as benchmark
from experiments.planted_effect_report import REMARKS, remarks_of, to_markdown
from models.registry import VARIANTS
from tests.utils import tiny
from utils.config.schema import RunConfig
from utils.evaluation.metadata_test import conditions
from utils.metrics.score import sp_se_score
from utils.training.assemble import build_frontend

CONDITIONED = [name for name in VARIANTS if name != "ast"]
CYCLES = 480
HEARD = np.random.default_rng(2).choice(4, size=CYCLES, p=PLANTED_MIX)


def configure(variant: str) -> RunConfig:
    changes = {
        "augment.enabled": False,
        "dataset.batch_size": 16,
        "backbone.embed_dim": 32,
        "models.*.dropout": 0.0,
        "training.epochs": 30,
        "training.lr": 1.5e-3,  # at twice that, some seeds and processors never leave the plateau
        "training.warmup_epochs": 2,
        "training.selection": "fixed",
        "training.sensitivity_bias": 1.0,
    }
    return tiny.tiny_config(variant, **changes)


def groups(table) -> np.ndarray:
    return np.array([group_of("site", site=s, device="", age=None) for s in table["AuscLoc"]])


@cache
def corpus(planted: bool) -> Cycles:
    """The same sounds, annotated as heard or by the planted rule."""
    table = tiny.cycle_table(CYCLES, seed=1).assign(Crackles=HEARD & 1, Wheezes=HEARD >> 1)
    data = tiny.tiny_data(configure("ast"), table)
    if planted:
        classes = RULE[groups(table), HEARD]
        data = replace(data, table=table.assign(Crackles=classes & 1, Wheezes=classes >> 1))
    return data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(variant, planted) -> test Score under each kind of metadata; SoftFiLM's factor effects."""
    folder, known = tmp_path_factory.mktemp("planted"), {}

    @cache
    def once(variant: str, planted: bool = True) -> dict:
        data = corpus(planted)
        trainer = tiny.tiny_trainer(configure(variant), folder / f"{variant}-{planted}", data)
        frontend = build_frontend(trainer.config)
        inputs = benchmark.Remembered(frontend, trainer.runtime, data, known=known)
        trainer.inputs = trainer.predictor.inputs = inputs
        trainer.fit()
        rows, task = data.split.test, data.task
        asked = dict(
            conditions(data.table.iloc[rows], data.statistics.transform, shuffles=1, seed=0)
        )
        found = {}
        for name, logits in zip(
            asked, trainer.predictor.under(rows, list(asked.values())), strict=True
        ):
            pred = task.predicted_classes(task.probabilities(logits), trainer.progress.thresholds)
            found[name] = sp_se_score(data.classes(rows), pred)[2]
        if variant == benchmark.ATTRIBUTED:
            conditioner = trainer.model.conditioner
            effects = conditioner.factor_effects(asked["real"], centred=True).sum(dim=1)
            found["factors"] = dict(zip(conditioner.factors, effects.tolist(), strict=True))
        return found

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield once
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def by_sound() -> float:
    """Best Score on the test part of any rule that is told nothing."""
    data = corpus(planted=True)
    rows = data.split.test
    group = groups(data.table)[rows]
    return reachable_scores(HEARD[rows], group, data.classes(rows))["4"]["sound"]


@pytest.mark.parametrize("variant", CONDITIONED)
def test_a_conditioned_variant_learns_what_only_metadata_can_tell(variant, run, by_sound):
    found = run(variant)
    assert found["real"] > max(by_sound, run("ast")["real"]) + 10


def test_plain_ast_stays_below_what_sound_alone_can_reach(run, by_sound):
    assert 50 < run("ast")["real"] <= by_sound


@pytest.mark.parametrize("variant", CONDITIONED)
def test_the_gain_is_gone_with_wrong_or_unknown_metadata(variant, run, by_sound):
    found = run(variant)
    without = max(found["shuffled"], found["all unknown"], found["site unknown"])
    assert without < by_sound + 3  # a few test cycles more or less are luck
    assert found["device unknown"] > by_sound + 10


def test_softfilm_attributes_the_effect_to_the_site(run):
    factors = run("ast_softfilm")["factors"]
    assert factors["site"] > 2 * max(factors["device"], factors["rest"])


def test_without_the_effect_metadata_do_not_matter(run):
    found = run("ast_film", planted=False)
    assert found["real"] > 90
    assert abs(found["real"] - found["shuffled"]) < 5


# ------------------------------------------------------------------ the command


def test_the_command_keeps_what_is_finished_and_writes_the_table(tmp_path, monkeypatch):
    small = {
        "dataset": {"h": 32, "w": 32},
        "audio": {"clip_seconds": 0.5},
        "backbone": {"embed_dim": 16, "num_heads": 2},
        "training": {"epochs": 2, "warmup_epochs": 1},
    }
    monkeypatch.setitem(benchmark.MODEL, "input_tdim", 32)
    wanted = [
        benchmark.Job(*job)
        for job in (("site", "ast", 0), ("site", "ast_softfilm", 0), ("off", "ast", 0))
    ]
    monkeypatch.setattr(benchmark, "jobs", lambda fields, seeds: wanted)
    make = benchmark.Benchmark
    monkeypatch.setattr(
        benchmark, "Benchmark", lambda work: make(work, patients=6, overrides=small)
    )
    output = tmp_path / "table.md"
    output.write_text(f"Earlier figures.\n{REMARKS}\nA remark.\n", encoding="utf-8")
    words = ["--seeds", "1", "--work", str(tmp_path / "work"), "--output", str(output)]
    threads = str(torch.get_num_threads())
    assert benchmark.main([*words, "--threads", threads]) == 0
    text = output.read_text(encoding="utf-8")
    assert "3 of 3 runs finished" in text and "Synthetic" in text and "Earlier" not in text
    assert "2 blocks 16 wide from random weights, 2 epochs in batches of 32" in text
    assert "minus plain AST" in text and text.endswith("\nA remark.\n")
    assert "| site | " in text  # SoftFiLM's factors

    def refuse(*_):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(make, "run", refuse)
    assert benchmark.main([*words, "--threads", threads]) == 0
    make(tmp_path / "work", patients=6, overrides=small).path(wanted[0]).unlink()
    with pytest.raises(AssertionError, match="trained again"):
        benchmark.main([*words, "--threads", threads])


def test_the_order_of_runs_leaves_pairs_at_any_time():
    order = benchmark.jobs(["site", "age"], 3)
    assert len(order) == len(set(order)) == 2 * 5 * 3 + 3
    first = order[: len(VARIANTS)]
    assert {job.variant for job in first} == set(VARIANTS)
    assert {(job.corpus, job.seed) for job in first} == {("site", 0)}
    assert {job.variant for job in order if job.corpus == "age"} == {"ast_softfilm"}


def record(variant: str, right: float, hidden: float) -> dict:
    """Ten patients with 20 normal and 20 crackle cycles, a share of which is right."""

    def tables(share: float) -> list:
        table = np.zeros((10, 4, 4), int)
        table[:, 0, 0] = table[:, 1, 1] = round(20 * share)
        table[:, 0, 1] = table[:, 1, 0] = 20 - round(20 * share)
        return [table.tolist()]

    names = ("shuffled", "all unknown", *(f"{f} unknown" for f in ("device", "site", "age")))
    test = {"real": tables(right)} | {n: tables(hidden) for n in (*names, "bmi unknown")}
    test["duration unknown"] = tables(hidden)
    counts = {p: {"cycles": 400, "patients": 10} for p in ("train", "test")}
    return {
        "corpus": "site",
        "variant": variant,
        "seed": 0,
        "seconds": 1.0,
        "cpu_seconds": 1.0,
        "threads": 1,
        "counts": counts,
        "train": tables(1.0),
        "test": test,
        "shares": {"device": 70.0, "site": 20.0, "rest": 10.0},
    }


def test_the_text_says_what_went_against_expectation():
    best = {"test": {"4": {"sound": 64.0, "sound_and_field": 100.0, "field": 50.0}}}
    runs = [
        record("ast", 0.5, 0.5),
        record("ast_film", 0.9, 0.5),
        record("ast_tafilm", 0.5, 0.5),
        record("ast_softfilm", 0.9, 0.8),
    ]
    text = to_markdown(
        runs, {"site": best}, wanted=4, command="c", setup="In a way", day=date(2026, 1, 2)
    )
    assert "10 patients. In a way. A run took 1 s" in text
    assert "Better than the plain AST (interval above 0): FiLM-AST, SoftFiLM-AST." in text
    assert "No different beyond the interval: TAFiLM-AST." in text
    assert "against expectation: SoftFiLM-AST (shuffled), SoftFiLM-AST (all unknown)." in text
    assert "The largest share has device, and not site." in text
    assert "+40.0 [+40.0, +40.0] | 80 %" in text
    assert remarks_of(text) == ""
