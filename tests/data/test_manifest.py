"""A folder of one's own recordings through a CSV."""

import numpy as np
import pandas as pd
import pytest
import soundfile

from data.config import read_dataset
from data.corpora.icbhi import read_cycles
from data.corpora.manifest import read_manifest, write_icbhi_manifest
from data.cycle_table import COLUMNS
from tests.utils.tiny import LIVELY, differing, step_losses, tiny_config, weights
from utils.common.errors import UserError
from utils.training.assemble import build_data, build_trainer
from utils.training.device import Runtime

HEADER = "file,start,end,crackle,wheeze,patient"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "wav").mkdir()
    for name in ("a", "b"):
        soundfile.write(tmp_path / "wav" / f"{name}.wav", np.zeros(8000, np.float32), 4000)
    return tmp_path


def write(folder, *rows, header=HEADER):
    path = folder / "cycles.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_required_columns_are_enough(folder):
    path = write(folder, "wav/b.wav,0.5,1,0,1,p2", "wav/a.wav,1,2,1,1,p1", "wav/a.wav,0,1,0,0,p1")
    table = read_manifest(path)
    assert list(table.columns) == [*COLUMNS, "Recording"]
    assert list(table["Filename"]) == ["wav/a", "wav/a", "wav/b"]
    assert list(table["CycleIndex"]) == [0, 1, 0]
    assert list(table["Crackles"] + 2 * table["Wheezes"]) == [0, 3, 2]
    assert list(table["PID"]) == ["p1", "p1", "p2"]
    assert table[["Age", "BMIDerived", "Device", "AuscLoc"]].isna().all(axis=None)
    assert table["Recording"][2] == str(folder / "wav/b.wav")


def test_optional_columns_are_read(folder):
    header = f"{HEADER},device,site,age,bmi,sex,split,recording"
    path = write(folder, "wav/a.wav,0,1,0,0,7,Eko,apex,4.5,,F,Test,r1", header=header)
    row = read_manifest(path).iloc[0]
    assert (row.PID, row.Device, row.AuscLoc, row.Age, row.Sex) == (7, "Eko", "apex", 4.5, "F")
    assert (row.Split, row.Filename) == ("test", "r1") and np.isnan(row.BMI)


@pytest.mark.parametrize(
    "rows, header, message",
    [
        (["wav/a.wav,0,1,0,0"], HEADER.rsplit(",", 1)[0], "lacks the column patient"),
        ([], HEADER, "has no rows"),
        (["wav/c.wav,0,1,0,0,p"], HEADER, "row 2: there is no file"),
        (["cycles.csv,0,1,0,0,p"], HEADER, "row 2: .* cannot be read as audio"),
        (["/wav/a.wav,0,1,0,0,p"], HEADER, "row 2: .* is an absolute path"),
        (["wav/a.wav,1,1,0,0,p"], HEADER, "row 2: the cycle runs from 1 to 1 s"),
        (["wav/a.wav,-1,1,0,0,p"], HEADER, "row 2: the cycle runs from -1 to 1 s"),
        (["wav/a.wav,0,2.5,0,0,p"], HEADER, "row 2: .* after the end of the recording"),
        (["wav/a.wav,0,nan,0,0,p"], HEADER, "row 2: end is 'nan'"),
        (["wav/a.wav,0,,0,0,p"], HEADER, "row 2: end is ''"),
        (["wav/a.wav,0,1,2,0,p"], HEADER, "row 2: crackle is '2'; write 0 or 1"),
        (["wav/a.wav,0,1,0,,p"], HEADER, "row 2: wheeze is ''; write 0 or 1"),
        (["wav/a.wav,0,1,0,0,"], HEADER, "row 2: patient is empty"),
        (["wav/a.wav,0,1,0,0,p"] * 2, HEADER, "row 3: the same cycle"),
        (["wav/a.wav,0,1,0,0,p", "wav/a.wav,0.5,2,0,0,p"], HEADER, "row 3: .* overlaps"),
        (["wav/a.wav,0,1,0,0,p", "wav/a.wav,1,2,0,0,q"], HEADER, "row 2: .* more than one patient"),
        (
            ["wav/a.wav,0,1,0,0,p,train", "wav/b.wav,0,1,0,0,p,test"],
            f"{HEADER},split",
            "patient p is in train and in test",
        ),
        (["wav/a.wav,0,1,0,0,p,999"], f"{HEADER},age", r"row 2: age is 999, outside 0\.\.130"),
        (["wav/a.wav;0;1;0;0;p"], HEADER.replace(",", ";"), "separated by semicolons"),
        (
            ["wav/a.wav,0,1,0,0,p", "wav/../wav/a.wav,0,1,1,0,q"],
            HEADER,
            "row 3: .* is the file wav/a.wav of an earlier row",
        ),
        (["wav/a.wav,0,1,0,0,p,dev"], f"{HEADER},split", "row 2: split is 'dev'"),
        (
            ["wav/a.wav,0,1,0,0,p,train", "wav/b.wav,0,1,0,0,q,"],
            f"{HEADER},split",
            "row 3: split is empty",
        ),
    ],
)
def test_faulty_rows_are_refused(folder, rows, header, message):
    with pytest.raises(UserError, match=message):
        read_manifest(write(folder, *rows, header=header))


def test_refusals_that_a_key_lifts(folder, caplog):
    path = write(folder, "wav/a.wav,0,1,0,0,p", "wav/a.wav,0.5,2,0,0,p")
    assert len(read_manifest(path, allow_overlaps=True)) == 2
    header = f"{HEADER},split"
    path = write(folder, "wav/a.wav,0,1,0,0,p,train", "wav/b.wav,0,1,0,0,p,test", header=header)
    assert len(read_manifest(path, allow_shared_patients=True)) == 2
    assert "patients in both halves: p" in caplog.text


def test_paths_may_leave_the_folder_audibly(folder, caplog):
    (folder / "table").mkdir()
    path = write(folder / "table", "../wav/a.wav,0,1,0,0,p")
    assert read_manifest(path)["Filename"][0] == "../wav/a"
    assert "lie outside its folder" in caplog.text


def test_icbhi_manifest_gives_the_same_table(synthetic_corpus, tmp_path):
    write_icbhi_manifest(synthetic_corpus, tmp_path / "m" / "icbhi.csv")
    ours, theirs = (
        read_manifest(tmp_path / "m" / "icbhi.csv", allow_shared_patients=True),
        read_cycles(synthetic_corpus),
    )
    same = [c for c in COLUMNS if c not in ("BMI", "CW", "CH", "Disease")]
    assert ours["Sex"].fillna("").tolist() == theirs["Sex"].fillna("").tolist()
    same.remove("Sex")
    pd.testing.assert_frame_equal(ours[same], theirs[same], check_dtype=False)
    assert (tmp_path / "m" / "icbhi.yaml").read_text().count("allow_shared_patients: true") == 1


def test_training_on_icbhis_manifest_is_training_on_icbhi(synthetic_corpus, tmp_path):
    yaml = write_icbhi_manifest(synthetic_corpus, tmp_path / "icbhi.csv")
    shared = {"dataset.cache_dir": str(tmp_path), "dataset.store_workers": 1, **LIVELY}
    losses, found = [], []
    for keys in ({"name": "icbhi", "data_folder": str(synthetic_corpus)}, read_dataset(yaml)):
        named = keys if isinstance(keys, dict) else vars(keys)
        dataset = {f"dataset.{k}": named[k] for k in ("name", "data_folder")}
        allowed = {"dataset.allow_shared_patients": named["name"] == "manifest"}
        config = tiny_config("ast_film", **{**shared, **dataset, **allowed, "training.epochs": 1})
        data = build_data(config)
        found.append(data)
        trainer = build_trainer(config, data, Runtime("cpu", "fp32", "false"))
        losses.append((step_losses(trainer), weights(trainer)))
    ours, theirs = found
    assert ours.store.folder == theirs.store.folder and ours.statistics == theirs.statistics
    assert losses[0][0] == losses[1][0] and not differing(losses[0][1], losses[1][1])
