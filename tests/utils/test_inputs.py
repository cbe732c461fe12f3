"""What the model is fed: log-mels, or the frozen prefix from the disk, which must be the same."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch

from tests.utils.tiny import (
    QUIET,
    comparable,
    differing,
    step_losses,
    tiny_config,
    tiny_data,
    tiny_trainer,
    weights,
)
from utils.common.errors import UserError
from utils.training.device import Runtime
from utils.training.inputs import FrozenInputs, Inputs

FROZEN = QUIET | {"backbone.depth": 3, "training.epochs": 2, "training.lr": 3e-3}
#: variant, trainable blocks, conditioned layers, shape of what is stored per clip
CASES = [
    ("ast", 0, None, (2, 16)),
    ("ast_grf", 0, None, (2, 16)),
    ("ast", 1, None, (8, 16)),
    ("ast_film", 0, [1, 2], (8, 16)),
    ("ast_softfilm", 0, [2], (2, 16)),
]


def options(tmp_path, trainable, layers, cached=True, **changed):
    conditioned = {} if layers is None else {"models.*.conditioned_layers": layers}
    return {
        **FROZEN,
        **conditioned,
        "backbone.trainable_blocks": trainable,
        "training.frozen_cache": cached,
        "dataset.cache_dir": str(tmp_path / "cache"),
        **changed,
    }


def run(tmp_path, name, variant, *arguments, **changed):
    config = tiny_config(variant, **options(tmp_path, *arguments, **changed))
    trainer = tiny_trainer(config, tmp_path / name)
    losses = step_losses(trainer)
    return trainer, losses, trainer.predict(trainer.data.split.test)


@pytest.mark.parametrize(("variant", "trainable", "layers", "shape"), CASES)
def test_cached_is_uncached(variant, trainable, layers, shape, tmp_path, monkeypatch):
    plain, losses, logits = run(tmp_path, "plain", variant, trainable, layers, False)
    assert type(plain.inputs) is Inputs
    rounded, rounded_losses, rounded_logits = run(tmp_path, "bf16", variant, trainable, layers)
    assert type(rounded.inputs) is FrozenInputs
    assert rounded.inputs.shapes[-1] == shape
    assert rounded_losses == pytest.approx(losses, abs=2e-2)
    np.testing.assert_allclose(rounded_logits, logits, atol=3e-2)

    monkeypatch.setattr(FrozenInputs, "DTYPE", torch.float32)
    exact, exact_losses, exact_logits = run(tmp_path, "fp32", variant, trainable, layers)
    assert exact_losses == losses
    assert np.array_equal(exact_logits, logits)
    assert not differing(weights(exact), weights(plain))
    assert comparable(exact.progress.history) == comparable(plain.progress.history)
    assert rounded_losses != losses, "the bf16 run did not read what was stored"


def count_prefixes(monkeypatch) -> list[int]:
    rows = []
    prefix = FrozenInputs._prefix

    def counted(self, asked):
        rows.extend(asked.tolist())
        return prefix(self, asked)

    monkeypatch.setattr(FrozenInputs, "_prefix", counted)
    return rows


def test_every_clip_is_computed_once_when_needed(tmp_path, monkeypatch):
    rows = count_prefixes(monkeypatch)
    config = tiny_config("ast", **options(tmp_path, 0, None))
    trainer = tiny_trainer(config, tmp_path / "run")
    split = trainer.data.split
    trainer.fit()
    assert sorted(rows) == sorted(split.train.tolist() + split.val.tolist())
    trainer.predict(split.test)
    assert sorted(rows) == list(range(40))
    rows.clear()
    again = tiny_trainer(config, tmp_path / "again")
    again.fit()
    again.predict(split.test)
    assert rows == []
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({"training.lr": 3e-4}, True),
        ({"models.*.head_hidden_dim": 8}, True),
        ({"training.loss": "focal"}, True),
        ({"training.seed": 1}, False),  # other weights: nothing is pretrained here
        ({"audio.mean": -4.0}, False),
        ({"audio.pad_type": "zero"}, False),
        ({"dataset.w": 64}, False),
        ({"backbone.trainable_blocks": 1}, False),
        ({"backbone.num_heads": 4}, False),
        ({"training.precision": "bf16"}, False),
    ],
)
def test_what_the_prefix_depends_on_names_the_file(changed, same, tmp_path):
    names = []
    for extra in ({}, changed):
        config = tiny_config("ast", **options(tmp_path, 0, None) | extra)
        trainer = tiny_trainer(config, tmp_path / "run")
        names.append(trainer.inputs.path.name)
    assert (names[0] == names[1]) is same


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"augment.enabled": True}, Inputs),
        ({"training.frozen_cache": False}, Inputs),
        ({"backbone.trainable_blocks": 3}, Inputs),
        ({}, FrozenInputs),
    ],
)
def test_only_what_is_the_same_every_epoch_is_stored(changed, kind, tmp_path):
    config = tiny_config("ast", **options(tmp_path, 0, None) | changed)
    assert type(tiny_trainer(config, tmp_path / "run").inputs) is kind


#: what may happen to a file
DAMAGE = {
    "deleted": None,
    "deleted and recreated": lambda content: bytes(len(content)),
    "truncated": lambda content: content[: len(content) // 3],
    "zeroed block": lambda content: content[:99] + bytes(99) + content[198:],
    "bit flip": lambda content: content[:99] + bytes([content[99] ^ 4]) + content[100:],
    "another file": lambda content: b"# not a cache\n",
}


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory):
    """A filled cache, with the losses and logits of its run."""
    folder = tmp_path_factory.mktemp("frozen")
    _, losses, logits = run(folder, "run", "ast", 0, None)
    return folder / "cache", losses, logits


@pytest.mark.parametrize("suffix", [".features", ".crc32"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_never_changes_a_number(damage, suffix, undamaged, tmp_path, caplog):
    """What is damaged is computed again, as it was, which is said once per part."""
    cache, losses, logits = undamaged
    shutil.copytree(cache, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob(f"*{suffix}")
    content = path.read_bytes()
    path.unlink()
    if DAMAGE[damage]:
        path.write_bytes(DAMAGE[damage](content))
    _, found, found_logits = run(tmp_path, "run", "ast", 0, None)
    assert found == losses
    assert np.array_equal(found_logits, logits)
    assert path.read_bytes() == content
    said = [record for record in caplog.records if "damaged" in record.message]
    assert len(said) <= 3
    assert said or suffix == ".crc32"
    caplog.clear()
    _, again, _ = run(tmp_path, "again", "ast", 0, None)
    assert again == losses
    assert "damaged" not in caplog.text


def test_a_killed_filling_goes_on_behind_its_last_part(tmp_path, monkeypatch):
    monkeypatch.setattr(FrozenInputs, "PART", 8)  # one batch
    config = tiny_config("ast", **options(tmp_path, 0, None))
    trainer = tiny_trainer(config, tmp_path / "run")
    prefix, calls = trainer.inputs._prefix, []

    def killed(rows):
        calls.append(rows.tolist())
        if len(calls) == 3:
            raise KeyboardInterrupt
        return prefix(rows)

    trainer.inputs._prefix = killed
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert np.flatnonzero(trainer.inputs._stored() >= 0).tolist() == sorted(calls[0] + calls[1])
    again = tiny_trainer(config, tmp_path / "again")
    rows = count_prefixes(monkeypatch)
    losses = step_losses(again)
    assert not set(rows) & set(calls[0] + calls[1])
    clean = tiny_config("ast", **options(tmp_path / "other", 0, None))
    assert losses == step_losses(tiny_trainer(clean, tmp_path / "clean"))


def test_a_full_disk_is_named_with_the_space(small_disk):
    config = tiny_config(
        "ast",
        **options(small_disk, 1, None, **{"backbone.embed_dim": 1024, "backbone.depth": 2}),
    )
    trainer = tiny_trainer(config, small_disk / "run")
    clips, stored = len(trainer.rows), 8 * 1024 * 2  # tokens, width, bytes
    (small_disk / "ballast").write_bytes(bytes(900_000))
    need = re.escape(f"about {clips * stored / 1e6:.1f} MB are needed")
    with pytest.raises(UserError, match=rf"disk is full: .*cache/frozen-.*\.features .*{need}"):
        trainer.fit()
    assert not trainer.inputs.table.exists()


def test_the_front_end_gets_the_batch_and_its_seed():
    class Frontend(torch.nn.Module):
        def forward(self, *arguments):
            self.arguments = arguments
            return "spectrogram"

    frontend = Frontend()
    inputs = Inputs(frontend, Runtime("cpu"), tiny_data(tiny_config()))
    (batch,) = inputs.batches([np.array([3, 1])])
    assert inputs(batch, 17) == ("spectrogram", False, None)
    waveform, length, seed = frontend.arguments
    assert waveform is batch.waveform
    assert length is batch.length
    assert seed == 17
    assert batch.cycle.tolist() == [3, 1]
