"""Fusing finished runs: the mathematics, what is refused, and a run like any other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.fusion import GatedFusion, MeanFusion
from tests.utils.tiny import random_checkpoint, tiny_config
from utils.common.errors import Preempted, UserError
from utils.config.schema import config_from_dict, config_hash
from utils.evaluation.model_report import report_on
from utils.evaluation.trained_model import TrainedModel
from utils.runs.fuse import fuse
from utils.runs.start import start
from utils.training.assemble import build_data
from utils.training.trainer import Trainer

# ---------------------------------------------------------------------- mathematics


def gated(members: int = 5, dim: int = 2, outputs: int = 4) -> GatedFusion:
    torch.manual_seed(0)
    return GatedFusion(members, dim, outputs)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(1.0, (10.785437, 2.5, 13.285437, 8.285437)), (0.0, (7.5, 2.5, 10.0, 5.0))],
)
def test_gates_follow_the_public_code(scale, expected):
    """W_i = (i - 3) I and x_i = (i, 1), worked out with MVST's code; without gates half the sum."""
    model = gated()
    with torch.no_grad():
        model.gates.copy_(scale * (torch.arange(5.0) - 2).view(5, 1, 1) * torch.eye(2))
        model.head.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, -1]]))
    x = torch.stack([torch.arange(1.0, 6), torch.ones(5)], dim=1)
    assert torch.allclose(model(x[None], None).logits[0], torch.tensor(expected), atol=1e-6)


def test_one_model_without_gate_is_a_linear_probe():
    model, x = gated(1, 8), torch.randn(3, 1, 8)
    torch.nn.init.zeros_(model.gates)
    assert torch.allclose(model(x, None).logits, model.head(x[:, 0] / 2))


def test_the_order_of_models_and_gates_does_not_matter():
    model, x, order = gated(5, 8), torch.randn(3, 5, 8), torch.tensor([3, 0, 4, 1, 2])
    before = model(x, None).logits
    with torch.no_grad():
        model.gates.copy_(model.gates[order])
    assert torch.allclose(model(x[:, order], None).logits, before, atol=1e-6)


@pytest.mark.parametrize("exclusive", [False, True])
def test_the_mean_is_of_probabilities(exclusive):
    probability = (lambda x: torch.softmax(x, -1)) if exclusive else torch.sigmoid
    x = 4 * torch.randn(6, 3, 4)
    logits = MeanFusion(3, exclusive)(x, None).logits
    assert torch.allclose(probability(logits), probability(x).mean(dim=1), atol=1e-6)


# ---------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def checkpoints(synthetic_corpus, tmp_path_factory):
    """make(name, variant, **keys) -> checkpoint of random weights on the synthetic corpus."""
    folder, known = tmp_path_factory.mktemp("members"), {}
    places = {
        "dataset.data_folder": str(synthetic_corpus),
        "dataset.cache_dir": str(synthetic_corpus.parent / "cache"),
        "dataset.store_workers": 1,
        "training.output_dir": str(folder / "runs"),
        "training.checkpoint_dir": str(folder / "checkpoints"),
    }

    def make(name, variant="ast", **keys):
        if name not in known:
            config = tiny_config(variant, **places, **keys)
            known[name] = random_checkpoint(config, build_data(config), folder / f"{name}.pt")
        return known[name]

    return make


@pytest.fixture
def views(checkpoints, monkeypatch):
    """Two patch shapes and a conditioned model; no pictures are drawn."""
    monkeypatch.setattr("utils.runs.end.draw_figures", lambda *_: None)
    wide = {"backbone.patch_size": [8, 32], "backbone.freq_stride": 8}
    return [checkpoints("square"), checkpoints("wide", **wide), checkpoints("film", "ast_film")]


def quick(tmp_path, epochs=3):
    where = f"training.output_dir={tmp_path}/runs", f"training.checkpoint_dir={tmp_path}/best"
    return [*where, f"training.epochs={epochs}", "training.device=cpu"]


def test_a_fused_run_is_a_run(views, tmp_path):
    run = fuse(views, "gated", None, quick(tmp_path))
    report = run.folder.read_report()
    assert report["title"] == "AST and FiLM-AST + gated fusion of 3"
    assert (tmp_path / "best" / "fused_best.pt").is_file() and run.folder.finished
    model = TrainedModel.open(run.folder.best)
    assert model.config.fusion.kind == "gated"
    rows = model.rows("test")
    stored = np.loadtxt(
        run.folder.predictions / "test.csv", delimiter=",", skiprows=1, usecols=0, dtype=str
    )
    assert len(stored) == len(rows)
    again, _ = report_on(model, "test")
    old = report["test"]["metrics"]["chosen"]["score"]["value"]
    assert again.metrics["chosen"]["score"].value == pytest.approx(old)
    assert again.metadata_test  # one of the fused models sees metadata
    batch = model.data.batch(rows[:4])
    heard = model.under(batch, [batch.metadata, batch.metadata.without("device")])
    assert torch.allclose(heard[0], torch.from_numpy(model.predictor(rows[:4])), atol=1e-5)
    assert not torch.allclose(heard[0], heard[1], atol=1e-5)
    with pytest.raises(UserError, match="names but does not hold, so export"):
        model.need_own_weights("export")


def test_features_belong_to_their_rows(views, tmp_path):
    model = TrainedModel.open(fuse(views, "gated", None, quick(tmp_path, 1)).folder.best)
    rows = model.rows("test")
    inputs, order = model.predictor.inputs, rows[::-1].copy()
    inputs.prepare(order)
    (batch,) = inputs.batches([rows])
    own = [TrainedModel.open(path).embeddings(rows) for path in views]
    assert np.allclose(batch.features.numpy(), np.stack(own, axis=1), atol=1e-6)


def test_the_mean_needs_no_training(views, tmp_path):
    model = TrainedModel.open(fuse(views, "mean", None, quick(tmp_path, 1)).folder.best)
    rows = model.rows("test")
    own = [torch.from_numpy(TrainedModel.open(path).predictor(rows)).sigmoid() for path in views]
    found = torch.from_numpy(model.predictor(rows)).sigmoid()
    assert torch.allclose(found, torch.stack(own).mean(dim=0), atol=1e-6)


def test_killed_and_resumed_is_the_same(views, tmp_path, monkeypatch):
    whole = fuse(views, "gated", None, quick(tmp_path / "a"))
    step, count = Trainer.step, 0

    def interrupted(trainer, parts, batches):
        nonlocal count
        count += 1
        if count == 12:
            trainer._save()
            raise Preempted
        return step(trainer, parts, batches)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(Preempted):
        fuse(views, "gated", None, quick(tmp_path / "b"))
    cut = fuse(views, "gated", None, quick(tmp_path / "b"))
    assert whole.folder.path.name == cut.folder.path.name
    one, two = (torch.load(run.folder.best)["weights"] for run in (whole, cut))
    assert all(torch.equal(one[key], two[key]) for key in one)


OTHER = {
    "other test cycles": {"dataset.split_strategy": "random"},
    "different validation patients": {"dataset.val_fraction": 0.5},
    "training.selection is": {"training.selection": "fixed"},
    "has 4 classes, the other 2": {"dataset.n_cls": 2},
    "are 16 and 32 wide": {"backbone.embed_dim": 32},
}


@pytest.mark.parametrize("message", OTHER)
def test_what_does_not_belong_together_is_refused(message, checkpoints, tmp_path):
    pair = [checkpoints("square"), checkpoints(message, **OTHER[message])]
    with pytest.raises(UserError, match=f"cannot be fused: .*{message}"):
        fuse(pair, "gated", None, quick(tmp_path))


def test_other_refusals(views, checkpoints, tmp_path):
    square = views[0]
    with pytest.raises(UserError, match="two checkpoints or more"):
        fuse([square])
    with pytest.raises(UserError, match="same file"):
        fuse([square, square])
    with pytest.raises(UserError, match=r"dataset\.val_seed=1: data, split"):
        fuse(views, overrides=["dataset.val_seed=1"])
    with pytest.raises(UserError, match=r"training\.selection=test: data, split"):
        fuse(views, overrides=["training.selection=test"])
    with pytest.raises(UserError, match="loss=ce"):
        fuse([square, checkpoints("ce", **{"training.loss": "ce"})], "mean")
    fused = fuse(views, "mean", None, quick(tmp_path, 1)).folder.best
    with pytest.raises(UserError, match="is a fusion itself"):
        fuse([square, fused])
    kept = square.read_bytes()
    try:
        square.write_bytes(kept + b"x")
        with pytest.raises(UserError, match=r"square\.pt, which is another file by now"):
            _ = TrainedModel.open(fused).members
    finally:
        square.write_bytes(kept)


def test_scripts_do_not_train_a_fusion(tmp_path):
    config = tmp_path / "fused.yaml"
    config.write_text("models: {ast: }\ndataset: {data_folder: x}\nfusion: {members: [abc]}\n")
    with pytest.raises(UserError, match=r"use python -m utils\.runs\.fuse"):
        next(start("ast", "", ["--config", str(config)]))


def test_the_name_follows_what_is_fused():
    values = {"models": {"ast": {}}, "dataset": {"data_folder": "x"}}

    def named(**fusion):
        return config_hash(config_from_dict(values | {"fusion": fusion}))

    assert named() == config_hash(config_from_dict(values))
    assert named(members=["a"], checkpoints=["here"]) == named(members=["a"], checkpoints=["there"])
    assert len({named(), named(members=["a"]), named(members=["b"])}) == 3
