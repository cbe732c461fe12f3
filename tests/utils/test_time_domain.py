"""The time-domain branch: wav2vec 2.0's tokens next to the transformer, in every part of a run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2Model

from data.loader import MicroBatch
from models.config import TimeDomainConfig
from models.methods import time_domain
from tests.utils.resuming import resumed_in_mid_epoch
from tests.utils.tiny import (
    LIVELY,
    differing,
    random_checkpoint,
    step_losses,
    tiny_config,
    tiny_data,
    tiny_trainer,
    weights,
)
from utils.common.errors import UserError
from utils.evaluation.trained_model import TrainedModel
from utils.export import export

SIZES = {"embed_dim": 16, "depth": 1, "num_heads": 2, "conv_dim": 8}


def hearing(variant="ast_film", **overrides):
    keys = {f"methods.time_domain.{key}": value for key, value in SIZES.items()}
    return tiny_config(variant, **{**LIVELY, **keys, "training.epochs": 2, **overrides})


@pytest.mark.parametrize("variant", ["ast", "ast_film"])
def test_it_starts_as_the_model_without_and_learns(variant, tmp_path):
    trainer = tiny_trainer(hearing(variant), tmp_path / "a")
    plain = tiny_trainer(tiny_config(variant, **LIVELY), tmp_path / "b")
    test = trainer.data.split.test
    assert np.allclose(trainer.predict(test), plain.predict(test), atol=1e-6)
    start = weights(trainer)
    rows = trainer.rows[:8]
    trainer.model.train()
    for seed in range(2):  # what lies behind the zero projection moves in step two
        trainer.step([MicroBatch(rows, 1 / 8, seed)], trainer.inputs.batches([rows]))
    own = {name for name in start if name.startswith("methods.")}
    still = own - set(differing(start, weights(trainer)))
    assert still <= {"methods.0.key.bias"}  # softmax does not see what all keys share
    losses = step_losses(tiny_trainer(hearing(variant, **{"training.epochs": 6}), tmp_path / "c"))
    assert np.isfinite(losses).all() and np.mean(losses[-4:]) < np.mean(losses[:4])


def test_it_hears_the_very_clip(tmp_path):
    """Padded and augmented once, for ear and spectrogram; other sound, another answer."""
    trainer = tiny_trainer(hearing(), tmp_path)
    rows = trainer.rows[:4]
    (batch,) = trainer.inputs.batches([rows])
    front, made, clip = trainer.inputs.frontend, [], trainer.inputs.frontend._clip
    front._clip = lambda *arguments: made.append(clip(*arguments)) or made[-1]
    one = trainer.inputs(batch, 5)
    assert len(made) == 4 and one.waveform.shape == (4, front.clip_samples[-1])
    sound = batch.waveform, batch.length, 5
    assert torch.equal(one.waveform, front.clips(*sound))
    assert torch.equal(one.values, front(*sound))
    with torch.no_grad():
        torch.nn.init.normal_(trainer.model.methods[0].out.weight)
    trainer.model.eval()
    heard = [
        trainer.model(f, batch.metadata).logits
        for f in (one, one._replace(waveform=-one.waveform.roll(1, 0)))
    ]
    assert not torch.allclose(*heard, atol=1e-4)
    with pytest.raises(ValueError, match="was given none"):
        trainer.model(one.values, batch.metadata)


def test_attention_is_the_formula():
    torch.manual_seed(0)
    method = time_domain.build(TimeDomainConfig(**SIZES), embed_dim=12)
    torch.nn.init.normal_(method.out.weight)
    special, wave = torch.randn(2, 2, 12), torch.randn(2, 5, 12)
    scores = method.query(special) @ method.key(wave).transpose(1, 2) / 12**0.5
    expected = special + method.out(scores.softmax(-1) @ method.value(wave))
    assert torch.allclose(method.attend(special, wave), expected, atol=1e-6)


def test_killed_and_resumed_is_the_same(tmp_path):
    resumed_in_mid_epoch(hearing("ast"), tmp_path)


@pytest.mark.parametrize("other", ["patchmix_cl", "sg_scl"])
def test_added_rows_hear_too(other, tmp_path):
    trainer = tiny_trainer(hearing("ast", **{f"methods.{other}": {}}), tmp_path)
    rows = trainer.rows[:8]
    trainer.model.train()
    trainer.step([MicroBatch(rows, 1 / 8, 0)], trainer.inputs.batches([rows]))
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_weights_come_from_a_folder(tmp_path):
    torch.manual_seed(1)
    source = time_domain.encoder(TimeDomainConfig(**SIZES))
    assert isinstance(source, Wav2Vec2Model)
    source.save_pretrained(tmp_path / "hub")
    config = TimeDomainConfig(**SIZES, weights=str(tmp_path / "hub"))
    found = time_domain.encoder(config).state_dict()
    assert all(torch.equal(found[key], value) for key, value in source.state_dict().items())
    config.depth = 2
    with pytest.raises(UserError, match=r"num_hidden_layers 1; set .*\.depth"):
        time_domain.encoder(config)
    config.weights = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere cannot be had"):
        time_domain.encoder(config)


def test_its_checkpoint_predicts_and_is_not_exported(tmp_path):
    """The checkpoint needs the source of the weights no more."""
    folder = tmp_path / "hub"
    time_domain.encoder(TimeDomainConfig(**SIZES)).save_pretrained(folder)
    config = hearing(**{"methods.time_domain.weights": str(folder)})
    data = tiny_data(config)
    path = random_checkpoint(config, data, tmp_path / "best.pt")
    (folder / "model.safetensors").unlink()
    model = TrainedModel.open(path, device="cpu")
    assert model.title == "FiLM-AST + time domain"
    batch = data.batch(data.split.test[:3])
    logits = model.logits(batch)
    assert torch.isfinite(logits).all()
    assert not torch.allclose(logits, model.under(batch, [batch.metadata.without("device")])[0])
    with pytest.raises(UserError, match="there is no export"):
        export(model, "torch", tmp_path / "out")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dataset.name": "spectrograms"}, r"dataset\.name=spectrograms.*hears waveforms"),
        ({"audio.sample_rate": 8000, "audio.high_freq": 4000.0}, "hears 16000 Hz"),
        ({"backbone.trainable_blocks": 1, "augment.enabled": False}, "cache holds no waveforms"),
    ],
)
def test_what_cannot_hear_is_refused(keys, message):
    with pytest.raises(UserError, match=message):
        hearing(**keys)
    if "augment.enabled" in keys:
        assert hearing(**keys, **{"training.frozen_cache": False})
