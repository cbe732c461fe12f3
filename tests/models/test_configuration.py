"""Configuration of the variants: every key reaches the model, what cannot work is refused."""

from __future__ import annotations

import pytest
import torch

from models.config import resolve_layers
from utils.common.errors import UserError

#: Dropouts of head (2), GRF's projection, factor encoders (1 each), scalar encoder (1 each, 1)
DROPOUTS = {"ast": 2, "ast_grf": 2 + 1, "ast_film": 2 + 1 + 4, "ast_tafilm": 7, "ast_softfilm": 5}


@pytest.mark.parametrize("variant", DROPOUTS)
def test_dropout_and_activation_are_the_same_everywhere(variant, make_model):
    for config, p, kind in (
        ({}, 0.4, "ReLU"),
        ({"dropout": 0.1, "activation": "gelu"}, 0.1, "GELU"),
    ):
        model = make_model(variant, config)
        rates = [
            m.p
            for part in (model.head, model.conditioner)
            for m in part.modules()
            if isinstance(m, torch.nn.Dropout)
        ]
        assert rates == [p] * DROPOUTS[variant]
        kinds = {
            type(m).__name__
            for part in (model.head, model.conditioner)
            for m in part.modules()
            if type(m).__module__ == "torch.nn.modules.activation"
        }
        assert kinds == {kind}


@pytest.mark.parametrize("variant", ["ast_grf", "ast_film", "ast_tafilm", "ast_softfilm"])
def test_encoder_dropout_leaves_the_head_alone(variant, make_model):
    def rates(part):
        return [m.p for m in part.modules() if isinstance(m, torch.nn.Dropout)]

    model = make_model(variant, {"encoder_dropout": 0.2})
    assert rates(model.head) == [0.4] * 2
    assert rates(model.conditioner) == [0.2] * (DROPOUTS[variant] - 2)
    same = make_model(variant, {"encoder_dropout": 0.0, "dropout": 0.3})
    assert set(rates(same.conditioner)) == {0.0}


LINEAR_HEAD = ["LayerNorm", "Dropout", "Linear"]
KEYS = [  # variant, configuration, what of the model must follow it
    ("ast", {"head_hidden_dim": 5}, lambda m: m.head[2].out_features, 5),
    ("ast", {"head_hidden_dim": 0}, lambda m: [type(x).__name__ for x in m.head], LINEAR_HEAD),
    ("ast", {"head_hidden_dim": 0}, lambda m: tuple(m.head[-1].weight.shape), (2, 48)),
    ("ast_grf", {}, lambda m: m.conditioner.gate.item(), 0.5),
    ("ast_grf", {"gate_init": 0.25}, lambda m: m.conditioner.gate.item(), 0.25),
    (
        "ast_film",
        {"dev_embed_dim": 5},
        lambda m: m.conditioner.embeddings.device.weight.shape[1],
        5,
    ),
    ("ast_film", {"site_embed_dim": 6}, lambda m: m.conditioner.embeddings.site.weight.shape[1], 6),
    ("ast_film", {"film_hidden_dim": 9}, lambda m: m.conditioner.generators.weight.shape[2], 9),
    (
        "ast_softfilm",
        {"mask_init_scale": 0.5},
        lambda m: m.conditioner.masks.logits.max().item(),
        0.5,
    ),
    (
        "ast_softfilm",
        {"mask_overlap_lambda": 3.0},
        lambda m: m.conditioner.masks.config.mask_overlap_lambda,
        3,
    ),
    (
        "ast_softfilm",
        {"mask_coverage_lambda": 4},
        lambda m: m.conditioner.masks.config.mask_coverage_lambda,
        4,
    ),
    ("ast_softfilm", {"per_layer_masks": True}, lambda m: m.conditioner.masks.logits.shape[1], 3),
    (
        "ast_softfilm",
        {"mask_temperature": 0.5},
        lambda m: m.conditioner.masks.temperature.item(),
        0.5,
    ),
    (
        "ast_softfilm",
        {"mask_lr_multiplier": 7},
        lambda m: m.parameter_groups()[-1].lr_multiplier,
        7,
    ),
]


@pytest.mark.parametrize(("variant", "config", "look", "expected"), KEYS)
def test_keys_reach_the_model(variant, config, look, expected, make_model):
    assert look(make_model(variant, config)) == expected


@pytest.mark.parametrize(
    ("variant", "config", "key"),
    [
        ("ast_softfilm", {"mask_mode": "softmax", "metadata_fields": ["age", "bmi"]}, "mask_mode"),
        ("ast_softfilm", {"site_embed_dim": 1}, "site_embed_dim"),
        ("ast_film", {"dev_embed_dim": 1, "metadata_fields": ["device"]}, "dev_embed_dim"),
    ],
)
def test_what_could_never_get_a_gradient_is_refused(variant, config, key, make_model):
    """Softmax over a single factor, LayerNorm over a single feature: constants."""
    with pytest.raises(UserError, match=key):
        make_model(variant, config)


# ---------------------------------------------------------------------- conditioned layers


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("all", tuple(range(12))),
        ("last_2", (10, 11)),
        ("last_6", tuple(range(6, 12))),
        ([11, 0], (0, 11)),
        ((3,), (3,)),
    ],
)
def test_conditioned_layers(value, expected):
    assert resolve_layers(value, 12, "models.ast_film") == expected


@pytest.mark.parametrize(
    "value", ["last", "last_13", "last_0", [], [12], [-1], [True], [1.0], ["1"], [[1]], 3, None]
)
def test_wrong_conditioned_layers_are_refused_by_name(value):
    with pytest.raises(UserError, match=r"models\.ast_film\.conditioned_layers"):
        resolve_layers(value, 12, "models.ast_film")


def test_wrong_model_settings_are_refused(make_model):
    with pytest.raises(UserError, match="activation"):
        make_model("ast", {"activation": "tanh"})
    with pytest.raises(UserError, match="rest_dim"):
        make_model("ast_film", {"rest_dim": 4})
    with pytest.raises(UserError, match="mask_mode"):
        make_model("ast_softfilm", {"mask_mode": "hard"})
    with pytest.raises(UserError, match="trainable_blocks"):
        make_model("ast", trainable_blocks=-1)
