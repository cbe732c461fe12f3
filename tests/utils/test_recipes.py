"""Recipes stack on every variant, train, and the page about them names commands that resolve."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from models.registry import VARIANTS
from tests.frozen.test_frozen import type_in
from tests.utils.tiny import differing, tiny_trainer, weights, words
from utils.config.schema import config_hash, config_to_dict, flatten, load_config

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {
    "kaist": ("kaist.yaml",),
    "paper_code": ("paper_code.yaml",),
    "last_commit": ("paper_code.yaml", "last_commit.yaml"),
}
#: On top of kaist.yaml, with the file of the method that they are of.
FURTHER = {
    "add_rsc": ("add_rsc", "ADD-RSC"),
    "lora_rsc": ("lora", "LoRA"),
    "ast_sam": ("sam", "SAM"),
}
SHIPPED = [v for v in VARIANTS.values() if (ROOT / v.config_file).is_file()]


def with_recipe(recipe, variant, *overrides):
    files = [f"configs/recipes/{name}" for name in RECIPES[recipe]]
    return load_config(
        [ROOT / VARIANTS[variant].config_file, *(ROOT / f for f in files)],
        overrides,
        variant=variant,
    )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("variant", [v.name for v in SHIPPED])
def test_recipes_stack_on_every_variant(recipe, variant):
    config = with_recipe(recipe, variant)
    assert config.variant == variant and config.training.selection == "test"


@pytest.mark.parametrize("recipe", FURTHER)
@pytest.mark.parametrize("variant", ["ast", "ast_softfilm"])
def test_recipes_of_further_systems(recipe, variant):
    method, title = FURTHER[recipe]
    names = ("recipes/kaist", f"recipes/{recipe}", f"methods/{method}")
    files = [ROOT / VARIANTS[variant].config_file, *(ROOT / f"configs/{n}.yaml" for n in names)]
    config = load_config(files, variant=variant)
    assert config.title == f"{VARIANTS[variant].title} + {title}"
    assert (config.training.selection, config.training.loss) == ("test", "ce")
    plain = with_recipe("kaist", variant)
    assert config.training.epochs == {"lora_rsc": 100, "ast_sam": 20}.get(recipe, 50)
    assert config_hash(config) != config_hash(plain)


def test_kaist_is_the_recipe_of_its_papers():
    config = with_recipe("kaist", "ast_film")
    frames = 1 + (8 * 16000 - 400) // 160
    flat = flatten(config_to_dict(config))
    expected = {
        "dataset.w": frames, "dataset.batch_size": 8, "audio.clip_seconds": 8.0,
        "audio.pad_type": "tile", "audio.frame_length_ms": 25.0, "audio.low_freq": 20.0,
        "augment.specaugment_probability": 0.8413, "augment.mask_value": "mean",
        "models.ast_film.head_hidden_dim": 0, "models.ast_film.dropout": 0.0,
        "training.loss": "ce", "training.lr": 2.5e-5, "training.epochs": 50,
        "training.warmup_epochs": 0.0, "training.weight_decay": 1e-6, "training.grad_clip": 0.0,
        "training.thresholds": "default",
    }  # fmt: skip
    assert {key: flat[key] for key in expected} == expected
    assert config.task.exclusive and len(config.task.outputs) == 4
    others = ("noise", "speed", "loudness", "vtlp")
    assert not any(flat[f"augment.{name}_probability"] for name in others)


@pytest.mark.parametrize(
    ("variant", "encoders", "hidden", "activation"),
    [
        ("ast", None, 0, "relu"),
        ("ast_grf", 0.4, 64, "gelu"),
        ("ast_film", 0.2, 64, "relu"),
        ("ast_tafilm", 0.2, 64, "gelu"),
        ("ast_softfilm", 0.2, 64, "relu"),
    ],
)
def test_paper_code_differs_by_variant(variant, encoders, hidden, activation):
    model = with_recipe("paper_code", variant).model
    assert getattr(model, "encoder_dropout", None) == encoders
    assert (model.dropout, model.head_hidden_dim, model.activation) == (0.4, hidden, activation)


@pytest.mark.parametrize("recipe", ["paper_code", "last_commit"])
def test_masks_anneal_over_the_whole_run(recipe):
    config = with_recipe(recipe, "ast_softfilm")
    assert config.model.mask_annealing
    assert config.model.mask_annealing_epochs == config.training.epochs


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("variant", ["ast", "ast_softfilm"])
def test_recipes_train(recipe, variant, tmp_path):
    tiny = {"models.*.input_fdim": 32, "models.*.input_tdim": 48, "training.compile": "false"}
    tiny |= {"models.*.conditioned_layers": "all", "dataset.data_folder": "nowhere"}
    shorter = {"training.epochs": 2, "training.warmup_epochs": 0}
    config = with_recipe(recipe, variant, *words(**tiny, **shorter))
    trainer = tiny_trainer(config, tmp_path)
    start = weights(trainer)
    history = trainer.fit().history
    assert [row["epoch"] for row in history] == [0, 1]
    assert all(math.isfinite(row["train_loss"]) for row in history)
    assert "backbone.blocks.0.attn.qkv.weight" in differing(start, weights(trainer))
    assert 0 <= history[-1]["test_selection_collapsed_score"] <= 100
    assert len(trainer.progress.thresholds) == (0 if recipe == "kaist" else 2)


def commands() -> list[str]:
    """Training commands of the page about the paper, and those elsewhere that name a recipe."""
    found = []
    for page in ("reproducing.md", "methods.md"):
        text = re.sub(r"\\\n\s*", " ", (ROOT / "docs" / page).read_text("utf-8"))
        typed = re.findall(r"^python (ast_\w+\.py --config .*)$", text, flags=re.MULTILINE)
        found += [one for one in typed if page == "reproducing.md" or "recipes/" in one]
    return found


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_pages_resolve(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    typed = shlex.split(command)
    values = OmegaConf.create(type_in(*typed, "--print-config"))
    for word in (word for word in typed if "=" in word):
        key = word.partition("=")[0]
        assert OmegaConf.select(values, key) == OmegaConf.select(
            OmegaConf.from_dotlist([word]), key
        )
