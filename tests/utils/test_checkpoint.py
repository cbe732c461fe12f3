"""Checkpoints: a round trip changes nothing; anything foreign or damaged is refused in words."""

from __future__ import annotations

import copy
import math
import pickle
import struct
import zipfile
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.test_fuzz import one_gigabyte
from tests.utils.tiny import differing, tiny_config, tiny_data
from utils.common.errors import UserError
from utils.config.schema import config_to_dict
from utils.training.assemble import build_model
from utils.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_state,
    save_checkpoint,
)

COUNTS = {part: {"cycles": 24, "recordings": 6, "patients": 6} for part in ("train", "val", "test")}


@cache
def parts():
    config = tiny_config("ast_film")
    statistics = tiny_data(config).statistics
    torch.manual_seed(0)
    return build_model(config, statistics).state_dict(), config_to_dict(config), statistics


def make(**changed) -> Checkpoint:
    weights, config, statistics = parts()
    values = {
        "weights": dict(weights),
        "config": copy.deepcopy(config),
        "statistics": statistics.to_dict(),
        "thresholds": (0.4, 0.62),
        "selection": "validation",
        "epoch": 3,
        "score": 61.25,
        "layer_norm_eps": 1e-6,
        "pos_weight": (2.0, 5.5),
        "counts": COUNTS,
        "partial": "",
        "run": "a-run",
    }
    return Checkpoint(**values | changed)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    save_checkpoint(path, make())
    return path


tensors = st.builds(
    lambda shape, dtype, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(
        dtype
    ),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
    st.integers(0, 99),
)
shares = st.floats(0, 1)
NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=8)


@given(
    weights=st.dictionaries(NAMES, tensors, max_size=4),
    thresholds=st.tuples(shares, shares),
    classes=st.dictionaries(NAMES, st.integers(0), max_size=3),
    partial=st.text(max_size=20).filter(str.isprintable),
    epoch=st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_round_trip(tmp_path_factory, weights, thresholds, classes, partial, epoch):
    path = tmp_path_factory.getbasetemp() / "round.pt"
    before = make(
        weights=weights,
        thresholds=thresholds,
        counts=COUNTS | {"train": classes | COUNTS["train"]},
        partial=partial,
        epoch=epoch,
        score=float("nan"),
    )
    save_checkpoint(path, before)
    after = load_checkpoint(path)
    assert before.weights.keys() == after.weights.keys()
    for name, value in before.weights.items():
        assert value.dtype == after.weights[name].dtype
        assert torch.equal(value, after.weights[name])
    assert math.isnan(after.score)
    plain = {k: v for k, v in vars(before).items() if k not in ("weights", "score")}
    assert plain == {k: v for k, v in vars(after).items() if k not in ("weights", "score")}


def test_a_checkpoint_is_enough_to_rebuild_the_model(good):
    checkpoint = load_checkpoint(good)
    model = checkpoint.build_model()
    assert not model.training
    assert not differing(model.state_dict(), make().weights)
    assert checkpoint.run_config() == tiny_config("ast_film")
    assert checkpoint.metadata_statistics() == parts()[2]
    assert checkpoint.versions["torch"] == torch.__version__


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint .*none\.pt"):
        load_checkpoint(tmp_path / "none.pt")


def inside_of(path) -> list[int]:
    """Where the bytes of the archive's entries lie (not names and padding between them)."""
    content = path.read_bytes()
    places: list[int] = []
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            name, extra = struct.unpack_from("<HH", content, entry.header_offset + 26)
            start = entry.header_offset + 30 + name + extra
            places += range(start, start + entry.file_size)
    return places


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_bytes_are_refused_never_believed(good, data):
    content = bytearray(good.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        place = data.draw(st.sampled_from(inside_of(good)))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    path = good.with_name("damaged.pt")
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged\.pt cannot be read as a checkpoint"):
        load_checkpoint(path)


def test_one_flipped_bit_in_a_weight_is_noticed(good):
    weight = load_checkpoint(good).weights["head.2.weight"]
    content = bytearray(good.read_bytes())
    place = content.find(weight.numpy().tobytes())
    assert place > 0
    content[place + 5] ^= 16
    path = good.with_name("flipped.pt")
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"flipped\.pt cannot be read .* wrong checksum"):
        load_checkpoint(path)


class Payload:
    """What unpickling must never run."""

    def __reduce__(self):
        return (open, ("ran.txt", "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pt"
    if zipped:
        torch.save({"format": "metadata-conditioned-ast", "x": Payload()}, path)
    else:
        path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(UserError, match=r"evil\.pt cannot be read .*foreign"):
        load_checkpoint(path)
    assert not (tmp_path / "ran.txt").exists()


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], torch.zeros(3), "text"])
def test_foreign_content_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(
        UserError, match=r"other\.pt is not a model checkpoint .*; give .*_best\.pt"
    ):
        load_checkpoint(tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt is not a training state"):
        load_state(tmp_path / "other.pt")


def resave(good, path, **changed):
    content = torch.load(good, weights_only=True)
    content.update(changed)
    torch.save({k: v for k, v in content.items() if v is not None}, path)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"version": 99}, "checkpoint version 99, this code reads 1"),
        ({"weights": None}, "damaged: .*weights"),
        ({"weights": [1]}, "damaged: weights is a list"),
        ({"epoch": "three"}, "damaged: epoch is a str"),
        ({"thresholds": 0.5}, "damaged: thresholds is a float"),
        ({"surprise": 1}, "damaged: .*surprise"),
    ],
)
def test_tampered_fields_are_named(good, tmp_path, changed, words):
    resave(good, tmp_path / "changed.pt", **changed)
    with pytest.raises(UserError, match=words):
        load_checkpoint(tmp_path / "changed.pt")


def test_what_unpacks_to_more_is_refused_unread(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"0" * 10_000_000)
    with pytest.raises(UserError, match=r"bomb\.pt cannot be read .* unpacks to more"):
        load_checkpoint(path)


@pytest.mark.parametrize("place", ["run", "partial", "revision", "version of torch", "device name"])
def test_text_of_strangers_has_no_control_characters(place, good, tmp_path):
    evil, checkpoint = "\x1b]0;owned\x07\x1b[31mrun\r\x9b2J\u202e", load_checkpoint(good)
    changed = {place: evil}
    if place == "version of torch":
        changed = {"versions": {**checkpoint.versions, evil: evil}}
    if place == "device name":
        changed = {"statistics": {**checkpoint.statistics, "devices": [evil]}}
    resave(good, tmp_path / "evil.pt", **changed)
    shown = repr(vars(load_checkpoint(tmp_path / "evil.pt")))
    assert not any(c in shown for c in ("\\x1b", "\\x07", "\\r", "\\x9b", "\\u202e"))
    assert "[31mrun" in shown


def test_weights_that_do_not_fit_are_named(good):
    checkpoint = load_checkpoint(good)
    checkpoint.weights["head.2.weight"] = torch.zeros(3, 3)
    with pytest.raises(UserError, match=r"weights of a-run do not fit .*head\.2\.weight"):
        checkpoint.build_model()
    checkpoint = load_checkpoint(good)
    del checkpoint.weights["head.2.weight"]
    with pytest.raises(UserError, match=r"do not fit .*head\.2\.weight"):
        checkpoint.build_model()


@pytest.mark.parametrize(
    ("key", "value"),
    [("depth", 100), ("embed_dim", 65536), ("mlp_ratio", 64.0), ("freq_stride", 1), ("depth", 1)],
)
def test_a_configuration_of_another_size_is_refused(key, value, good):
    checkpoint = load_checkpoint(good)
    checkpoint.config["backbone"][key] = value
    with one_gigabyte(), pytest.raises(UserError, match=r"do not fit .* is expected; use another"):
        checkpoint.build_model()


def test_a_configuration_with_unknown_keys_is_refused(good, tmp_path):
    config = load_checkpoint(good).config
    config["training"]["learning_rate"] = 1.0
    resave(good, tmp_path / "changed.pt", config=config)
    with pytest.raises(UserError, match="learning_rate"):
        load_checkpoint(tmp_path / "changed.pt").run_config()
