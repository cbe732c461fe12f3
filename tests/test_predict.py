"""predict.py: what evaluation says of the same cycles, windows, and one sentence per fault."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

import predict
from data.loader import Cycles
from models.registry import VARIANTS
from tests.data.sounds import spoil, tone_in_noise, write
from tests.utils.tiny import random_checkpoint, tiny_config
from utils.common.errors import UserError
from utils.config.schema import RunConfig
from utils.evaluation.trained_model import TrainedModel
from utils.metrics.predictions import make_predictions
from utils.predict import draw, predict_recording, predict_under
from utils.training.assemble import build_data
from utils.training.checkpoint import load_checkpoint, save_checkpoint


def configure(variant: str, corpus: Path, n_cls: int = 4) -> RunConfig:
    return tiny_config(
        variant,
        **{
            "dataset.data_folder": str(corpus),
            "dataset.cache_dir": str(corpus.parent / "cache"),
            "dataset.store_workers": 1,
            "dataset.n_cls": n_cls,
            "audio.clip_seconds": 1.5,
        },
    )


def known(row) -> dict:
    """Metadata of a cycle table's row, as a user gives them."""
    given = {"device": row.Device, "site": row.AuscLoc, "age": row.Age, "bmi": row.BMIDerived}
    return {key: value for key, value in given.items() if not pd.isna(value)}


def agrees_with_evaluation(checkpoint: Path, data: Cycles, stems: Sequence[str]) -> None:
    """`predict_recording` on recordings' own cycles against what evaluate.py computes of them."""
    model = TrainedModel.open(checkpoint)
    model.data = replace(data, task=model.task)
    for stem in stems:
        rows = np.flatnonzero(data.table["Filename"] == stem)
        args = (model.task, data.table, rows, model.predictor(rows), model.thresholds)
        expected, table = make_predictions(*args), data.table.iloc[rows]
        cycles = table[["CycleStart", "CycleEnd", "Crackles", "Wheezes"]].to_numpy()
        row, options = table.iloc[0], {"cycles": cycles, "overview": False}
        found = predict_recording(model, row.Recording, metadata=known(row), **options).table
        probability = [f"p_{name}" for name in model.task.outputs]
        assert len(expected) == len(found) > 1
        np.testing.assert_allclose(found[probability], expected[probability], atol=1e-5, rtol=0)
        for name in ("pred_class", "true_class"):
            assert list(found[name]) == list(expected[name])
    if model.is_conditioned:
        other = predict_recording(model, row.Recording, **options).table
        assert np.abs(other[probability] - found[probability]).to_numpy().max() > 1e-3


@pytest.fixture(scope="module")
def corpus(synthetic_corpus, tmp_path_factory) -> Path:
    """A copy, next to which the waveform store may lie."""
    return Path(shutil.copytree(synthetic_corpus, tmp_path_factory.mktemp("predict") / "corpus"))


@pytest.fixture(scope="module")
def data(corpus) -> Cycles:
    return build_data(configure("ast", corpus))


@pytest.fixture(scope="module")
def checkpoint(corpus, data) -> Path:
    config = configure("ast_softfilm", corpus)
    return random_checkpoint(config, data, corpus.parent / "softfilm.pt")


@pytest.fixture(scope="module")
def model(checkpoint) -> TrainedModel:
    return TrainedModel.open(checkpoint)


@pytest.fixture(scope="module")
def wav(corpus) -> Path:
    return sorted(corpus.glob("*.wav"))[0]


@pytest.mark.parametrize("n_cls", [4, 2])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_own_cycles_give_what_evaluation_gives(variant, n_cls, corpus, data, tmp_path):
    path = random_checkpoint(configure(variant, corpus, n_cls), data, tmp_path / "m.pt")
    agrees_with_evaluation(path, data, data.table["Filename"].unique()[::14])


def test_windows_are_averaged_over_each_step(model, wav):
    seconds = soundfile.info(wav).duration
    starts = [*np.arange(0, seconds - 1.2, 0.4), seconds - 1.2]
    each = predict_recording(model, wav, cycles=[(s, s + 1.2) for s in starts], overview=False)
    options = {"window": 1.2, "hop": 0.4, "overview": False}
    found = predict_recording(model, wav, duration="window", **options).table
    assert len(each.table) > 2 * model.batch_size
    assert found["end"].iloc[-1] == pytest.approx(seconds, abs=1e-4)
    for row in found.itertuples():
        middle = (row.start + row.end) / 2
        inside = [s <= middle < s + 1.2 for s in starts]
        assert row.windows == sum(inside)
        expected = each.table[inside].mean(numeric_only=True)
        for name in ("p_crackle", "p_wheeze", "calibrated_wheeze"):
            assert getattr(row, name) == pytest.approx(expected[name], abs=2e-4)
    unknown = predict_recording(model, wav, **options)
    assert np.abs(unknown.table["p_crackle"] - found["p_crackle"]).max() > 1e-4
    assert any("z = 0" in note for note in unknown.notes)


def test_a_hop_is_at_most_a_short_window(model, wav):
    found = predict_recording(model, wav, window=0.3, overview=False)
    assert found.hop == 0.3 and len(found.table) == round(found.seconds / 0.3)
    assert predict_recording(model, wav, overview=False).hop == 0.5


def test_calibration_undoes_the_positives_weight(model, wav):
    table = predict_recording(model, wav, cycles=[(0, 1)], overview=False).table.iloc[0]
    for name, weight in zip(("crackle", "wheeze"), model.checkpoint.pos_weight, strict=True):
        p = table[f"p_{name}"]
        assert table[f"calibrated_{name}"] == pytest.approx(p / (p + weight * (1 - p)))


def test_one_pass_serves_several_metadata(model, wav):
    kinds = [{}, {"device": "Meditron", "site": "Tc", "age": 61.0, "bmi": 27.0}]
    options = {"cycles": [(2, 3), (0, 1)], "overview": False}
    both = predict_under(model, wav, kinds, **options)
    for metadata, found in zip(kinds, both, strict=True):
        alone = predict_recording(model, wav, metadata=metadata, **options)
        pd.testing.assert_frame_equal(found.table, alone.table)
        assert found.notes == alone.notes
    assert both[1].table["metadata_known"][0] == "device site age bmi duration"
    assert any("device and site unknown" in note for note in both[0].notes)
    assert list(both[0].table["start"]) == [2, 0], "the order of the cycles is the user's"


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"site": "Xx"}, "site 'Xx' is none that the model knows .Al, Ar, .*leave it out"),
        ({"age": 300}, "age is 300, outside 0..130"),
        ({"bmi": float("nan")}, "bmi is nan"),
        ({"weight": 70}, "no metadata weight; device, site"),
    ],
)
def test_metadata_are_checked(metadata, words, model, wav):
    with pytest.raises(UserError, match=words):
        predict_recording(model, wav, metadata=metadata)


@pytest.mark.parametrize("cycle", [(-1, 1), (1, 1), (2, 1), (500, 501), (1, 500), (0, np.nan)])
def test_cycles_out_of_range_are_named(cycle, model, wav):
    with pytest.raises(UserError, match=r"is not in it or is empty"):
        predict_recording(model, wav, cycles=[(0, 1), cycle])


@pytest.mark.parametrize("window", [{"window": 9}, {"hop": 2, "window": 1}, {"hop": 0}])
def test_windows_that_cannot_be_are_refused(window, model, wav):
    with pytest.raises(UserError, match=r"the model hears at most 1\.5 s"):
        predict_recording(model, wav, **window)


def test_format_rate_and_channels_hardly_matter(model, tmp_path):
    sound = tone_in_noise(1.5, 96000)
    files = [write(tmp_path / "a.wav", np.stack([sound, sound], 1), 96000, "PCM_24")]
    files.append(write(tmp_path / "b.flac", sound, 96000))
    soundfile.write(tmp_path / "c.wav", sound[::2], 48000, format="MP3")
    files += [tmp_path / "c.wav", write(tmp_path / "d.wav", sound[::2], 48000, "FLOAT")]
    tables = [predict_recording(model, file, overview=False) for file in files]
    for found in tables:
        assert found.seconds == pytest.approx(1.5, abs=0.1)
        values = found.table[["p_crackle", "p_wheeze"]].mean()
        np.testing.assert_allclose(values, tables[0].table[values.index].mean(), atol=0.05)
    assert "mean of 2 channels" in tables[0].notes


def test_the_picture_shows_the_whole_sound(model, wav, monkeypatch):
    monkeypatch.setattr("data.audio.BLOCK", 5000)
    found = predict_recording(model, wav, cycles=[(0, 1, 1, 0), (1, 2, 0, 1)])
    view, store = found.overview, soundfile.read(wav, always_2d=True)[0].mean(axis=1)
    assert view.low.min() == pytest.approx((store - store.mean()).min(), abs=0.05)
    assert view.frames.sum() == view.total_frames and (view.frames > 0).all()
    whole = torch.from_numpy(np.concatenate([*_samples(model, wav)]))[None]
    expected = model.frontend.log_mel(whole)[0].double().numpy()
    assert len(expected) == view.total_frames
    np.testing.assert_allclose(view.mel.sum(axis=0), expected.sum(axis=0), rtol=1e-3)
    with pytest.raises(ValueError, match="overview"):
        draw(predict_recording(model, wav, overview=False), "never.png")


def _samples(model, wav):
    from data.stream import Stream

    audio = model.config.audio
    return Stream.open(wav, audio.sample_rate, audio.resampler).blocks()


# -------------------------------------------------------------------- the command


def start(monkeypatch, checkpoint, *words) -> int:
    arguments = ["predict.py", "--checkpoint", checkpoint, "--device", "cpu", *words]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    return predict.main()


def said(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_a_folder_with_annotations_and_a_faulty_file(
    checkpoint, corpus, monkeypatch, tmp_path, capsys
):
    folder = tmp_path / "clinic"
    for n, wav in enumerate(sorted(corpus.glob("*.wav"))[:2]):
        (folder / str(n)).mkdir(parents=True)
        shutil.copy(wav, folder / str(n) / "same.wav")
        if n:
            shutil.copy(wav.with_suffix(".txt"), folder / "1" / "same.txt")
    spoil(folder / "bad.wav", "nan")
    table = tmp_path / "m.csv"
    table.write_text("file,site,age\nclinic/0/same.wav,Tc,\nbad,,4\n")
    words = (folder, "--metadata", table, "--age", 50, "--output", tmp_path / "o")
    assert start(monkeypatch, checkpoint, *words) == 2
    printed = capsys.readouterr()
    assert "bad.wav has 1 NaN" in printed.err and "1 of 3 recordings" in printed.err
    assert "times real time" in printed.out and " cycles; normal" in printed.out
    assert "no row for 1 of 3 recordings, such as" in printed.err and "1/same.wav" in printed.err
    assert "note: device unknown (1 of 2 files)" in printed.out
    frame = pd.read_csv(tmp_path / "o" / "predictions.csv")
    first, second = (frame[frame["file"] == str(folder / n / "same.wav")] for n in "01")
    assert set(first["metadata_known"]) == {"age site"}
    assert set(second["metadata_known"]) == {"age duration"} and second["true_class"].notna().all()
    content = json.loads((tmp_path / "o" / "predictions.json").read_text())
    assert list(content["failed"]) == [str(folder / "bad.wav")]
    assert [r["summary"]["of"] for r in content["recordings"]] == ["windows", "cycles"]
    assert content["model"]["thresholds"] == [0.45, 0.45]
    summary = pd.read_csv(tmp_path / "o" / "summary.csv").iloc[1]
    length = second["end"] - second["start"]
    assert summary["p_crackle_mean"] == pytest.approx(
        np.average(second["p_crackle"], weights=length)
    )
    assert sum(summary[f"share_{name}"] for name in ("normal", "crackle", "wheeze", "both")) == 1
    written = sorted(p.name for p in (tmp_path / "o").iterdir())
    assert written == [
        "predictions.csv",
        "predictions.json",
        "same-2.png",
        "same.png",
        "summary.csv",
    ]


@pytest.mark.parametrize("words", ["--window 1", "--hop 0.2", "--duration window"])
def test_what_is_said_of_windows_asks_for_them(words, capsys):
    given = ["--checkpoint", "x.pt", "a.wav", *words.split()]
    assert predict.parse(given).windows
    with pytest.raises(SystemExit):
        predict.parse([*given, "--cycles", "c.csv"])
    assert "cycles have their own length" in capsys.readouterr().err


def test_cycles_of_a_table_and_windows_instead(checkpoint, wav, monkeypatch, tmp_path, capsys):
    table = tmp_path / "c.csv"
    table.write_text("start,end,crackle,wheeze\n0.5,2,1,0\n2,3,0,0\n")
    quick = (wav, "--no-pictures", "--output", tmp_path)
    assert start(monkeypatch, checkpoint, *quick, "--cycles", table) == 0
    frame = pd.read_csv(tmp_path / "predictions.csv")
    assert list(frame["start"]) == [0.5, 2] and list(frame["true_class"]) == ["crackle", "normal"]
    assert start(monkeypatch, checkpoint, *quick, "--windows", "--hop", 1) == 0
    assert "windows" in pd.read_csv(tmp_path / "predictions.csv")
    alone = Path(shutil.copy(wav, tmp_path / "a.wav"))
    alone.with_suffix(".txt").write_text("what the doctor said")
    noted = (alone, "--no-pictures", "--output", tmp_path)
    assert start(monkeypatch, checkpoint, *noted, "--windows") == 0
    assert "start is 'what', a finite number expected" in (words := said(capsys))
    assert "it is not drawn" in words and start(monkeypatch, checkpoint, *noted) == 2
    for text, words in (
        ("start,end\n1,x\n", "row 2: end is 'x'; a number is needed"),
        ("begin,end\n1,2\n", "lacks the column start"),
        ("start,end,file\n0,1,2,a.wav\n", "rows have more cells than the first line has names"),
        ("start,end,file\n0,1,\0\n", "damaged or no text (a NUL byte at 19)"),
        ("start,end,file\n1,2,other.wav\n", "has no cycle of"),
        ("start,end,crackle\n1,2,maybe\n", "neither 0 nor 1"),
    ):
        table.write_text(text)
        assert start(monkeypatch, checkpoint, *quick, "--cycles", table) == 2
        assert words in said(capsys)


FAULTS = {
    "missing": "cannot be read as audio (",
    "empty file": "cannot be read as audio (",
    "no samples": "has no samples",
    "nan": "has 1 NaN or infinite samples",
    "silent": "is silent",
    "cut wav": "is cut off",
    "text": "cannot be read as audio (",
}


def test_bad_recordings_get_one_sentence_each(checkpoint, monkeypatch, tmp_path, capsys):
    paths = {kind: spoil(tmp_path / f"{kind}.wav", kind) for kind in FAULTS}
    assert start(monkeypatch, checkpoint, *paths.values(), "--output", tmp_path / "o") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    for (kind, path), line in zip(paths.items(), lines[:-1], strict=True):
        assert line.startswith(f"error: {path} {FAULTS[kind]}")
    assert lines[-1] == "error: 7 of 7 recordings could not be used"
    assert not (tmp_path / "o").exists()


def test_what_is_wrong_for_all_is_said_once(checkpoint, wav, monkeypatch, tmp_path, capsys):
    table = tmp_path / "m.csv"
    table.write_text("file,device\nx.wav,Meditron\ny.wav,Telephone\n")
    for words, expected in (
        (("--site", "Xx"), "site 'Xx' is none that the model knows"),
        (("--metadata", table), "m.csv, row 3: device 'Telephone' is none"),
        (("--metadata", tmp_path / "no.csv"), "no table"),
        ((tmp_path,), "no recording found there"),
        ((wav, "--annotation", wav.with_suffix(".txt")), None),
    ):
        again = () if expected is None else (wav,)
        code = start(monkeypatch, checkpoint, *again, *words, "--no-pictures", "--output",
                     tmp_path / "o")  # fmt: skip
        assert code == (0 if expected is None else 2)
        assert (expected or "") in said(capsys)


def test_checkpoints_of_another_kind_are_refused(checkpoint, wav, monkeypatch, tmp_path, capsys):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    assert start(monkeypatch, tmp_path / "other.pt", wav) == 2
    assert "is not a model checkpoint of this repository" in said(capsys)
    silent = load_checkpoint(checkpoint)
    silent.config["dataset"]["name"] = "spectrograms"
    save_checkpoint(tmp_path / "silent.pt", silent)
    assert start(monkeypatch, tmp_path / "silent.pt", wav) == 2
    assert "was trained on ready-made spectrograms" in said(capsys)
