"""The loop: repeatable, indifferent to how a step is cut, never updated by what is not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data.loader import MicroBatch
from models.registry import VARIANTS
from tests.utils.tiny import (
    LIVELY,
    QUIET,
    comparable,
    cycle_table,
    differing,
    gradient_norms,
    step_losses,
    tiny_config,
    tiny_data,
    tiny_trainer,
    weights,
)
from utils.common.errors import UserError
from utils.config.schema import NOT_HASHED
from utils.metrics.score import choose_thresholds, summarise
from utils.training.signals import Signals
from utils.training.trainer import epoch_line

CLIPPED = {"training.grad_clip": 0.05}  # below the usual norm, so that the limit counts


# -------------------------------------------------------------------- determinism


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_same_seed_gives_the_same_run(variant, tmp_path):
    config = tiny_config(variant, **LIVELY | {"training.epochs": 2})
    runs = []
    for number in range(2):
        torch.manual_seed(number)  # whatever the process did before
        trainer = tiny_trainer(config, tmp_path / str(number))
        losses = step_losses(trainer)
        logits = trainer.predict(trainer.data.split.test)
        runs.append((losses, weights(trainer), logits, comparable(trainer.progress.history)))
    (losses, state, logits, history), other = runs
    assert len(losses) == 2 * trainer.steps_per_epoch
    assert losses == other[0]
    assert not differing(state, other[1])
    assert np.array_equal(logits, other[2])
    assert history == other[3]


def test_another_seed_gives_another_run(tmp_path):
    runs = [
        step_losses(tiny_trainer(tiny_config(**{"training.seed": seed}), tmp_path / str(seed)))
        for seed in (0, 1)
    ]
    assert runs[0] != runs[1]


# -------------------------------------------------------------------- the step


@pytest.mark.parametrize("variant", ["ast", "ast_softfilm"])
def test_accumulation_is_one_batch_in_parts(variant, tmp_path):
    options = QUIET | CLIPPED | {"models.*.mask_overlap_lambda": 1.0}
    if variant == "ast":
        options.pop("models.*.mask_overlap_lambda")
    runs = {}
    for parts in (1, 3):
        config = tiny_config(variant, **options, **{"training.accumulation_steps": parts})
        trainer = tiny_trainer(config, tmp_path / str(parts))
        norms = gradient_norms(trainer)
        losses = step_losses(trainer)
        runs[parts] = losses, weights(trainer), trainer.predict(trainer.data.split.test), norms
    assert runs[1][0] == pytest.approx(runs[3][0], abs=1e-5)
    np.testing.assert_allclose(runs[1][3], runs[3][3], rtol=1e-3)
    for name, value in runs[1][1].items():
        torch.testing.assert_close(value, runs[3][1][name], atol=2e-5, rtol=1e-4, msg=name)
    np.testing.assert_allclose(runs[1][2], runs[3][2], atol=1e-4)


class Questions(TorchDispatchMode):
    """Notes every operation whose result the host must wait for: it decides by a value."""

    WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "bincount")

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            index is not None and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], list | tuple) else ())
        )
        if name in self.WAIT or by_mask:
            self.asked.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_step_never_waits_for_the_device(variant, tmp_path):
    """From the spectrogram to the flags; the front end plans its augmentation on the CPU."""
    options = {} if variant == "ast" else {"models.*.metadata_dropout": 0.2}
    trainer = tiny_trainer(tiny_config(variant, **options), tmp_path)
    batch = trainer.data.batch(trainer.rows[:8])
    spectrogram = trainer.inputs(batch, 1)
    trainer.inputs.views = lambda *_: spectrogram
    trainer.model.train()
    signals = Signals(trainer.runtime.device, 1, 1e9)
    with Questions() as questions:
        nonfinite = trainer.step([MicroBatch(trainer.rows[:8], 1 / 8, 0)], iter([batch]))
        signals.post(nonfinite, batch.cycle)
    assert questions.asked == []
    with questions:  # it does see them
        assert not bool(nonfinite)
        batch.length[batch.label[:, 0] > 0]
    assert len(questions.asked) == 2


def test_one_step_is_adamw_on_the_mean_loss(tmp_path):
    """The loop against a step written out with torch's own pieces."""
    config = tiny_config(**QUIET | CLIPPED | {"models.*.mask_overlap_lambda": 1.0})
    trainer = tiny_trainer(config, tmp_path / "a")
    by_hand = tiny_trainer(config, tmp_path / "b")
    rows = trainer.rows[:8]
    model = by_hand.model.train()
    batch = by_hand.data.batch(rows)
    output = model(by_hand.inputs(batch, None), batch.metadata)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        output.logits, batch.label, pos_weight=by_hand.pos_weight
    )
    (loss + output.regularisation).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    masks = {id(p) for p in model.conditioner.masks.parameters()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if id(p) not in masks]},
            {"params": model.conditioner.masks.logits, "lr": 1e-2, "weight_decay": 0.0},
        ],
        lr=1e-3,
        weight_decay=0.01,
        foreach=False,
    )
    for group in optimizer.param_groups:  # the first of three warm-up steps
        group["lr"] /= trainer.steps_per_epoch
    optimizer.step()

    trainer.model.train()
    flag = trainer.step([MicroBatch(rows, 1 / 8, 0)], trainer.inputs.batches([rows]))
    assert not flag
    for name, value in model.state_dict().items():
        found = trainer.model.state_dict()[name]
        torch.testing.assert_close(found, value, atol=1e-6, rtol=1e-4, msg=name)


def test_an_infinite_gradient_updates_nothing_and_stops_the_run_by_name(tmp_path):
    config = tiny_config(**{"augment.enabled": False})
    trainer = tiny_trainer(config, tmp_path)
    bad = int(trainer.rows[5])
    seen, step = [], trainer.step
    trainer.data.label[bad, 0] = float("nan")
    before = None

    def watched(parts, batches):
        nonlocal before
        rows = [row for part in parts for row in part.rows.tolist()]
        state, moments = weights(trainer), moments_of(trainer)
        flag = step(parts, batches)
        if bad in rows:
            assert flag == 1
            before = rows
            assert not differing(state, weights(trainer))
            assert all(torch.equal(a, b) for a, b in zip(moments, moments_of(trainer), strict=True))
        seen.append(rows)
        return flag

    trainer.step = watched
    with pytest.raises(UserError) as error:
        trainer.fit()
    assert before is not None
    assert len(seen) <= seen.index(before) + 2  # at most one step later
    table = trainer.data.table
    for row in before:
        assert f"{table['Filename'][row]}#{table['CycleIndex'][row]}" in str(error.value)
    assert "training.lr" in str(error.value)
    assert not any(trainer.checkpointer.folder.path.glob("**/*.pt"))


def moments_of(trainer) -> list[torch.Tensor]:
    states = trainer.optimizer.state.values()
    return [value.clone() for state in states for value in state.values()]


def test_a_checkpoint_never_holds_a_step_that_was_not_finite(tmp_path):
    """The flag of the step under way is read before a checkpoint is written."""
    config = tiny_config(**{"augment.enabled": False, "training.checkpoint_minutes": 1e-9})
    trainer = tiny_trainer(config, tmp_path)
    order = []
    save, step = trainer.checkpointer.save, trainer.step

    def recorded_step(parts, batches):
        flag = step(parts, batches)
        order.append("step")
        return torch.ones(()) if order.count("step") == 2 else flag

    trainer.step = recorded_step
    trainer.checkpointer.save = lambda t: (order.append("save"), save(t))
    with pytest.raises(UserError, match="not finite"):
        trainer.fit()
    assert order == ["step", "step"]


# -------------------------------------------------------------------- the epoch


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e38])
@pytest.mark.parametrize("part", ["head", "backbone.patch_embed", "backbone.norm"])
def test_no_metric_of_logits_that_are_not_finite(part, value, tmp_path):
    trainer = tiny_trainer(tiny_config("ast", **QUIET), tmp_path)
    trainer.progress.epoch = 2
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if name.startswith(part):
                weight.fill_(value)
    if part != "head" and value == -1e38:  # finite weights may overflow on the way, or not
        trainer.model.head[-1].weight.data.fill_(3e38)
    with pytest.raises(UserError, match=r"after epoch 3 the logits of \d+ of 12 evaluated cycles"):
        trainer.predict(trainer.data.split.test, with_loss=True)


def test_the_history_is_what_the_predictions_say(tmp_path):
    config = tiny_config("ast_film", **LIVELY)
    trainer = tiny_trainer(config, tmp_path)
    progress = trainer.fit()
    data, rows = trainer.data, trainer.data.split.val
    logits, loss = trainer.predict(rows, with_loss=True)
    best = progress.history[progress.best_epoch]
    probability, label = 1 / (1 + np.exp(-logits.astype(float))), data.label[rows].numpy()
    assert progress.thresholds == choose_thresholds(data.task, probability, label)
    figures = summarise(data.task, probability, label, progress.thresholds)
    for key, value in figures.items():
        assert best[f"val_{key}"] == pytest.approx(value, nan_ok=True)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.from_numpy(logits), data.label[rows], pos_weight=trainer.pos_weight
    )
    assert loss == pytest.approx(best["val_loss"]) == pytest.approx(expected.item(), rel=1e-5)
    scores = [row["val_score"] for row in progress.history]
    assert progress.best_epoch == int(np.argmax(scores))  # the first of the best
    assert progress.best_score == max(scores)
    assert all(isinstance(value, float) for row in progress.history for value in row.values())


@pytest.mark.parametrize("loss, rule", [("bce", (0.5, 0.5)), ("ce", ())])
def test_default_thresholds_are_not_chosen(loss, rule, tmp_path):
    keys = {"training.thresholds": "default", "training.loss": loss, "training.selection": "test"}
    trainer = tiny_trainer(tiny_config("ast", **keys), tmp_path)
    progress, data = trainer.fit(), trainer.data
    probability = data.task.probabilities(trainer.predict(data.split.test))
    figures = summarise(data.task, probability, data.label[data.split.test].numpy(), rule)
    assert progress.thresholds == rule
    assert figures["score"] == pytest.approx(progress.best_score)


def test_pos_weight_comes_from_the_training_part(tmp_path):
    trainer = tiny_trainer(tiny_config(), tmp_path)
    label = trainer.data.label[trainer.data.split.train]
    expected = 1.5 * (1 - label).sum(0) / label.sum(0)
    torch.testing.assert_close(trainer.pos_weight, expected)


def test_fixed_takes_the_last_epoch_and_never_looks(tmp_path):
    trainer = tiny_trainer(tiny_config(**{"training.selection": "fixed"}), tmp_path)
    asked, read = set(), trainer.inputs.read

    def recorded(rows):
        asked.update(rows.tolist())
        return read(rows)

    trainer.inputs.read = recorded
    progress = trainer.fit()
    assert asked == set(trainer.data.split.train.tolist())
    assert progress.best_epoch == 2
    assert progress.thresholds == (0.5, 0.5)
    assert math.isnan(progress.best_score)


@pytest.mark.parametrize("selection", ["validation", "fixed"])
def test_training_never_reads_the_test_half(selection, tmp_path):
    config = tiny_config(**{"training.selection": selection})
    plain = tiny_trainer(config, tmp_path / "a")
    plain.fit()
    data = tiny_data(config)
    test = data.split.test
    data.label[test] = 1 - data.label[test]
    for row in test:
        data.store.clips[row] = np.full_like(data.store.clips[row], np.nan)
    blind = tiny_trainer(config, tmp_path / "b", data)
    blind.fit()
    assert not differing(weights(plain), weights(blind))
    assert comparable(plain.progress.history) == comparable(blind.progress.history)
    assert plain.progress.thresholds == blind.progress.thresholds


def test_selection_on_test_is_named_so(tmp_path):
    trainer = tiny_trainer(tiny_config(**{"training.selection": "test"}), tmp_path)
    row = trainer.fit().history[0]
    assert "test_selection_score" in row
    assert not any(key.startswith("val_") for key in row)
    assert "TEST" in epoch_line(row, 3, True)


def test_early_stopping_counts_epochs_without_a_better_score(tmp_path):
    config = tiny_config(**{"training.early_stopping_patience": 2, "training.epochs": 30})
    trainer = tiny_trainer(config, tmp_path)
    progress = trainer.fit()
    assert len(progress.history) == progress.best_epoch + 1 + 2 < 30


def test_the_best_weights_are_put_back(tmp_path):
    trainer = tiny_trainer(tiny_config(**{"training.epochs": 6}), tmp_path)
    states, close = [], trainer.close_epoch

    def recorded():
        row = close()
        states.append(weights(trainer))
        return row

    trainer.close_epoch = recorded
    progress = trainer.fit()
    assert progress.best_epoch < 5, "the last epoch is the best one: choose another seed"
    assert not differing(weights(trainer), states[progress.best_epoch])
    assert differing(weights(trainer), states[-1])


def test_predictions_follow_the_rows_asked_for(tmp_path):
    trainer = tiny_trainer(tiny_config(), tmp_path)
    rows = trainer.data.split.test
    logits = trainer.predict(rows)
    shuffled = np.random.default_rng(0).permutation(len(rows))
    np.testing.assert_allclose(trainer.predict(rows[shuffled]), logits[shuffled], atol=1e-6)
    np.testing.assert_allclose(trainer.predict(rows[:1]), logits[:1], atol=1e-6)
    blind = trainer.data.metadata.without("device", "site", "age", "bmi", "duration")
    index = torch.from_numpy(rows)
    with_metadata = trainer.predictor.under(rows, [trainer.data.metadata[index], blind[index]])
    np.testing.assert_array_equal(with_metadata[0], logits)
    assert not np.allclose(with_metadata[1], logits, atol=1e-6)


def test_the_epoch_lines_stand_in_columns():
    row = {"epoch": 0.0, "lr": 3e-5, "train_clips_per_s": 9.0}
    row |= {"val_sp": 50.0, "val_se": 100.0, "val_score": 75.0}
    losses = (1.1, 1.155, 0.05, 0.0, 12.3, 1234.5678, float("nan"))
    lines = [
        epoch_line(row | {"train_loss": x, "val_loss": y}, 100, x < y)
        for x, y in zip(losses, losses[::-1], strict=True)
    ]
    for word in ("val", "Sp", "Se", "Score", "lr", "clips/s"):
        assert len({line.index(f" {word}") for line in lines}) == 1, lines
    shown = [line.split()[3] for line in lines]
    assert shown == ["1.1000", "1.1550", "0.0500", "0.0000", "12.300", "1234.6", "nan"]


@pytest.mark.parametrize("value", [0, 1])
def test_a_label_that_is_always_the_same_is_refused(value, tmp_path):
    table = cycle_table()
    table["Wheezes"] = value
    config = tiny_config()
    with pytest.raises(UserError, match="same 'wheeze' label"):
        tiny_trainer(config, tmp_path, tiny_data(config, table))


def test_what_is_not_hashed_does_not_reach_the_loop(tmp_path):
    """Keys that a resumed run may change must not change what comes out."""
    assert "checkpoint_minutes" in NOT_HASHED["training"]
    runs = [
        step_losses(
            tiny_trainer(
                tiny_config(**{"training.checkpoint_minutes": minutes}), tmp_path / str(minutes)
            )
        )
        for minutes in (1e-9, 10.0)
    ]
    assert runs[0] == runs[1]
