"""Ready-made spectrograms: manifest, normalisation, unpacking."""

import lzma
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data.config import read_dataset
from data.corpora.spectrograms import (
    SpectrogramStore,
    main,
    open_array,
    read_spectrograms,
    unpack,
)
from utils.common.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "icbhi_mel"


@pytest.fixture
def folder(tmp_path):
    array = np.random.default_rng(0).normal(3, 2, (6, 4, 5)).astype(np.float32)
    np.save(tmp_path / "spectrograms.npy", array)
    return tmp_path


def write(folder, text):
    (folder / "manifest.csv").write_text(text)
    return folder


def test_rows_name_places_in_the_array(folder):
    text = "row,crackle,wheeze,patient,device,duration\n5,1,0,b,X,2.5\n0,0,1,a,,\n"
    table = read_spectrograms(write(folder, text))
    assert list(table["Row"]) == [5, 0] and list(table["PID"]) == ["b", "a"]
    assert table["Duration"][0] == 2.5 and np.isnan(table["Duration"][1])
    store = SpectrogramStore.of(table)
    assert np.array_equal(store.read(np.array([0])), np.load(folder / "spectrograms.npy")[[5]])


def test_normalised_by_the_training_rows(folder):
    place = [open_array(folder)], np.zeros(6, int), np.arange(6)
    store = SpectrogramStore(*place, *SpectrogramStore(*place).level(np.array([4, 1, 2])))
    values = store.read(np.array([1, 2, 4]))
    assert values.mean() == pytest.approx(0, abs=1e-6)
    assert values.std() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(
    "rows, message",
    [
        ("6,0,0,p", "row 2: row is 6; the array has 0 to 5"),
        ("0.5,0,0,p", "row 2: row is 0.5"),
        ("x,0,0,p", "row 2: row is 'x'; a number is needed"),
        ("0,0,0,p\n0,0,0,p", "row 3: the same row"),
        ("0,0,3,p", "row 2: wheeze is '3'"),
    ],
)
def test_faulty_rows_are_refused(folder, rows, message):
    with pytest.raises(UserError, match=message):
        read_spectrograms(write(folder, "row,crackle,wheeze,patient\n" + rows + "\n"))


@pytest.mark.parametrize("content", [b"", b"no array", None])
def test_damaged_arrays_are_refused(folder, content):
    path = folder / "spectrograms.npy"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=r"spectrograms\.npy cannot be read"):
        open_array(folder)


def test_constant_training_rows_are_refused(tmp_path):
    np.save(tmp_path / "spectrograms.npy", np.ones((3, 2, 2)))
    store = SpectrogramStore([open_array(tmp_path)], np.zeros(3, int), np.arange(3))
    with pytest.raises(UserError, match="constant"):
        store.level(np.arange(3))


def index(n):
    return pd.DataFrame(
        {
            "recording": [f"r{i // 2}" for i in range(n)][::-1],
            "cycle_index": [i % 2 for i in range(n)],
            "split_official": "train",
            "crackles": 0,
            "wheezes": 1,
            "start": 1.0,
            "end": np.arange(n) + 1.5,
            "patient": 7,
            "bmi": np.nan,
            "child_weight": 20.0,
            "child_height": 100.0,
        }
    )


def test_packed_folders_are_unpacked(tmp_path):
    source, array = tmp_path / "in", np.arange(4 * 2 * 3, dtype=np.uint8).reshape(4, 2, 3)
    source.mkdir()
    with lzma.open(source / "x.npy.xz", "wb") as file:
        np.save(file, array)
    index(4).to_csv(source / "index.csv", index=False)
    out = tmp_path / "out"
    assert main(["--from", str(source), "--output", str(out)]) == 0
    dataset = read_dataset(out / "corpus.yaml")
    assert (dataset.name, dataset.data_folder, dataset.h, dataset.w) == (
        *("spectrograms", str(out)),
        *(2, 3),
    )
    table = read_spectrograms(out)
    assert np.array_equal(open_array(out), array)
    assert list(table["Row"]) == [2, 3, 0, 1]  # sorted by recording, then cycle
    assert list(table["Duration"]) == [2.5, 3.5, 0.5, 1.5]
    assert table["BMIDerived"].eq(20.0).all()
    (source / "x.npy.xz").write_bytes((source / "x.npy.xz").read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged"):
        unpack(source, tmp_path / "again")


@pytest.mark.real
@pytest.mark.skipif(not SHARED.is_dir(), reason="the published log-mel spectrograms are not there")
def test_published_spectrograms_hold_all_of_icbhi(tmp_path):
    table = read_spectrograms(unpack(SHARED, tmp_path), allow_shared_patients=True)
    counts = (table["Crackles"] + 2 * table["Wheezes"]).groupby(table["Split"]).value_counts()
    assert counts["train"].sort_index().tolist() == [2063, 1215, 501, 363]
    assert counts["test"].sort_index().tolist() == [1579, 649, 385, 143]
    assert table.groupby("Split")["PID"].nunique().to_dict() == {"train": 79, "test": 49}
