"""What a run knows of its data: every change is seen, and named."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from tests.data.sounds import tone_in_noise, write
from tests.utils.tiny import cycle_table
from utils.training.fingerprint import difference, fingerprint


@pytest.fixture
def table(tmp_path):
    """A cycle table of ten recordings of half a second."""
    table = cycle_table()
    for number, name in enumerate(table["Filename"].unique()):
        path = write(tmp_path / f"{name}.wav", tone_in_noise(0.5, 4000, number), 4000)
        table.loc[table["Filename"] == name, "Recording"] = str(path)
    return table


def edited(table, column, value):
    return table.assign(**{column: table[column].where(table.index != 5, value)})


def resampled(table):
    write(table["Recording"][5], tone_in_noise(0.5, 4000, 99), 4000)
    return table


def exchanged(table):
    """Two recordings' sound, sizes and all."""
    names = {table["Recording"][0]: table["Recording"][5]}
    names |= {other: one for one, other in names.items()}
    return table.assign(Recording=table["Recording"].replace(names))


CHANGES = {
    "age": (lambda t: edited(t, "Age", 99.0), "102_1b1_Ar_sc_Meditron differs in Age"),
    "label": (lambda t: edited(t, "Crackles", 1 - t["Crackles"][5]), "differs in Crackles"),
    "site": (lambda t: edited(t, "AuscLoc", "Tc"), "differs in AuscLoc"),
    "times": (lambda t: edited(t, "CycleEnd", 1.7), "differs in CycleEnd"),
    "sound": (resampled, "102_1b1_Ar_sc_Meditron differs in audio"),
    "sounds exchanged": (exchanged, "AKGC417L, 102_1b1_Ar_sc_Meditron differ in audio"),
    "recording gone": (lambda t: t.iloc[:-4], "is missing"),
    "cycle gone": (lambda t: t.iloc[:-1], "110_1b1_Tc_sc_Meditron differs in "),
    "recording new": (lambda t: edited(t, "Filename", "200_1b1_Al_sc_Meditron"), "200.* is new"),
    "order": (lambda t: pd.concat([t.iloc[4:], t.iloc[:4]]), "the order of the cycles"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("full", [False, True])
def test_a_change_is_named(kind, full, table):
    change, words = CHANGES[kind]
    before = fingerprint(table, full)
    assert difference(before, fingerprint(table.copy(), full)) == ""
    said = difference(before, fingerprint(change(table), full))
    assert re.search(words, said), said


def test_places_and_rounding_are_no_change(table, tmp_path):
    before = fingerprint(table)
    (tmp_path / "moved").mkdir()
    for path in table["Recording"].unique():
        name = path.rpartition("/")[2]
        (tmp_path / "moved" / name).write_bytes((tmp_path / name).read_bytes())
    moved = table["Recording"].str.replace(str(tmp_path), str(tmp_path / "moved"), regex=False)
    now = table.assign(Recording=moved, Age=table["Age"] + 1e-9)
    assert difference(before, fingerprint(now)) == ""
    assert difference({}, before) == "", "runs of earlier versions know nothing"
