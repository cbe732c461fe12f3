"""Every configuration key does something: a second value changes what a run reads, builds or does.

For each leaf key there is a second value and a probe; the probe's result under that value must
differ from the one under the default. The few keys that no probe can show name the test that does.
"""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch

from data.corpora import registry
from data.splits import split_cycles
from models.registry import METHODS, VARIANTS
from tests.utils.tiny import LIVELY, cycle_table, tiny_config, tiny_data, tiny_trainer
from utils.common.errors import UserError
from utils.config.schema import RunConfig, config_to_dict, flatten
from utils.runs.run import Run
from utils.training import assemble
from utils.training.assemble import build_data
from utils.training.device import Runtime
from utils.training.runfolder import RunFolder

ROOT = Path(__file__).resolve().parents[2]


def digest(*values) -> str:
    sha = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            value = value.detach().contiguous().numpy()
        sha.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return sha.hexdigest()


def trained(config: RunConfig, folder: Path) -> str:
    """Weights, figures and checkpoint of a short training on sounds in memory."""
    torch.manual_seed(0)
    trainer = tiny_trainer(config, folder / "run")
    progress = trainer.fit()
    history = [
        {k: v for k, v in row.items() if k != "train_clips_per_s"} for row in progress.history
    ]
    weights = trainer.model.state_dict()
    return digest(history, progress.thresholds, *weights, *weights.values())


def read(config: RunConfig, folder: Path) -> str:
    """Rows of each part and the sounds of a few cycles."""
    data = build_data(config)
    batch = data.batch(data.split.train[:4])
    return digest(data.split.train, data.split.val, data.split.test, batch.waveform, data.label)


def divided(config: RunConfig, folder: Path) -> str:
    """Validation rows among so many patients that more than one choice is balanced."""
    dataset = config.dataset
    table = cycle_table(400).astype({"PID": int})
    split = split_cycles(table, val_fraction=0.2, val_seed=dataset.val_seed)
    return digest(split.val)


def opened(config: RunConfig, folder: Path) -> str:
    """What the readers of tables and sounds are asked for."""
    read = Mock(return_value=cycle_table())
    corpus = registry.CORPORA[config.dataset.name]._replace(read=read)
    with (
        patch.dict(registry.CORPORA, {config.dataset.name: corpus}),
        patch.object(registry, "write_metadata") as written,
        patch.object(assemble, "open_store", side_effect=Asked) as sounds,
        pytest.raises(Asked),
    ):
        build_data(config)
    on_bad = "report" in read.call_args.kwargs  # else the first problem raises
    paths = [call.args[1] for call in written.call_args_list]
    return digest(paths, on_bad, sorted(sounds.call_args.kwargs.items()))


class Asked(Exception):
    """The store was asked for; none is built."""


def built(config: RunConfig, folder: Path) -> str:
    """Which weights are asked for, and how the backbone goes about memory."""
    with patch("models.build.read_weights", return_value=None) as weights:
        model = assemble.build_model(config, tiny_data(config).statistics)
    return digest(weights.call_args, model.backbone.gradient_checkpointing)


def compiled(config: RunConfig, folder: Path) -> str:
    """Whether models are compiled, on a machine that could."""
    with patch.object(Runtime, "_compiler_works", return_value=True):
        return digest(Runtime("cpu", "fp32", config.training.compile).compiled)


def tracked(config: RunConfig, folder: Path) -> str:
    """What the tracker is started with."""
    run = Run(config, Runtime("cpu", "fp32", "false"))
    run.description = assemble.describe_run(config, tiny_data(config))
    with patch("utils.tracking.Tracker") as tracker, patch("utils.tracking._import_mlflow"):
        run._start_tracking()
    record = tracker.call_args.args[1]
    return digest({name: record[name] for name in ("uri", "experiment", "run_name", "tags")})


def placed(config: RunConfig, folder: Path) -> str:
    """Where a run keeps its files."""
    return digest(RunFolder.of(config).path.parent)


def refused(config: RunConfig, folder: Path) -> str:
    """For keys with one legal value on this machine: the second is refused by name."""
    raise AssertionError("a configuration with this value must not even load")


# key: (second value, probe, what else must hold for the key to matter)
KEYS: dict[str, tuple] = {
    "dataset.name": ("other", refused, {}),
    "dataset.data_folder": ("elsewhere", read, {}),
    "dataset.class_split": ("other", refused, {}),
    "dataset.split_strategy": ("random", read, {}),
    "dataset.test_fold": (1, read, {"dataset.split_strategy": "foldwise"}),
    "dataset.split_seed": (3, read, {"dataset.split_strategy": "random"}),
    "dataset.test_fraction": (0.7, read, {"dataset.split_strategy": "random"}),
    "dataset.val_fraction": (0.5, read, {}),
    "dataset.val_seed": (5, divided, {}),
    "dataset.n_cls": (2, trained, {}),
    "dataset.batch_size": (4, trained, {}),
    "dataset.h": (24, trained, {}),
    "dataset.w": (64, trained, {}),
    "audio.sample_rate": (
        8000,
        read,
        {"audio.high_freq": 4000.0, "augment.vtlp_fhi": 2000.0},
    ),
    "audio.resampler": ("soxr_hq", read, {}),
    "audio.clip_seconds": (0.7, trained, {}),
    "audio.buckets": ([0.25, 0.5], trained, {}),
    "audio.pad_type": ("zero", trained, {}),
    "audio.frame_length_ms": (25.0, trained, {}),
    "audio.frame_shift_ms": (12.0, trained, {}),
    "audio.n_mels": (16, trained, {}),
    "audio.low_freq": (50.0, trained, {}),
    "audio.high_freq": (7000.0, trained, {}),
    "audio.mean": (-4.0, trained, {}),
    "audio.std": (4.0, trained, {}),
    "audio.fit": ("pad", trained, {}),
    "audio.keep_bands": ([0, 16], trained, {}),
    "augment.enabled": (False, trained, {}),
    "augment.noise_rms": (0.1, trained, {}),
    "augment.noise_snr_db": ([0.0, 1.0], trained, {}),
    "augment.speed_range": ([0.5, 0.6], trained, {}),
    "augment.loudness_range": ([0.1, 0.2], trained, {}),
    "augment.vtlp_range": ([0.7, 0.75], trained, {}),
    "augment.vtlp_fhi": (2000.0, trained, {}),
    "augment.freq_masks": (5, trained, {}),
    "augment.freq_mask_width": (20, trained, {}),
    "augment.time_masks": (5, trained, {}),
    "augment.time_mask_width": (20, trained, {}),
    "augment.mask_value": ("mean", trained, {}),
    "backbone.embed_dim": (24, trained, {}),
    "backbone.depth": (3, trained, {}),
    "backbone.num_heads": (4, trained, {}),
    "backbone.mlp_ratio": (3.0, trained, {}),
    "backbone.patch_size": (12, trained, {}),
    "backbone.freq_stride": (8, trained, {}),
    "backbone.time_stride": (8, trained, {}),
    "backbone.trainable_blocks": (1, trained, {}),
    "backbone.bucket_positions": ("centre", trained, {"audio.buckets": [0.25, 0.5]}),
    "backbone.adapter": ("lora", trained, {}),
    "backbone.lora_rank": (2, trained, {"backbone.adapter": "lora"}),
    "backbone.lora_targets": (["q"], trained, {"backbone.adapter": "lora"}),
    "backbone.lora_scale": (1.0, trained, {"backbone.adapter": "lora"}),
    "models.*.dropout": (0.1, trained, {}),
    "models.*.activation": ("gelu", trained, {}),
    "models.*.head_hidden_dim": (32, trained, {}),
    "models.*.label_dim": (1, refused, {}),
    "models.*.input_fdim": (7, refused, {}),
    "models.*.input_tdim": (7, refused, {}),
    "models.*.dev_embed_dim": (4, trained, {}),
    "models.*.site_embed_dim": (4, trained, {}),
    "models.*.rest_dim": (4, refused, {}),
    "models.*.metadata_dropout": (0.5, trained, {}),
    "models.*.metadata_dropout_joint": (0.5, trained, {}),
    "models.*.metadata_dropout_fields": ({"age": 0.5}, trained, {}),
    "models.*.metadata_fields": (["device", "age"], trained, {}),
    "models.*.encoder_dropout": (0.0, trained, {}),
    "models.*.gate_init": (0.1, trained, {}),
    "models.*.film_hidden_dim": (32, trained, {}),
    "models.*.conditioned_layers": ([1], trained, {}),
    "models.*.mask_init_scale": (1.0, trained, {}),
    "models.*.mask_overlap_lambda": (1.0, trained, {}),
    "models.*.mask_coverage_lambda": (1.0, trained, {}),
    "models.*.per_layer_masks": (True, trained, {}),
    "models.*.mask_mode": ("softmax", trained, {}),
    "models.*.mask_temperature": (0.5, trained, {}),
    "models.*.mask_annealing": (True, trained, {"training.epochs": 8}),
    "models.*.mask_annealing_epochs": (
        8,
        trained,
        {"models.*.mask_annealing": True, "training.epochs": 8},
    ),
    "models.*.mask_lr_multiplier": (1.0, trained, {}),
    "training.epochs": (2, trained, {}),
    "training.lr": (2e-3, trained, {}),
    "training.warmup_epochs": (0.0, trained, {}),
    "training.weight_decay": (0.5, trained, {}),
    "training.sensitivity_bias": (3.0, trained, {}),
    "training.grad_clip": (0.01, trained, {}),
    "training.sam_rho": (0.5, trained, {}),
    "training.accumulation_steps": (2, trained, {}),
    "training.loss": ("focal", trained, {}),
    "training.focal_gamma": (1.0, trained, {"training.loss": "focal"}),
    "training.asymmetric_gamma_pos": (3.0, trained, {"training.loss": "asymmetric"}),
    "training.asymmetric_gamma_neg": (1.0, trained, {"training.loss": "asymmetric"}),
    "training.asymmetric_clip": (0.3, trained, {"training.loss": "asymmetric"}),
    "training.label_smoothing": (0.3, trained, {"training.loss": "ce"}),
    "training.sampler": ("balanced", trained, {}),
    "training.selection": ("fixed", trained, {}),
    "training.balance": (["site"], trained, {}),
    "training.balance_bounds": ([0.9, 1.1], trained, {"training.balance": ["site"]}),
    "training.selection_groups": (["device"], trained, {}),
    "training.thresholds": ("default", trained, {}),
    "training.min_sensitivity": (0.99, trained, {}),
    "training.early_stopping_patience": (1, trained, {"training.epochs": 8}),
    "training.seed": (1, trained, {}),
    "training.precision": ("bf16", trained, {}),
    "training.output_dir": ("elsewhere", placed, {}),
    "training.device": ("gpu", refused, {}),
    "dataset.cycle_metadata_path": ("other.csv", opened, {}),
    "dataset.cache_dir": ("elsewhere", opened, {}),
    "dataset.on_bad_recording": ("skip", opened, {}),
    "dataset.store_workers": (3, opened, {}),
    "backbone.weights": ("imagenet", built, {}),
    "backbone.weights_path": ("other.pth", built, {}),
    "backbone.gradient_checkpointing": (True, built, {}),
    "training.compile": ("true", compiled, {}),
    "mlflow.enabled": (True, tracked, {}),
    "mlflow.tracking_uri": ("http://other.example", tracked, {"mlflow.enabled": True}),
    "mlflow.experiment_name": ("other", tracked, {}),
    "mlflow.run_name": ("other", tracked, {}),
    "mlflow.tags": ({"cohort": "pilot"}, tracked, {}),
    **{
        f"methods.{key}": (value, trained, {"training.epochs": 1})
        for key, value in {
            "patchmix_cl.loss": "ce",
            "patchmix_cl.temperature": 0.5,
            "patchmix_cl.weight": 0.1,
            "patchmix_cl.beta": 0.2,
            "sg_scl.temperature": 0.5,
            "sg_scl.weight": 0.1,
            "dat.weight": 0.1,
            "time_domain.embed_dim": 32,
            "time_domain.depth": 2,
            "time_domain.num_heads": 4,
            "time_domain.conv_dim": 16,
            "dat.alpha": 0.1,
            "dat.schedule": "ganin",
            "group_dro.step_size": 1.0,
            "group_dro.strength": 0.5,
            "group_dro.adjustment": 500.0,
            "prior_product.strength": 0.5,
            "prior_product.learner": "trees",
            "prior_product.fields": ["device"],
            "prior_product.folds": 2,
            "pafa.pcsl_weight": 0.1,
            "pafa.gpal_weight": 0.1,
            "structured_patchout.freq_share": 0.5,
            "structured_patchout.time_share": 0.7,
            "add_rsc.weight": 0.1,
            "add_rsc.spectrum": "multiplied",
            "add_rsc.softshrink": 0.001,
            "add_rsc.second_filter": True,
            "add_rsc.evidence": "all",
        }.items()
    },
    **{
        f"augment.{name}_probability": (0.0, trained, {})
        for name in ("noise", "speed", "loudness", "vtlp", "specaugment")
    },
}

# key: file and name of the test that shows what it does
ELSEWHERE = {
    "training.resume": ("tests/test_scripts.py", "training.resume=never"),
    "training.checkpoint_minutes": ("tests/utils/test_resume.py", "checkpoint_minutes"),
    "training.frozen_cache": ("tests/utils/test_inputs.py", "frozen_cache"),
    "training.checkpoint_dir": ("tests/test_scripts.py", "checkpoints"),
    "mlflow.log_checkpoint": ("tests/test_scripts.py", "log_checkpoint"),
    "dataset.allow_shared_patients": ("tests/data/test_corpora.py", "allow_shared_patients"),
    "dataset.allow_overlaps": ("tests/data/test_corpora.py", "allow_overlaps"),
    "dataset.label_map": ("tests/data/test_corpora.py", "label_map"),
    "dataset.test_device": ("tests/data/test_splits.py", "test_device"),
    "dataset.full_hash": ("tests/data/test_waveforms.py", "full_hash"),
    **{
        f"fusion.{key}": ("tests/utils/test_fusion.py", key)
        for key in ("kind", "title", "members", "checkpoints")
    },
    "methods.time_domain.weights": ("tests/utils/test_time_domain.py", "time_domain.weights"),
    "backbone.patch_init": ("tests/models/test_geometry.py", "patch_init"),
    "dataset.parts": ("tests/data/test_parts.py", "parts"),
}


# sections whose defaults are too large for a test
SMALL = {
    "methods.time_domain": {"embed_dim": 16, "depth": 1, "num_heads": 2, "conv_dim": 8},
}


def all_keys() -> set[str]:
    keys = set()
    for name in VARIANTS:
        flat = flatten(config_to_dict(tiny_config(name)))
        keys |= {key.replace(f"models.{name}.", "models.*.") for key in flat}
    for name in METHODS:
        flat = flatten(config_to_dict(tiny_config("ast", **{f"methods.{name}": {}})))
        keys |= {key for key in flat if key.startswith("methods.")}
    # an empty dictionary has no leaf
    return keys | {"mlflow.tags", "dataset.label_map", "models.*.metadata_dropout_fields"}


def test_no_key_is_forgotten():
    assert all_keys() == set(KEYS) | set(ELSEWHERE)
    assert not set(KEYS) & set(ELSEWHERE)


def variant_with(key: str) -> str:
    leaf = key.rpartition(".")[2]
    if key.startswith("methods."):
        return "ast"
    variant = "ast_grf" if leaf == "gate_init" else "ast_softfilm"
    assert (
        not key.startswith("models.") or leaf in VARIANTS[variant].config_class.__dataclass_fields__
    )
    return variant


@pytest.fixture(scope="module")
def baseline() -> dict:
    """Results under the default value, shared by the keys that need the same surroundings."""
    return {}


@pytest.mark.parametrize("key", sorted(KEYS))
def test_a_second_value_matters(key, baseline, tmp_path, synthetic_corpus):
    value, probe, surroundings = KEYS[key]
    variant = variant_with(key)
    common = {**LIVELY, "training.epochs": 3, **surroundings}
    if key.startswith("methods."):
        section = key.rpartition(".")[0]
        common[section] = SMALL.get(section, {})
    if probe is read:
        common |= {
            "dataset.data_folder": str(synthetic_corpus),
            "dataset.cache_dir": str(synthetic_corpus.parent / "cache"),
            "dataset.store_workers": 1,
        }
    if probe is refused:
        with pytest.raises(UserError, match=key.rpartition(".")[2]):
            tiny_config(variant, **{**common, key: value})
        return
    if key == "dataset.data_folder":
        with pytest.raises(UserError, match="elsewhere"):
            read(tiny_config(variant, **{**common, key: value}), tmp_path)
        return
    place = (variant, probe.__name__, repr(sorted(common.items(), key=str)))
    if place not in baseline:
        baseline[place] = probe(tiny_config(variant, **common), tmp_path / "default")
        again = probe(tiny_config(variant, **common), tmp_path / "again")
        assert again == baseline[place], "the probe itself is not reproducible"
    assert (
        probe(tiny_config(variant, **{**common, key: value}), tmp_path / "new") != baseline[place]
    )


@pytest.mark.parametrize("key", sorted(ELSEWHERE))
def test_the_test_that_shows_it_is_there(key):
    file, word = ELSEWHERE[key]
    source = (ROOT / file).read_text(encoding="utf-8")
    tests = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    assert any(word in ast.get_source_segment(source, node) for node in tests), (file, word)
