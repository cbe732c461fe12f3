"""Loading, merging and checking configurations."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from models.registry import VARIANTS
from utils.common.errors import UserError
from utils.config import table as config_table
from utils.config.schema import (
    config_from_dict,
    config_hash,
    config_to_dict,
    config_to_yaml,
    flatten,
    load_config,
)

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    "ast": "ast_config.yaml",
    "ast_grf": "ast_fus_config.yaml",
    "ast_film": "ast_film_config.yaml",
    "ast_tafilm": "ast_tafilm_config.yaml",
    "ast_softfilm": "ast_film_soft_config.yaml",
}
PAPER = {
    "training.epochs": 100,
    "training.lr": 3e-5,
    "training.warmup_epochs": 10,
    "training.weight_decay": 0.01,
    "training.sensitivity_bias": 1.5,
    "dataset.batch_size": 16,
    "dataset.h": 128,
    "dataset.w": 1024,
    "backbone.embed_dim": 768,
    "backbone.depth": 12,
}


def shipped(variant: str, *overrides: str, extra: tuple[str, ...] = ()):
    files = [ROOT / "configs" / CONFIGS[variant], *(ROOT / "configs" / name for name in extra)]
    return load_config(files, overrides, variant=variant)


@pytest.mark.parametrize("variant", CONFIGS)
def test_a_shipped_configuration_has_the_papers_settings(variant):
    config = shipped(variant)
    flat = flatten(config_to_dict(config))
    assert {key: flat[key] for key in PAPER} == PAPER
    assert config.variant == variant and config.model.dropout == 0.4
    if variant not in ("ast", "ast_grf"):
        assert list(config.model.conditioned_layers) == list(range(12))


@pytest.mark.parametrize("variant", CONFIGS)
def test_a_shipped_configuration_repeats_the_defaults(variant):
    """The dataclasses are the one source of defaults; YAML must not say something else."""
    given_values = flatten(config_to_dict(shipped(variant)))
    bare = config_from_dict({"dataset": {"data_folder": "x"}, "models": {variant: {}}})
    defaults = flatten(config_to_dict(bare))
    expected = {"dataset.data_folder", "dataset.cycle_metadata_path"}
    expected |= {f"models.{variant}.{key}" for key in ("input_fdim", "input_tdim")}
    expected |= {f"models.{variant}.conditioned_layers"}  # the list instead of "all"
    assert {k for k in defaults if defaults[k] != given_values[k]} <= expected


@pytest.mark.parametrize("variant", CONFIGS)
def test_the_small_preset_fits_every_variant(variant):
    config = shipped(variant, extra=("demo.yaml",))
    assert config.backbone.depth == 2 and config.model.input_tdim == config.dataset.w


def test_mlflow_file_holds_its_section_only(tmp_path):
    ours = ROOT / "configs" / "mlflow.yaml"
    files = [ROOT / "configs" / "ast_config.yaml"]
    assert load_config(files, mlflow_file=ours).mlflow.experiment_name == "icbhi"
    other = tmp_path / "mlflow.yaml"
    other.write_text("training: {epochs: 3}\n")
    with pytest.raises(UserError, match="'training'"):
        load_config(files, mlflow_file=other)


def test_later_files_and_overrides_win(tmp_path):
    extra = tmp_path / "extra.yaml"
    extra.write_text("training: {epochs: 30, warmup_epochs: 3}\n")
    files = [ROOT / "configs" / "ast_config.yaml", extra]
    assert load_config(files).training.epochs == 30
    assert load_config(files, ["training.epochs=7"]).training.epochs == 7
    assert load_config(files, ["dataset.n_cls=2"]).task.outputs == ("abnormal",)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.epoch=3", ["training.epoch", "did you mean training.epochs?"]),
        ("trainin.epochs=3", ["trainin", "did you mean training?"]),
        ("models.ast_film.film_hiden_dim=3", ["did you mean models.ast_film.film_hidden_dim?"]),
        ("models.*.film_hiden_dim=3", ["film_hidden_dim"]),
        ("models.ast_filn.dropout=0", ["models.ast_filn", "did you mean models.ast_film?"]),
        ("models.ast.dropout=0", ["exactly one variant"]),
        ("training.epochs=many", ["training.epochs", "many"]),
        ("training.lr=-1", ["training.lr=-1.0", "above 0"]),
        ("dataset.n_cls=3", ["dataset.n_cls=3", "one of 4, 2"]),
        ("models.ast_film.label_dim=1", ["models.ast_film.label_dim=1", "makes it 2"]),
        ("dataset.w=512", ["models.ast_film.input_tdim=1024", "dataset.w=512"]),
        ("models.ast_film.conditioned_layers=[3,12]", ["conditioned_layers", "12"]),
        ("training.warmup_epochs=101", ["training.warmup_epochs", "training.epochs=100"]),
        ("training.device=cuda", ["training.device=cuda", "cpu"]),
        ("training.precision=fp16", ["training.precision=fp16"]),
        ("training.label_smoothing=.1", ["training.label_smoothing", "ce"]),
        ("augment.speed_range=[1.1,.9]", ["augment.speed_range", "low <= high"]),
        ("augment.vtlp_range=[0,1]", ["augment.vtlp_range", "at least 0.1"]),
        ("augment.loudness_range=[0,1]", ["augment.loudness_range", "above 0"]),
        ("augment.noise_probability=1.5", ["augment.noise_probability", "at most 1"]),
        ("audio.high_freq=9000", ["audio.high_freq=9000", "half"]),
        ("backbone.num_heads=7", ["backbone.embed_dim=768", "7"]),
        ("training.selection=fixed training.early_stopping_patience=3", ["patience", "fixed"]),
        ("training.selection=fixed training.min_sensitivity=.5", ["min_sensitivity", "fixed"]),
        ("training.loss=ce dataset.n_cls=2", ["training.loss=ce", "dataset.n_cls=4"]),
        ("training.accumulation_steps=32", ["accumulation_steps", "batch_size"]),
        ("epochs", ["not an override", "key=value"]),
        ("training..lr=3", ["not an override"]),
        ("[=3", ["not an override"]),
        ("models=3", ["not an override"]),
        ("models.ast_film=3", ["models.ast_film must be a section", "3"]),
        ("models.*=3", ["models.* must be a section", "3"]),
        ("training=3", ["training must be a section", "3"]),
        ("training=[1]", ["training=[1]", "command line"]),
        ("training=", ["training must be a section"]),
        ("training.epochs=", ["training.epochs has no value"]),
        ("training.epochs=3.5", ["training.epochs=3.5", "whole number", "100"]),
        ("mlflow.enabled=maybe", ["mlflow.enabled=maybe", "true or false"]),
        ("models.ast_film.metadata_fields=age", ["metadata_fields=age", "a list"]),
        ("dataset.data_folder=${nothing}", ["dataset.data_folder", "resolved", "'nothing'"]),
        ("mlflow.tags={a:[1]}", ["mlflow.tags={a:[1]}", "quotes"]),
        ("dataset.cache_dir=''", ["dataset.cache_dir", "empty"]),
        ("training.lr=nan", ["training.lr=nan", "finite"]),
        ("training.lr=inf", ["training.lr=inf", "finite"]),
        ("augment.noise_snr_db=[nan,1]", ["augment.noise_snr_db", "finite"]),
        ("training.seed=99999999999999999999", ["training.seed", "4294967295"]),
        ("dataset.store_workers=1000000000000", ["store_workers", "at most 1024"]),
        ("training.epochs=1000000000000", ["training.epochs", "at most 1000000"]),
        ("dataset.h=1000000", ["dataset.h=1000000", "at most 4096"]),
        ("models.*.head_hidden_dim=10000000", ["head_hidden_dim=10000000", "at most 65536"]),
        ("models.*.dev_embed_dim=1", ["models.ast_film.dev_embed_dim=1", "at least 2"]),
        ("training.output_dir=~nobody_here/runs", ["training.output_dir", "home directory"]),
        ("dataset.val_fraction=1", ["dataset.val_fraction=1.0", "below 1"]),
        ("models.ast_film.dropout=1", ["models.ast_film.dropout=1.0", "below 1"]),
        ("models.ast_film.film_hidden_dim=-3", ["film_hidden_dim=-3", "at least 1"]),
        ("audio.clip_seconds=0.01", ["audio.frame_length_ms=40.0", "10 ms"]),
        ("audio.frame_shift_ms=0.01", ["audio.frame_shift_ms", "1 samples"]),
        ("audio.low_freq=8000", ["audio.high_freq=8000.0", "audio.low_freq"]),
        ("augment.vtlp_fhi=8000", ["augment.vtlp_fhi=8000.0", "half of audio.sample_rate"]),
        ("augment.speed_range=[0,2]", ["augment.speed_range", "at least 0.1"]),
        ("backbone.mlp_ratio=.001", ["backbone.mlp_ratio", "no hidden unit"]),
    ],
)
def test_a_bad_key_value_or_contradiction_is_named(override, words):
    if "cuda" in override or "fp16" in override:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has CUDA, so the value is right here")
    with pytest.raises(UserError) as error:
        shipped("ast_film", *override.split(" "))
    for word in words:
        assert word in str(error.value)


def test_files_that_are_no_configuration_are_named(tmp_path):
    with pytest.raises(UserError, match="no configuration file"):
        load_config([tmp_path / "none.yaml"])
    for content in ("- a\n- b\n", "training: [unclosed\n", "\x00"):
        broken = tmp_path / "broken.yaml"
        broken.write_text(content)
        with pytest.raises(UserError, match=r"broken\.yaml"):
            load_config([broken])


@pytest.mark.parametrize("content", ["models: 3\n", "models: {ast: 3}\n", "models: [1]\n"])
def test_a_file_whose_models_are_no_section_is_refused(tmp_path, content):
    path = tmp_path / "odd.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match="section"):
        load_config([ROOT / "configs" / "ast_config.yaml", path])


@pytest.mark.parametrize("value", ["true", "false", "auto"])
def test_compile_takes_yamls_truth_values(tmp_path, value):
    assert shipped("ast", f"training.compile={value}").training.compile == value
    path = tmp_path / "compile.yaml"
    path.write_text(f"training: {{compile: {value}}}\n")
    config = load_config([ROOT / "configs" / "ast_config.yaml", path])
    assert config.training.compile == value
    assert config_from_dict(config_to_dict(config)) == config


def test_only_files_and_the_command_line_may_refer_to_other_values(monkeypatch):
    """A checkpoint of unknown origin must not read the environment."""
    monkeypatch.setenv("A_SECRET", "12345")
    assert shipped("ast", "mlflow.run_name=${oc.env:A_SECRET}").mlflow.run_name == "12345"
    values = config_to_dict(shipped("ast"))
    values["mlflow"]["run_name"] = "${oc.env:A_SECRET}"
    with pytest.raises(UserError, match=r"mlflow\.run_name=.* plain values") as error:
        config_from_dict(values)
    assert "12345" not in str(error.value)


def test_a_script_refuses_another_variants_configuration():
    with pytest.raises(UserError, match=r"this script trains ast, but .* ast_film"):
        load_config([ROOT / "configs" / "ast_film_config.yaml"], variant="ast")


def test_tilde_is_the_home_directory_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    keys = ("dataset.data_folder", "dataset.cache_dir", "backbone.weights_path",
            "training.output_dir", "training.checkpoint_dir")  # fmt: skip
    flat = flatten(config_to_dict(shipped("ast", *(f"{key}=~/x" for key in keys))))
    assert all(flat[key] == "/home/me/x" for key in keys)
    assert flat["dataset.cycle_metadata_path"] == "/home/me/x/icbhi_metadata.csv"


@pytest.mark.parametrize("word", ["--print-config", "training.lr=0"])
def test_command_line_imports_nothing_heavy(word):
    """What is only shown or refused waits for no torch."""
    code = (
        "import runpy, sys\n"
        "sys.argv = ['ast_train.py', '--config', 'configs/ast_config.yaml', sys.argv[1]]\n"
        "try: runpy.run_path('ast_train.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code in (0, 2), end\n"
        "heavy = ('torch', 'timm', 'pandas', 'scipy', 'sklearn', 'transformers', 'mlflow')\n"
        "assert not set(heavy) & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, word], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_data_folder_must_be_set():
    with pytest.raises(UserError, match=r"dataset\.data_folder"):
        config_from_dict({"models": {"ast": {}}})


def test_wildcard_reaches_the_variants_that_have_the_key():
    values = {"dataset": {"data_folder": "x"}, "models": {"*": {"conditioned_layers": "last_2"}}}
    film = config_from_dict({**values, "models": {**values["models"], "ast_film": None}})
    assert film.model.conditioned_layers == "last_2"
    ast = config_from_dict({**values, "models": {**values["models"], "ast": None}})
    assert not hasattr(ast.model, "conditioned_layers")


def test_the_later_word_wins_between_the_wildcard_and_a_variants_name():
    assert shipped("ast_film", extra=("demo.yaml",)).model.dropout == 0.1
    named = shipped("ast_film", "models.ast_film.dropout=0.3", extra=("demo.yaml",))
    assert named.model.dropout == 0.3 and named.model.input_tdim == 128
    assert shipped("ast_film", "models.*.dropout=0.2", extra=("demo.yaml",)).model.dropout == 0.2


def test_patterns_reach_the_variants_that_they_match(tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text(
        'models: {"*": {dropout: 0.1}, "*film": {encoder_dropout: 0.2}, "*tfilm": {dropout: 0.3}}'
    )
    for variant, rates in {"ast_grf": (0.1, None), "ast_tafilm": (0.1, 0.2),
                           "ast_softfilm": (0.3, 0.2)}.items():  # fmt: skip
        model = shipped(variant, extra=(preset,)).model
        assert (model.dropout, model.encoder_dropout) == rates
    later = shipped("ast_softfilm", "models.*.dropout=0.5", extra=(preset,)).model
    assert (later.dropout, later.encoder_dropout) == (0.5, 0.2)


@pytest.mark.parametrize(
    ("pattern", "key", "message"),
    [("*flim", "dropout", r"models\.\*flim.*known here"), ("*film", "gate_init", "gate_init")],
)
def test_patterns_that_reach_nothing_are_refused(pattern, key, message):
    with pytest.raises(UserError, match=message):
        shipped("ast_film", f"models.{pattern}.{key}=0.1")


@pytest.mark.parametrize("variant", CONFIGS)
def test_round_trip_through_yaml_and_dictionary(variant):
    config = shipped(variant, "training.seed=3", "augment.noise_snr_db=[5,15]")
    again = config_from_dict(OmegaConf.to_container(OmegaConf.create(config_to_yaml(config))))
    assert again == config and config_hash(again) == config_hash(config)


def test_hash_ignores_places_and_nothing_else():
    base = shipped("ast_film")
    same = shipped(
        "ast_film",
        "training.output_dir=elsewhere",
        "training.resume=never",
        "dataset.cache_dir=elsewhere",
        "mlflow.enabled=false",
    )
    assert config_hash(same) == config_hash(base)
    for override in ("training.seed=1", "dataset.val_seed=1", "models.ast_film.dropout=.3"):
        assert config_hash(shipped("ast_film", override)) != config_hash(base)


def test_keys_that_came_later_keep_the_names_of_older_runs():
    """Hashes as they were before the keys."""
    assert config_hash(shipped("ast")) == "696fc072"
    assert config_hash(shipped("ast_softfilm")) == "d465e33e"
    for word in ("augment.mask_value=mean", "models.ast_softfilm.encoder_dropout=0.4",
                 "training.thresholds=default"):  # fmt: skip
        assert config_hash(shipped("ast_softfilm", word)) != "d465e33e"


def small(variant: str = "ast_softfilm") -> dict:
    return config_to_dict(shipped(variant, extra=("demo.yaml",)))


odd_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers() | st.floats() | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@given(key=st.sampled_from(sorted(flatten(small()))), value=odd_values)
@settings(deadline=None, max_examples=40)
def test_any_value_of_any_key_loads_or_is_refused_in_words(key, value):
    values = small()
    *sections, leaf = key.split(".")
    section = values
    for name in sections:
        section = section[name]
    section[leaf] = value
    try:
        config = config_from_dict(values)
    except UserError as error:
        assert len(str(error)) > 20
        return
    for number in flatten(config_to_dict(config)).values():
        assert not isinstance(number, float) or math.isfinite(number)
    assert config_from_dict(config_to_dict(config)) == config


@given(st.text(max_size=30) | st.builds("training.{}={}".format, st.text(max_size=8), st.text()))
@settings(deadline=None, max_examples=40)
def test_any_word_on_the_command_line_is_understood_or_refused(word):
    try:
        shipped("ast", word)
    except UserError as error:
        assert str(error)


def test_every_key_has_a_meaning_and_is_in_the_table():
    table = config_table.table()
    assert all(row.split("|")[-2].strip() for row in table.splitlines()), "a key without a comment"
    for name, variant in VARIANTS.items():
        bare = config_from_dict({"dataset": {"data_folder": "x"}, "models": {name: {}}})
        for key in flatten(config_to_dict(bare)):
            shown = key.replace(f"models.{variant.name}.", "models.<variant>.")
            if not key.startswith("mlflow.tags"):
                assert f"`{shown}`" in table
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert config_table.insert(page, table) == page, "run: python -m utils.config.table --write"


def test_table_goes_into_the_named_file(tmp_path, monkeypatch):
    page = tmp_path / "keys.md"
    monkeypatch.setattr("sys.argv", ["table", "--write", str(page)])
    page.write_text(f"before\n{config_table.BEGIN}\nold\n{config_table.END}\nafter\n")
    config_table.main()
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after") and "old" not in lines
    assert "| `training.epochs` | `100` | passes over the training cycles |" in lines
    page.write_text("no marks\n")
    with pytest.raises(UserError, match=r"keys\.md has no lines"):
        config_table.main()
