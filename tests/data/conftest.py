"""Hand-made ICBHI folders for the tests of the tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from tests.data.sounds import recording_table, tone_in_noise, write

ROWS = "0.1\t1.1\t0\t0\n1.1\t2.0\t1\t0\n2.0\t2.5\t0\t1\n2.5\t2.9\t1\t1\n"
STEMS = {
    "101_1b1_Al_sc_Meditron": "train",
    "102_1b1_Tc_mc_AKGC417L": "train",
    "103_2b2_Pr_mc_AKGC417L": "train",
    "104_1b1_Ll_sc_Meditron": "train",
    "105_1b1_Pl_sc_Litt3200": "test",
    "106_1b1_Ar_sc_LittC2SE": "test",
}


def write_icbhi(folder: Path, stems: dict[str, str] = STEMS, *, audio: bool = True) -> Path:
    """A faultless folder: four cycles, one of each class, in every recording of 3 s at 4 kHz."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).normal(0, 0.1, 12000)
    for stem in stems:
        (folder / f"{stem}.txt").write_text(ROWS)
        if audio:
            soundfile.write(folder / f"{stem}.wav", noise, 4000, subtype="PCM_16")
    patients = sorted({stem.split("_")[0] for stem in stems})
    tables = {
        "ICBHI_challenge_train_test.txt": [f"{stem}\t{part}" for stem, part in stems.items()],
        "ICBHI_Challenge_demographic_information.txt": [
            f"{pid}\t{60 + number}\tF\t2{number}.5\tNA\tNA"
            if number % 2
            else f"{pid}\t{5 + number}\tM\tNA\t20\t11{number}"
            for number, pid in enumerate(patients)
        ],
        "ICBHI_Challenge_diagnosis.txt": [f"{pid}\tCOPD" for pid in patients],
    }
    for name, lines in tables.items():
        (folder / name).write_bytes("".join(f"{line}\r\n" for line in lines).encode())
    return folder


@pytest.fixture
def icbhi_folder(tmp_path) -> Path:
    """Six recordings of six patients, faultless."""
    return write_icbhi(tmp_path / "data")


@pytest.fixture
def make_icbhi():
    """`write_icbhi` itself, for folders of another shape."""
    return write_icbhi


@pytest.fixture
def corpus(tmp_path) -> pd.DataFrame:
    """Three recordings of two cycles each."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    files = {}
    for i, rate in enumerate((44100, 4000, 16000)):
        path = write(folder / f"r{i}.wav", tone_in_noise(1.0, rate, seed=i), rate)
        files[path] = [(0.05, 0.4), (0.4, 0.99)]
    return recording_table(files)
