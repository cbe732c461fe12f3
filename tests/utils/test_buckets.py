"""Length buckets: shorter clips, and nothing else that changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.loader import batches_of, epoch_plan
from models.registry import METHODS, VARIANTS
from tests.utils.resuming import resumed_in_mid_epoch
from tests.utils.tiny import (
    BUCKETS,
    LIVELY,
    QUIET,
    random_checkpoint,
    step_losses,
    tiny_config,
    tiny_data,
    tiny_trainer,
)
from utils.common.errors import UserError
from utils.evaluation.exported import forms_of, random_case
from utils.evaluation.trained_model import TrainedModel
from utils.training.build import build_frontend, build_model
from utils.training.inputs import FrozenInputs


def test_one_bucket_is_no_bucket(tmp_path):
    keys = LIVELY | {"training.epochs": 2}
    none, one = (
        step_losses(tiny_trainer(tiny_config(**keys, **{"audio.buckets": b}), tmp_path / str(b)))
        for b in (None, [0.5])
    )
    assert none == one


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_variant_trains_on_every_length(variant, tmp_path):
    trainer = tiny_trainer(
        tiny_config(variant, **LIVELY, **BUCKETS, **{"training.epochs": 1}), tmp_path
    )
    widths = []
    embed = trainer.model.backbone.patch_embed.register_forward_hook(
        lambda module, inputs, output: widths.append(inputs[0].shape[-1])
    )
    assert all(np.isfinite(step_losses(trainer)))
    embed.remove()
    assert set(widths) == {48, 64, 80}
    assert sorted(set(trainer.data.bucket)) == [0, 1, 2]


@pytest.mark.parametrize("method", [n for n, kind in METHODS.items() if not kind.hears])
def test_every_method_trains_on_every_length(method, tmp_path):
    one_epoch = {"training.epochs": 1, f"methods.{method}": {}}
    trainer = tiny_trainer(tiny_config("ast_film", **LIVELY, **BUCKETS, **one_epoch), tmp_path)
    assert all(np.isfinite(step_losses(trainer)))


def test_a_prediction_does_not_depend_on_its_batch(tmp_path):
    config = tiny_config("ast_film", **BUCKETS)
    data = tiny_data(config)
    model = TrainedModel.open(random_checkpoint(config, data, tmp_path / "best.pt"))
    rows = np.random.default_rng(0).permutation(40)
    alone = torch.cat([model.logits(data.batch(rows[i : i + 1])) for i in range(40)])
    assert (model.logits(data.batch(rows)) - alone).abs().max() < 1e-5
    trainer = tiny_trainer(config, tmp_path, data)
    trainer.model.load_state_dict(model.model.state_dict())
    for size in (1, 7, 40):
        trainer.predictor.batch_size = size
        assert np.abs(trainer.predict(rows) - alone.numpy()).max() < 1e-5
    model.data, model.batch_size = data, 7
    first, again = (model.embeddings(some) for some in (rows, rows[:9]))
    assert np.abs(first[:9] - again).max() < 1e-5
    assert np.ptp(alone.numpy()) > 0.1, "all answers alike would prove nothing"


def test_a_mixed_step_weighs_every_cycle_alike(tmp_path):
    """The gradient of the last step, of all lengths, is that of the mean over its cycles."""
    keys = QUIET | BUCKETS | {"training.accumulation_steps": 2, "training.grad_clip": 0.0}
    trainer = tiny_trainer(tiny_config("ast_film", **keys), tmp_path)
    rows = np.array([np.flatnonzero(trainer.data.bucket == n)[k] for n, k in [(0, 0), (1, 0),
                     (2, 0), (0, 1), (0, 2)]])  # fmt: skip
    (parts,) = epoch_plan(rows, batch_size=8, bucket=trainer.data.bucket, accumulation_steps=2)
    assert len(parts) > 2
    found = []
    trainer.runtime.update = lambda *_: (
        found.append([p.grad.clone() for p in trainer.parameters]) or torch.zeros(())
    )
    trainer.step(parts, trainer.inputs.batches(part.rows for part in parts))
    trainer.model.zero_grad()
    for row in rows:
        batch = trainer.data.batch(np.array([row]))
        output = trainer.model(trainer.inputs(batch, None), batch.metadata)
        (trainer.loss(output.logits, batch.label).sum() / len(rows)).backward()
    for one, other in zip(found[0], (p.grad for p in trainer.parameters), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_resume_in_mid_epoch_is_exact(tmp_path):
    keys = LIVELY | BUCKETS | {"training.accumulation_steps": 2, "training.sampler": "balanced"}
    keys |= {"training.epochs": 2}
    resumed_in_mid_epoch(tiny_config(**keys), tmp_path, step=0)


@pytest.mark.parametrize("trainable", [0, 1])
def test_stored_features_are_the_computed_ones(trainable, tmp_path, monkeypatch):
    monkeypatch.setattr(FrozenInputs, "DTYPE", torch.float32)
    keys = QUIET | BUCKETS | {"backbone.trainable_blocks": trainable}
    keys |= {
        "dataset.cache_dir": str(tmp_path / "cache"),
        "training.epochs": 1,
        "models.*.conditioned_layers": [1],
    }
    logits = []
    for cached in (False, True, True):  # the last finds what the second stored
        config = tiny_config("ast_film", **keys, **{"training.frozen_cache": cached})
        trainer = tiny_trainer(config, tmp_path / f"run{len(logits)}")
        assert isinstance(trainer.inputs, FrozenInputs) == cached
        trainer.fit()
        logits.append(trainer.predict(np.arange(40)))
    assert np.array_equal(logits[1], logits[2])
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)


def test_clips_and_time_masks_are_that_much_shorter():
    config = tiny_config(**BUCKETS, **{"augment.specaugment_probability": 1.0})
    frontend = build_frontend(config)
    masks = []
    frontend.augmentation._hidden = lambda numbers, width, size: (
        masks.append((width, size)) or torch.zeros(len(numbers), size, dtype=torch.bool)
    )
    for samples in (100, 7680, 7681, 12000, 12800, 20000):
        wave = torch.randn(1, samples)
        mel = frontend(wave, torch.tensor([samples]), seed=0)
        seconds = frontend.clips(wave, torch.tensor([samples])).shape[1] / 16000
        expected = next(s for s in (0.48, 0.64, 0.8) if s * 16000 >= min(samples, 12800))
        assert seconds == expected and mel.shape == (1, 1, 32, round(80 * seconds / 0.8))
        assert masks[-2][0] == round(8 * seconds / 0.8)
    whole = build_frontend(tiny_config(**BUCKETS | {"audio.buckets": None}))
    wave, length = torch.randn(1, 12800), torch.tensor([12800])
    assert torch.equal(frontend(wave, length), whole(wave, length))


@pytest.mark.parametrize(("where", "first"), [("start", 0), ("centre", 1)])
def test_positions_are_cut_from_the_table(where, first):
    config = tiny_config(**BUCKETS, **{"backbone.bucket_positions": where})
    backbone = build_model(config, tiny_data(config).statistics).backbone
    own = backbone.positions(2 * 3)
    table = backbone.pos_embed[:, 2:].unflatten(1, (2, 5))
    assert torch.equal(own[:, 2:].unflatten(1, (2, 3)), table[:, :, first : first + 3])
    assert torch.equal(own[:, :2], backbone.pos_embed[:, :2])
    with pytest.raises(ValueError, match="or a smaller T"):
        backbone(torch.zeros(1, 1, 32, 81))


def test_exported_files_hear_one_length_each(tmp_path):
    config = tiny_config("ast_film", **BUCKETS)
    data = tiny_data(config)
    model = TrainedModel.open(random_checkpoint(config, data, tmp_path / "best.pt"), device="cpu")
    model.model.conditioner.finalise()
    for bucket, seconds in enumerate(config.audio.buckets):
        one = random_case(model, 3, seconds - 0.02, seed=3)
        for form in forms_of(model, bucket).values():
            with torch.no_grad():
                probability = form.module(*(one.inputs[name] for name in form.axes)).numpy()
            assert np.abs(probability - one.probability).max() < 1e-6


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"audio.buckets": [0.5, 0.25]}, "ascending, up to audio.clip_seconds=0.5"),
        ({"audio.buckets": [0.25]}, "ascending, up to audio.clip_seconds=0.5"),
        ({"audio.buckets": []}, "ascending"),
        ({"audio.buckets": [0.1, 0.5]}, "leaves 10 frames, and a patch is 16 wide"),
        ({"audio.buckets": [0.02, 0.5]}, "audio.frame_length_ms=40.0 cannot be: a clip has 20 ms"),
        ({"audio.buckets": [0.25, 0.5], "dataset.name": "spectrograms"}, "have one width"),
    ],
)
def test_buckets_that_cannot_be(keys, message):
    with pytest.raises(UserError, match=message):
        tiny_config(**keys)


def test_batches_of_keeps_every_row_once():
    rows, bucket = np.array([5, 3, 9, 1, 7]), np.array([1, 0, 1, 0, 1])
    assert [part.tolist() for part in batches_of(rows, bucket, 2)] == [[3, 1], [5, 9], [7]]
    assert batches_of(rows[:0], bucket[:0], 2) == []
