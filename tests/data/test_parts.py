"""Several corpora together: roles, patients, vocabularies, refusals, one training."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data.config import PartConfig
from data.corpora.icbhi import read_cycles
from data.corpora.registry import CORPORA, read_corpus
from data.splits import split_cycles
from data.statistics import MetadataStatistics
from data.synthetic.corpus import is_synthetic
from tests.utils.tiny import step_losses, tiny_config
from utils.common.errors import UserError
from utils.config.schema import config_from_dict, config_hash, config_to_dict, load_config
from utils.training.assemble import build_data, build_split, build_trainer, describe_run
from utils.training.device import Runtime

ROOT = Path(__file__).parents[2]
SPRSOUND = ROOT.parent / "shared" / "sprsound"
RATE = 4000
LABELS = ((0, 0), (1, 0), (0, 1), (1, 1))


def sound(path, seed):
    soundfile.write(path, np.random.default_rng(seed).normal(0, 0.1, 2 * RATE), RATE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A manifest of eight patients with two devices, SPRSound of four children."""
    root = tmp_path_factory.mktemp("parts")
    own, children = root / "own", root / "children"
    own.mkdir()
    children.mkdir()
    rows = ["file,start,end,crackle,wheeze,patient,device,site"]
    for number in range(8):
        sound(own / f"{number}.wav", number)
        device = ("Eko", "Littmann")[number % 2]
        for part, (crackle, wheeze) in enumerate(LABELS):
            times = f"{part / 2},{part / 2 + 0.4}"
            rows.append(f"{number}.wav,{times},{crackle},{wheeze},{number},{device},apex")
    (own / "cycles.csv").write_text("\n".join(rows) + "\n")
    kinds = ("Normal", "Fine Crackle", "Wheeze", "Wheeze+Crackle")
    for number in range(4):
        stem = f"{number}_{number + 1}.5_0_p1_{number}"
        sound(children / f"{stem}.wav", 10 + number)
        events = [
            {"start": str(500 * i), "end": str(500 * i + 400), "type": kind}
            for i, kind in enumerate(kinds)
        ]
        (children / f"{stem}.json").write_text(json.dumps({"event_annotation": events}))
    return {"manifest": str(own / "cycles.csv"), "sprsound": str(children)}


def together(folders, *parts, **overrides):
    """Configuration of parts, each (name, role) or (name, role, further keys)."""
    listed = [
        {"name": name, "data_folder": folders[name], "role": role} | dict(*more)
        for name, role, *more in parts
    ]
    keys = {"dataset.name": "parts", "dataset.parts": listed, "dataset.store_workers": 1}
    return tiny_config(**{**keys, **overrides})


def test_roles_divide_the_parts(folders):
    config = together(
        folders,
        ("manifest", "train"),
        ("sprsound", "val"),
        ("sprsound", "test", {"label": "elsewhere"}),
    )
    table = read_corpus(config.dataset)
    split = split_cycles(table)
    assert [len(split.train), len(split.val), len(split.test)] == [32, 16, 16]
    assert table["Filename"][split.val[0]] == "sprsound:0_1.5_0_p1_0"
    assert set(table["PID"][split.train]).isdisjoint(table["PID"][split.test])
    assert table["PID"][split.train[0]] == "manifest:0"
    message = CORPORA["parts"].completeness(table).message
    assert "SEVERAL CORPORA: manifest as train, 32 cycles + sprsound as val, 16 cycles" in message
    assert "PARTIAL DATA: 16 of 9,089 SPRSound events" in message


def test_a_part_keeps_its_own_halves(folders, synthetic_corpus):
    named = {**folders, "icbhi": str(synthetic_corpus)}
    config = together(named, ("icbhi", "official"), ("sprsound", "train"))
    table = read_corpus(config.dataset)
    own = table[table["Corpus"] == "icbhi"]
    assert set(own["Split"]) == {"train", "test"}
    assert set(table["Split"][len(own) :]) == {"train"}
    split = split_cycles(table)
    assert set(split.test) == set(np.flatnonzero(own["Split"] == "test"))
    assert table["Device"].iloc[-1] == "Yunting"
    assert is_synthetic(*config.dataset.folders)
    assert not is_synthetic(*folders.values())


def test_parts_are_trained_on_together(folders, tmp_path):
    config = together(
        folders,
        *(("manifest", "train"), ("sprsound", "test")),
        **{"dataset.cache_dir": str(tmp_path), "training.epochs": 1},
    )
    data = build_data(config)
    assert data.statistics.devices == ("Eko", "Littmann")  # of the training rows alone
    assert not data.metadata.known[data.split.test, 0].any()
    for row in (0, 40):  # each cycle is its own recording's
        cycle = data.table.iloc[row]
        samples, rate = soundfile.read(cycle["Recording"])
        start, end = (int(cycle[name] * rate) for name in ("CycleStart", "CycleEnd"))
        expected = (samples - samples.mean())[start:end]
        found = data.store[row][:: 16000 // rate][: len(expected)]
        assert np.corrcoef(found[5:-5], expected[5:-5])[0, 1] > 0.99
    description = describe_run(config, data)
    assert "manifest as train" in description["partial"]
    assert "sprsound:0_1.5_0_p1_0" in description["fingerprint"]["recordings"]
    trainer = build_trainer(config, data, Runtime("cpu", "fp32", "false"))
    assert np.isfinite(step_losses(trainer)).all()
    with pytest.raises(UserError, match="several corpora, so --data-folder"):
        trainer.checkpoint(description).config_to_read("elsewhere")


def test_spectrograms_of_several_folders(tmp_path):
    parts = []
    for number, role in enumerate(("train", "test")):
        folder = tmp_path / role
        folder.mkdir()
        np.save(folder / "spectrograms.npy", np.random.default_rng(number).random((8, 32, 48)))
        rows = [f"{7 - i},{i & 1},{i >> 1 & 1},{i}" for i in range(8)]
        (folder / "manifest.csv").write_text("\n".join(["row,crackle,wheeze,patient", *rows]))
        keys = {"name": "spectrograms", "data_folder": str(folder), "label": role}
        parts.append({**keys, "role": role})
    keys = {"dataset.name": "parts", "dataset.parts": parts}
    data = build_data(tiny_config(**keys, **{"training.selection": "fixed"}))
    array = np.load(tmp_path / "test" / "spectrograms.npy")
    mean, std = data.statistics.level
    values = data.batch(np.array([0, 8])).features.numpy()
    np.testing.assert_allclose(values[1] * 2 * std + mean, array[7], atol=1e-5)
    np.save(tmp_path / "test" / "spectrograms.npy", array[:, :, :40])
    with pytest.raises(UserError, match=r"spectrograms of 32 x 48, .* of 32 x 40"):
        build_data(tiny_config(**keys))


def test_parts_survive_a_checkpoint_and_name_a_run(folders):
    one = together(folders, ("manifest", "train"), ("sprsound", "test"))
    again = config_from_dict(config_to_dict(one))
    assert again == one and isinstance(again.dataset.parts[1], PartConfig)
    assert one.dataset.data_folder == f"{folders['manifest']} + {folders['sprsound']}"
    other = together(folders, ("manifest", "test"), ("sprsound", "train"))
    assert config_hash(other) != config_hash(one)


SPECTROGRAMS = {"name": "spectrograms", "data_folder": "x", "role": "test"}


@pytest.mark.parametrize(
    ("parts", "overrides", "message"),
    [
        ([], {}, "dataset.name=parts cannot be: .* goes with a list"),
        ([("manifest", "train")], {"dataset.name": "manifest"}, "dataset.name=manifest cannot be"),
        ([("manifest", "all")], {}, r"dataset.parts\[0\].role=all .* one of train, val"),
        ([("manifest", "train", {"folder": "x"})], {}, r"unknown.*folder|folder"),
        ([("manifest", "train"), ("sprsound", "test", SPECTROGRAMS)], {}, "mixes ready-made"),
        ([("manifest", "train"), ("manifest", "test")], {}, "give each a label"),
        (
            [("manifest", "train")],
            {"dataset.split_strategy": "random"},
            "split_strategy=random cannot be: the roles",
        ),
        (
            [("manifest", "train"), ("sprsound", "val")],
            {"training.selection": "fixed"},
            "training.selection=fixed cannot be: a part with the role val",
        ),
    ],
)
def test_contradictions_are_refused(folders, parts, overrides, message):
    with pytest.raises(UserError, match=message):
        together(folders, *parts, **overrides)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([("manifest", "official")], r"parts\[0\].role=official cannot be"),
        (
            [("sprsound", "train"), ("sprsound", "test")],
            r"recording sprsound:.* in .*\[0\] and \[1\]",
        ),
    ],
)
def test_data_that_contradict_are_refused(folders, parts, message):
    with pytest.raises(UserError, match=message):
        read_corpus(together(folders, *parts).dataset)


def test_a_patient_in_two_parts_is_refused(folders, tmp_path):
    sound(tmp_path / "x.wav", 3)
    text = "file,start,end,crackle,wheeze,patient\nx.wav,0,1,0,0,7\n"
    (tmp_path / "more.csv").write_text(text)
    more = {"data_folder": str(tmp_path / "more.csv"), "label": "own"}
    parts = [("manifest", "train", {"label": "own"}), ("manifest", "test", more)]
    with pytest.raises(UserError, match="patient own:7 is in"):
        read_corpus(together(folders, *parts).dataset)
    parts[1][2]["label"] = "other"
    assert len(read_corpus(together(folders, *parts).dataset)) == 33


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/corpora/*.yaml")), ids=lambda f: f.stem)
def test_every_corpus_stacks_on_a_variant(file):
    for base in ("ast_config.yaml", "ast_film_soft_config.yaml"):
        config = load_config([ROOT / "configs" / base, file])
        assert config.dataset.name in (file.stem, "parts")


@pytest.mark.real
@pytest.mark.skipif(not SPRSOUND.is_dir(), reason="the SPRSound sample is not there")
def test_real_icbhi_and_sprsound(icbhi_root, monkeypatch):
    monkeypatch.setenv("ICBHI", str(icbhi_root / "recordings"))
    monkeypatch.setenv("SPRSOUND", str(SPRSOUND))
    config = load_config(
        [ROOT / "configs/ast_config.yaml", ROOT / "configs/corpora/icbhi_and_sprsound.yaml"]
    )
    table, split = build_split(config)
    own = read_cycles(icbhi_root / "recordings")
    assert len(table) == len(own) + 411
    assert len(split.test) == (own["Split"] == "test").sum()
    children = table["PID"].str.startswith("sprsound:").to_numpy()
    assert children[split.train].any() and not children[split.test].any()
    statistics = MetadataStatistics.fit(table.iloc[split.train])
    assert "Yunting" in statistics.devices
    assert set(statistics.sites) == set(own["AuscLoc"])  # Pl, Ll, Pr and Lr are common
