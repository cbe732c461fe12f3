"""Real ICBHI recordings: a run of each variant writes everything, and a model learns by heart.

Skipped where there are none (set ICBHI_ROOT, or put them at ../shared/icbhi).
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data.loader import Cycles
from data.splits import Split
from experiments.planted_effect import Remembered
from models.registry import VARIANTS
from tests.test_predict import agrees_with_evaluation
from tests.utils.tiny import differing, random_checkpoint
from utils.common.errors import Preempted
from utils.config.schema import RunConfig, config_from_dict, config_to_dict
from utils.runs.run import Run
from utils.training.assemble import build_data, build_frontend, build_trainer
from utils.training.checkpointer import Checkpointer
from utils.training.device import Runtime
from utils.training.fingerprint import fingerprint
from utils.training.runfolder import RunFolder
from utils.training.trainer import Trainer

pytestmark = [pytest.mark.real, pytest.mark.slow]

# Training and test patients, all four devices, every class but "both".
HANDFUL = (
    "106_2b1_Pl_mc_LittC2SE",
    "107_2b4_Ll_mc_AKGC417L",
    "107_2b4_Pr_mc_AKGC417L",
    "109_1b1_Al_sc_Litt3200",
    "130_3p2_Al_mc_AKGC417L",
    "138_1p2_Al_mc_AKGC417L",
    "154_4b4_Ar_mc_AKGC417L",
    "161_1b1_Al_sc_Meditron",
    "173_1b1_Al_sc_Meditron",
    "187_1b1_Ll_sc_Meditron",
    "206_1b1_Lr_sc_Meditron",
)
TABLES = ("ICBHI_challenge_train_test.txt", "demographic_info.txt", "patient_diagnosis.csv")


@pytest.fixture(scope="module")
def handful(icbhi_root, tmp_path_factory) -> Path:
    """A few real recordings in the layout of a user's folder."""
    folder = tmp_path_factory.mktemp("real")
    for stem in HANDFUL:
        for suffix in (".wav", ".txt"):
            shutil.copy(icbhi_root / "recordings" / f"{stem}{suffix}", folder)
    for name in TABLES:
        shutil.copy(icbhi_root / name, folder)
    return folder


def configure(variant: str, folder: Path, work: Path, **training) -> RunConfig:
    return config_from_dict(
        {
            "dataset": {
                "data_folder": str(folder),
                "cache_dir": str(folder.parent / "cache"),
                "w": 128,
                "val_fraction": 0.3,
                "store_workers": 1,
            },
            "audio": {"clip_seconds": 4.0},
            "backbone": {
                "weights": "none",
                "embed_dim": 64,
                "depth": 2,
                "num_heads": 2,
                "freq_stride": 16,
                "time_stride": 16,
            },
            "models": {variant: {}},
            "training": {
                "output_dir": str(work / "runs"),
                "checkpoint_dir": str(work / "checkpoints"),
                "lr": 2e-3,
                "warmup_epochs": 0,
                **training,
            },
            "mlflow": {"enabled": False},
        }
    )


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_it_trains_for_two_epochs_and_writes_every_artifact(
    variant, handful, tmp_path, monkeypatch
):
    if variant != "ast_softfilm":  # pictures cost seconds; one variant, with all of them, will do
        monkeypatch.setattr("utils.runs.end.draw_figures", lambda *_: None)
    config = configure(variant, handful, tmp_path, epochs=2)
    with Run(config, Runtime("cpu")) as run:
        data = run.data()
        run.test(run.fit(run.model(data), data))
    folder = RunFolder.of(config)
    history = pd.read_csv(folder.metrics)
    assert len(history) == 2 and history["train_loss"].iloc[1] < history["train_loss"].iloc[0]
    assert folder.finished
    for part in ("val", "test"):
        assert len(pd.read_csv(folder.predictions / f"{part}.csv"))
    for name in ("config.yaml", "run.log", "report.md", "model_card.md"):
        assert (folder.path / name).stat().st_size


def trainer_of(config: RunConfig, data: Cycles) -> Trainer:
    """A run's trainer, that saves its state where the run would."""
    folder = RunFolder.of(config)
    folder.prepare(config, fresh=False)
    checkpointer = Checkpointer(folder, config_to_dict(config), fingerprint(data.table))
    runtime = Runtime("cpu", "fp32", "false")
    return build_trainer(config, data, runtime, checkpointer=checkpointer)


def test_methods_learn_resume_and_are_named(handful, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.runs.end.draw_figures", lambda *_: None)

    def config(place: str) -> RunConfig:
        values = config_to_dict(configure("ast_softfilm", handful, tmp_path / place, epochs=2))
        return config_from_dict(values | {"methods": {"patchmix_cl": {}, "dat": {}, "pafa": {}}})

    with Run(config("whole"), Runtime("cpu", "fp32", "false")) as run:
        data = run.data()
        whole = run.fit(run.model(data), data)
        run.test(whole)
    loss = [row["train_loss"] for row in whole.progress.history]
    assert loss[1] < loss[0]
    report = (run.folder.path / "report.md").read_text(encoding="utf-8")
    assert report.startswith("# SoftFiLM-AST + Patch-Mix CL + DAT + PAFA: test part")
    step, left = Trainer.step, iter(range(7, 0, -1))  # of five steps an epoch

    def stopped(trainer, *arguments):
        if next(left, 0) == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(trainer, *arguments)

    monkeypatch.setattr(Trainer, "step", stopped)
    with pytest.raises(Preempted):
        trainer_of(config("cut"), data).fit()
    cut = trainer_of(config("cut"), data)
    cut.fit()
    assert not differing(whole.best, cut.best)


def test_it_learns_32_real_cycles_by_heart(handful, tmp_path):
    config = configure("ast_softfilm", handful, tmp_path, epochs=150, lr=5e-4, selection="fixed")
    config.augment.enabled = False
    config.model.dropout = 0.0
    config.dataset.batch_size = 8
    data = build_data(config)
    chosen = np.random.default_rng(0).permutation(data.split.train)[:32]
    data.split = Split(np.sort(chosen), np.empty(0, np.int64), data.split.test)
    runtime = Runtime("cpu")
    inputs = Remembered(build_frontend(config), runtime, data, known={})
    trainer = build_trainer(config, data, runtime, inputs=inputs)
    trainer.fit()
    task = data.task
    probability = task.probabilities(trainer.predict(chosen))
    predicted = task.predicted_classes(probability, task.default_thresholds)
    assert len(np.unique(data.classes(chosen))) >= 3
    assert (predicted == data.classes(chosen)).mean() > 0.95


@pytest.fixture(scope="module")
def cycles(handful, tmp_path_factory):
    return build_data(configure("ast", handful, tmp_path_factory.mktemp("cycles")))


@pytest.mark.parametrize("n_cls", [4, 2])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_predictions_are_those_of_evaluation(variant, n_cls, handful, cycles, tmp_path):
    config = configure(variant, handful, tmp_path)
    config.dataset.n_cls = n_cls
    checkpoint = random_checkpoint(config, cycles, tmp_path / "m.pt")
    agrees_with_evaluation(checkpoint, cycles, HANDFUL[::6])
