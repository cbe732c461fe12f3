"""Keys against a prior that shifts, in the loop: balance, groups of the selection, dropout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.batch import Metadata
from data.fields import balancing_weights, field_values
from data.loader import MicroBatch
from data.task import FIELDS, Task
from models.config import FiLMConfig
from models.encoders import MetadataEmbeddings
from tests.utils.resuming import resumed_in_mid_epoch
from tests.utils.tiny import LIVELY, QUIET, cycle_table, tiny_config, tiny_data, tiny_trainer
from utils.common.errors import UserError
from utils.metrics.score import GRID, choose_thresholds, group_score, sp_se_score, usable_groups

BALANCED = {"training.balance": ["device", "age"], "training.balance_bounds": [0.5, 2.0]}


def test_the_loss_of_a_cycle_is_weighed(tmp_path):
    plain, balanced = (
        tiny_trainer(tiny_config("ast", **QUIET, **keys), tmp_path / str(len(keys)))
        for keys in ({}, BALANCED)
    )
    rows = plain.rows[:8]
    for trainer in (plain, balanced):
        trainer.step([MicroBatch(rows, 1 / 8, 0)], trainer.inputs.batches([rows]))
    (_, a), (_, b) = plain.seen[0], balanced.seen[0]
    table = plain.data.table.iloc[plain.rows]
    expected = balancing_weights(field_values(table, ["device", "age"]), plain.classes, [0.5, 2.0])
    assert len(set(expected[:8].round(6))) > 2
    np.testing.assert_allclose(b[:, 0] / a[:, 0], expected[:8], rtol=1e-5)


def test_all_of_it_resumes_exactly(tmp_path):
    groups = {"training.selection_groups": ["age"], "models.*.metadata_dropout_joint": 0.3}
    config = tiny_config("ast_film", **LIVELY, **BALANCED, **groups, **{"training.epochs": 2})
    trainer = resumed_in_mid_epoch(config, tmp_path)
    last = trainer.progress.history[trainer.progress.best_epoch]
    assert trainer.progress.best_score == last["val_group_score"]


def test_thresholds_by_the_mean_of_group_scores():
    rng = np.random.default_rng(1)
    groups = np.array(["a", "b", "c"], object)[rng.choice(3, 200, p=[0.7, 0.25, 0.05])]
    label = (rng.random((200, 2)) < 0.3).astype(np.float32)
    label[groups == "c"] = 0
    probability = (0.3 * label + 0.7 * rng.random((200, 2))).round(2)
    probability[groups == "b"] *= 0.5
    task = Task(4)
    true = task.true_classes(label)
    assert list(usable_groups(true, groups)) == ["a", "b"]

    def mean_score(thresholds):
        pred = task.predicted_classes(probability, thresholds)
        assert group_score(true, pred, groups) == pytest.approx(
            np.mean([sp_se_score(true[groups == g], pred[groups == g]).score for g in "ab"])
        )
        return group_score(true, pred, groups)

    found = choose_thresholds(task, probability, label, groups=groups)
    some = GRID[::8]
    best = max(mean_score((x, y)) for x in some for y in some)
    assert mean_score(found) >= best - 1e-9
    assert found != choose_thresholds(task, probability, label)


def test_groups_without_both_classes_are_named(tmp_path, caplog):
    table = cycle_table()
    config = tiny_config("ast", **{"training.selection_groups": ["device"]})
    val = tiny_data(config, table).split.val
    assert len(val) == 4
    table.loc[val, ["Crackles", "Wheezes"]] = [[0, 0], [1, 0], [0, 0], [0, 0]]
    table.loc[val, "Device"] = ["Meditron", "Meditron", "Litt3200", None]
    with caplog.at_level("INFO"):
        tiny_trainer(config, tmp_path, tiny_data(config, table))
    assert "mean Score of Meditron; left out" in caplog.text
    assert "all normal or all abnormal: Litt3200; unknown" in caplog.text
    table.loc[val, "Device"] = ["Litt3200", "Meditron", "Litt3200", "Litt3200"]
    with pytest.raises(UserError, match=r"no group of the selection part has normal"):
        tiny_trainer(config, tmp_path, tiny_data(config, table))


def known_shares(**keys) -> np.ndarray:
    """Share of the clips in which each scalar stays, and in which all stay or all go."""
    config = FiLMConfig(**keys)
    config.check("models.ast_film", 2)
    embeddings = MetadataEmbeddings(config, [1.0] * 5, [1.0] * 8).train()
    n = 4000
    rows = torch.zeros(n, dtype=torch.int64)
    metadata = Metadata(rows, rows, torch.ones(n, 3), torch.ones(n, 5, dtype=torch.bool))
    torch.manual_seed(0)
    rest = embeddings(metadata)["rest"]  # 1 where it stays
    return np.append(rest.mean(0).numpy(), (rest.mean(1) * (1 - rest.mean(1)) == 0).float().mean())


def test_dropout_by_field_and_joint():
    assert FIELDS[2:] == ("age", "bmi", "duration")
    shares = known_shares(metadata_dropout=0.1, metadata_dropout_fields={"age": 0.6, "bmi": 0.0})
    assert shares[:3] == pytest.approx([0.4, 1.0, 0.9], abs=0.03)
    shares = known_shares(metadata_dropout_joint=0.3)
    assert shares == pytest.approx([0.7, 0.7, 0.7, 1.0], abs=0.03)
    with pytest.raises(UserError, match="weight is not in metadata_fields"):
        known_shares(metadata_dropout_fields={"weight": 0.1})


def test_settings_that_contradict_are_refused():
    for keys, match in (
        ({"training.balance": ["sex"]}, "each must be one of device"),
        ({"training.balance_bounds": [2.0, 3.0]}, "weights have mean 1"),
        ({"training.selection": "fixed", "training.selection_groups": ["site"]}, "chooses nothing"),
        ({"dataset.test_device": "Meditron"}, "goes with dataset.split_strategy"),
        ({"dataset.split_strategy": "leave_device_out"}, "goes with dataset.split_strategy"),
    ):
        with pytest.raises(UserError, match=match):
            tiny_config("ast", **keys)
