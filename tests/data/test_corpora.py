"""From the section `dataset` to a cycle table, for every corpus but ICBHI itself."""

import json

import numpy as np
import pytest
import soundfile

from data.config import DatasetConfig
from data.corpora import CORPORA, read_corpus
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
