"""SPRSound: file names, events, labels, splits by folder."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from data.corpora.sprsound import completeness, read_sprsound
from utils.common.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "sprsound"


def write(folder, stem, events, part="", wav=True):
    """One recording of 2 s; events: (start ms, end ms, type)."""
    where = folder / part
    where.mkdir(parents=True, exist_ok=True)
    rows = [{"start": str(a), "end": str(b), "type": kind} for a, b, kind in events]
    content = {"record_annotation": "Normal", "event_annotation": rows}
    (where / f"{stem}.json").write_text(json.dumps(content))
    if wav:
        place = folder / part.replace("json", "wav")
        place.mkdir(parents=True, exist_ok=True)
        soundfile.write(place / f"{stem}.wav", np.zeros(16000, np.float32), 8000)


def test_rows_follow_name_and_events(tmp_path):
    events = [(900, 1500, "Fine Crackle"), (0, 500, "Wheeze+Crackle"), (600, 800, "Stridor")]
    write(tmp_path, "65_0.4_1_p2_7", events)
    write(tmp_path, "66_12_0_p7_8", [(0, 100, "Normal")])
    write(tmp_path, "67_1_0_p1_9", [])
    table = read_sprsound(tmp_path)
    assert list(table["CycleStart"]) == [0, 0.6, 0.9, 0]
    assert list(zip(table["Crackles"], table["Wheezes"], strict=True)) == [
        *((1, 1), (0, 1), (1, 0), (0, 0))
    ]
    first, last = table.iloc[0], table.iloc[3]
    assert (first.PID, first.Age, first.Sex, first.AuscLoc) == (65, 0.4, "F", "Ll")
    assert (last.PID, last.Sex, last.Device) == (66, "M", "Yunting")
    assert pd.isna(last.AuscLoc)
    assert table["BMIDerived"].isna().all()


def test_split_and_part_follow_the_folder(tmp_path):
    event = [(0, 100, "Normal")]
    write(tmp_path, "1_1_0_p1_1", event, "train_classification_json")
    write(tmp_path, "2_1_0_p1_2", event, "test_classification_json/2022/inter_test_json")
    write(tmp_path, "3_1_0_p1_3", event)
    table = read_sprsound(tmp_path).set_index("PID")
    assert list(table["Split"]) == ["train", "test", ""]
    assert table["Part"][2] == "test_classification_json/2022/inter_test_json"


def test_labels_can_be_overridden(tmp_path):
    write(tmp_path, "1_1_0_p1_1", [(0, 100, "Rhonchi"), (200, 300, "Squawk")])
    with pytest.raises(UserError, match=r"Squawk.*label_map"):
        read_sprsound(tmp_path)
    table = read_sprsound(tmp_path, label_map={"Squawk": (0, 1), "Rhonchi": (0, 0)})
    assert list(table["Wheezes"]) == [0, 1]


@pytest.mark.parametrize(
    "stem, events, wav, message",
    [
        ("1_1_0_p1", [], True, "the name is not"),
        ("1_1_0_p1_1", [(5, 5, "Normal")], True, "no extent"),
        ("1_1_0_p1_1", [("x", 5, "Normal")], True, "no SPRSound annotation"),
        ("1_1_0_p1_1", [(0, 5, "Normal")], False, "has no .wav"),
    ],
)
def test_faults_are_named_or_left_out(tmp_path, stem, events, wav, message):
    write(tmp_path, stem, events, wav=wav)
    with pytest.raises(UserError, match=message):
        read_sprsound(tmp_path)
    write(tmp_path, "2_1_0_p1_2", [(0, 100, "Normal")])
    problems = []
    assert list(read_sprsound(tmp_path, report=problems.append)["PID"]) == [2]
    assert len(problems) == 1 and message in problems[0]


def test_completeness_is_judged_by_events(tmp_path):
    write(tmp_path, "1_1_0_p1_1", [(0, 100, "Normal")])
    release = pd.concat([read_sprsound(tmp_path)] * 9089)  # children without events are no rows
    assert not completeness(release).partial
    assert completeness(release[1:]).message.startswith("PARTIAL DATA: 9,088 of 9,089")


@pytest.mark.real
@pytest.mark.skipif(not SHARED.is_dir(), reason="the SPRSound sample is not there")
def test_real_folder(caplog):
    caplog.set_level("INFO")
    table = read_sprsound(SHARED)
    assert "120 recordings of 66 patients; 11 have no event" in caplog.text
    kinds = Counter()
    for path in (SHARED / "json").glob("*.json"):  # an independent count
        kinds.update(e["type"] for e in json.loads(path.read_text())["event_annotation"])
    expected = {"Normal": 320, "Fine Crackle": 72, "Wheeze": 14, "Rhonchi": 3, "Coarse Crackle": 2}
    assert kinds == expected
    assert (len(table), table["Wheezes"].sum(), table["Crackles"].sum()) == (411, 17, 74)
    assert "PARTIAL DATA: 411 of 9,089" in completeness(table).message
    rows = []
    for path in (SHARED / "json").glob("*.json"):  # every event of every file, read plainly
        patient, age, sex, place, _ = path.stem.split("_")
        for event in json.loads(path.read_text())["event_annotation"]:
            times = int(event["start"]) / 1000, int(event["end"]) / 1000
            labels = "Crackle" in event["type"], event["type"] in ("Wheeze", "Rhonchi", "Stridor")
            who = int(patient), float(age), "MF"[int(sex)], "PlLlPrLr"[2 * int(place[1]) - 2 :][:2]
            rows.append((path.stem, *times, *map(int, labels), *who))
    columns = ["Filename", "CycleStart", "CycleEnd", "Crackles", "Wheezes", "PID", "Age", "Sex"]
    found = zip(*(table[name] for name in (*columns, "AuscLoc")), strict=True)
    assert sorted(rows) == sorted(found)
