"""From the section `dataset` to a cycle table, for every corpus but ICBHI itself."""

import json

import numpy as np
import pytest
import soundfile

from data.config import DatasetConfig
from data.corpora.registry import CORPORA, read_corpus
from data.splits import split_cycles
from data.statistics import MetadataStatistics
from utils.common.errors import UserError


def dataset(name, folder, **keys) -> DatasetConfig:
    return DatasetConfig(name=name, data_folder=str(folder), **keys)


def test_manifest_keys_reach_the_reader(tmp_path):
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(8000, np.float32), 4000)
    path = tmp_path / "cycles.csv"
    head = "file,start,end,crackle,wheeze,patient,split\n"
    path.write_text(head + "a.wav,0,1,0,0,p,train\nb.wav,0,1,0,0,p,test\n")
    with pytest.raises(UserError, match="allow_shared_patients"):
        read_corpus(dataset("manifest", path))
    assert len(read_corpus(dataset("manifest", path, allow_shared_patients=True))) == 2
    path.write_text(head + "a.wav,0,1,0,0,p,train\na.wav,0.5,2,0,0,p,train\n")
    with pytest.raises(UserError, match="allow_overlaps"):
        read_corpus(dataset("manifest", path))
    assert len(read_corpus(dataset("manifest", path, allow_overlaps=True))) == 2


def test_sprsound_labels_reach_the_reader(tmp_path):
    event = {"start": "0", "end": "900", "type": "Stridor"}
    content = {"record_annotation": "CAS", "event_annotation": [event]}
    (tmp_path / "1_2_0_p1_3.json").write_text(json.dumps(content))
    soundfile.write(tmp_path / "1_2_0_p1_3.wav", np.zeros(8000, np.float32), 8000)
    assert read_corpus(dataset("sprsound", tmp_path))["Wheezes"].tolist() == [1]
    table = read_corpus(dataset("sprsound", tmp_path, label_map={"Stridor": [0, 0]}))
    assert table["Wheezes"].tolist() == [0]
    assert CORPORA["sprsound"].completeness(table).message.startswith("PARTIAL DATA: 1 of 9,089")


def test_recordings_are_shuffled_wherever_they_are_known(tmp_path):
    """The manifest of files and that of spectrograms with the same recordings split alike."""
    names = [f"r{number:02}" for number in range(20) for _ in range(3)]
    labels = [f"{n % 2},{n % 4 // 2},p{n // 12}" for n in range(60)]
    files, rows = (
        "file,start,end,crackle,wheeze,patient\n",
        "row,crackle,wheeze,patient,recording\n",
    )
    for number, (name, label) in enumerate(zip(names, labels, strict=True)):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(8000, np.float32), 4000)
        start = number % 3 / 2
        files += f"{name}.wav,{start},{start + 0.5},{label}\n"
        rows += f"{number},{label},{name}\n"
    (tmp_path / "cycles.csv").write_text(files)
    (tmp_path / "manifest.csv").write_text(rows)
    np.save(tmp_path / "spectrograms.npy", np.zeros((60, 3, 4), np.uint8))
    parts = []
    for name, folder in (("manifest", tmp_path / "cycles.csv"), ("spectrograms", tmp_path)):
        table = read_corpus(dataset(name, folder, split_strategy="recordings"))
        split = split_cycles(table, strategy="recordings", selection="test")
        parts.append(set(table["Filename"].iloc[split.train]))
        assert len(parts[-1]) == 12 and not parts[-1] & set(table["Filename"].iloc[split.test])
    assert parts[0] == parts[1]
    (tmp_path / "manifest.csv").write_text(rows.replace("r07", ""))
    with pytest.raises(UserError, match="the recording of every row"):
        read_corpus(dataset("spectrograms", tmp_path, split_strategy="recordings"))


def test_spectrograms_are_never_comparable(tmp_path):
    np.save(tmp_path / "spectrograms.npy", np.zeros((2, 3, 4), np.uint8))
    text = "row,crackle,wheeze,patient,device\n0,1,0,a,X\n1,0,0,b,\n"
    (tmp_path / "manifest.csv").write_text(text)
    table = read_corpus(dataset("spectrograms", tmp_path))
    assert CORPORA["spectrograms"].completeness(table).partial
    assert set(table["Recording"]) == {str(tmp_path / "spectrograms.npy")}
    statistics = MetadataStatistics.fit(table)
    assert (statistics.devices, statistics.device_counts) == (("X",), (1, 1))
    assert statistics.sites == ("unnamed",)
    level = MetadataStatistics(**{**vars(statistics), "level": (1.0, 2.0)})
    assert MetadataStatistics.from_dict(level.to_dict()) == level
