"""The waveform store: right samples, never a wrong store, whatever happens while it is built."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from tests.data.sounds import (
    open_in,
    recording_table,
    spoil,
    stores_in,
    tone_in_noise,
    write,
)
from utils.common.errors import UserError

# -- the samples --------------------------------------------------------------------------------


@pytest.mark.parametrize("resampler", ["torchaudio", "soxr_hq"])
def test_cycles_are_cut_from_the_resampled_whole(corpus, tmp_path, resampler):
    import soxr
    import torchaudio

    store = open_in(corpus, tmp_path, resampler=resampler)
    assert len(store) == len(corpus) == 6
    assert not store.bad.any()
    assert store.report == []
    for i, row in corpus.iterrows():
        sound, rate = soundfile.read(row.Recording, dtype="float64")
        sound = (sound - sound.mean()).astype(np.float32)
        if rate != 16000 and resampler == "torchaudio":
            transform = torchaudio.transforms.Resample(rate, 16000)
            sound = transform(torch.from_numpy(sound)).numpy()
        elif rate != 16000:
            sound = soxr.resample(sound, rate, 16000, quality="HQ")
        expected = sound[int(row.CycleStart * 16000) : int(row.CycleEnd * 16000)]
        assert store[i].dtype == np.float32
        np.testing.assert_allclose(store[i], expected, atol=1e-6)
        assert store.lengths[i] == len(expected)


@pytest.mark.real
def test_real_recordings(icbhi_root, tmp_path):
    paths = sorted((icbhi_root / "recordings").glob("*.wav"))[::12]
    cycles = {
        path: [tuple(row[:2]) for row in np.loadtxt(path.with_suffix(".txt"), ndmin=2)]
        for path in paths
    }
    table = recording_table(cycles)
    store = open_in(table, tmp_path)
    assert not store.bad.any()
    seconds = (table.CycleEnd - table.CycleStart).to_numpy()
    np.testing.assert_allclose(store.lengths / 16000, seconds, atol=1e-3)
    assert all(store[i].std() > 1e-5 for i in range(len(store)))


def test_stereo_is_averaged_with_one_warning(tmp_path, caplog):
    left, right = tone_in_noise(0.5, 16000, seed=1), tone_in_noise(0.5, 16000, seed=2)
    files = {}
    for name in ("a.wav", "b.wav"):
        sound = np.stack([left, right], axis=1)
        files[write(tmp_path / name, sound, 16000, "FLOAT")] = [(0.1, 0.4)]
    store = open_in(recording_table(files), tmp_path)
    mono = (left + right) / 2
    np.testing.assert_allclose(store[1], (mono - mono.mean())[1600:6400], atol=1e-6)
    assert caplog.text.count("channels") == 1
    assert "2 recordings have several channels" in caplog.text


# -- recordings that cannot be used ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cut wav", "nan", "silent"])
def test_error_or_counted_skip(corpus, tmp_path, kind, caplog):
    path = Path(corpus.Recording[2])
    spoil(path, kind)
    with pytest.raises(UserError, match=r"r1\.wav.*on_bad_recording: skip"):
        open_in(corpus, tmp_path)
    assert not stores_in(tmp_path)

    store = open_in(corpus, tmp_path, on_bad_recording="skip")
    assert store.bad.tolist() == [False, False, True, True, False, False]
    assert store.lengths[2] == store.lengths[3] == 0
    assert len(store.report) == 1
    assert "r1.wav" in store.report[0]
    assert "1 recordings (2 cycles) are left out" in caplog.text
    assert len(store[5]) == store.lengths[5]
    with pytest.raises(UserError, match="left out"):
        store[2]
    with pytest.raises(UserError, match=r"r1\.wav.*on_bad_recording: skip"):
        open_in(corpus, tmp_path)  # the finished store does not hide it either


@pytest.mark.parametrize(("late", "good"), [(0.04, True), (0.06, False)])
def test_annotations_beyond_the_end(tmp_path, late, good):
    path = write(tmp_path / "a.wav", tone_in_noise(1.0, 8000), 8000)
    table = recording_table({path: [(0.1, 0.5), (0.5, 1.0 + late)]})
    if good:
        store = open_in(table, tmp_path)
        assert store.lengths.tolist() == [6400, 8000]
        assert store[1].std() > 0.1
    else:
        with pytest.raises(UserError, match=r"1\.000 s long, but .* ends at 1\.060"):
            open_in(table, tmp_path)


def test_cycle_that_begins_after_the_end(tmp_path):
    path = write(tmp_path / "a.wav", tone_in_noise(1.0, 8000), 8000)
    with pytest.raises(UserError, match="annotation"):
        open_in(recording_table({path: [(1.01, 1.03)]}), tmp_path)


@pytest.mark.parametrize("rate", [8000, 16000])
def test_silent_cycles_are_counted(tmp_path, caplog, rate):
    sound = tone_in_noise(1.0, rate)
    sound[int(0.45 * rate) :] = 0
    path = write(tmp_path / "a.wav", sound, rate)
    open_in(recording_table({path: [(0.1, 0.45), (0.45, 0.7), (0.7, 1.0)]}), tmp_path)
    assert "2 cycles are silent throughout, the first in" in caplog.text
    assert "a.wav" in caplog.text


def test_empty_cycle_is_named(tmp_path):
    path = write(tmp_path / "a.wav", tone_in_noise(1.0, 8000), 8000)
    with pytest.raises(UserError, match=r"0\.5 s to 0\.5 s of a "):
        open_in(recording_table({path: [(0.5, 0.5)]}), tmp_path)


def test_missing_recordings_are_named(corpus, tmp_path):
    Path(corpus.Recording[2]).unlink()
    with pytest.raises(UserError, match=r"r1\.wav cannot be read"):
        open_in(corpus, tmp_path)


def test_table_without_audio_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match="without audio"):
        open_in(corpus.assign(Recording=""), tmp_path)


# -- never a wrong store ------------------------------------------------------------------------


def test_equal_inputs_share_a_store(corpus, tmp_path):
    first = open_in(corpus, tmp_path).folder
    assert open_in(corpus, tmp_path).folder == first
    shutil.copytree(tmp_path / "recordings", tmp_path / "moved", copy_function=shutil.copyfile)
    copied = corpus.assign(Recording=corpus.Recording.str.replace("recordings", "moved"))
    assert open_in(copied, tmp_path).folder == first  # whatever the times are


def test_other_settings_and_cycles_have_their_own(corpus, tmp_path):
    folders = [
        open_in(corpus, tmp_path).folder,
        open_in(corpus, tmp_path, resampler="soxr_hq").folder,
        open_in(corpus, tmp_path, sample_rate=8000).folder,
        open_in(corpus.assign(CycleEnd=corpus.CycleEnd - 0.01), tmp_path).folder,
        open_in(corpus.iloc[::-1].reset_index(drop=True), tmp_path).folder,
    ]
    assert len(set(folders)) == 5


@pytest.mark.parametrize("where", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_other_sound_of_equal_size_and_time(corpus, tmp_path, where):
    """A repaired or resampled copy in another folder, or in place: never the first one's sound."""
    path = Path(corpus.Recording[0])
    before = open_in(corpus, tmp_path)[0]
    stat, content = path.stat(), bytearray(path.read_bytes())
    if where == 0.5:
        content = write(tmp_path / "x.wav", tone_in_noise(1.0, 44100, seed=9), 44100).read_bytes()
    else:  # a stretch of 0.25 s is another
        at = 44 + int(where * (len(content) - 44 - 22050)) // 2 * 2
        content[at : at + 22050] = content[at : at + 22050][::-1]
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    store = open_in(corpus, tmp_path)
    assert len(stores_in(tmp_path)) == 2
    assert where != 0.5 or np.abs(store[0] - before).max() > 0.01


@pytest.mark.parametrize("full", [True, False])
def test_a_full_hash_sees_a_single_bit(full, tmp_path):
    """40 kB of a file of 400 kB do not; which is what the key is for."""
    path = write(tmp_path / "a.wav", tone_in_noise(4.5, 44100), 44100)
    table = recording_table({path: [(0.1, 0.5), (2.0, 2.3)]})
    before = open_in(table, tmp_path, full_hash=full)
    assert len(open_in(table, tmp_path, full_hash=full)[1]) == 4800
    content = bytearray(path.read_bytes())
    content[30_000] ^= 1
    path.write_bytes(content)
    assert (open_in(table, tmp_path, full_hash=full).folder == before.folder) != full


def test_a_store_can_be_pickled_small(corpus, tmp_path):
    store = open_in(corpus, tmp_path)
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy[4], store[4])
    assert len(pickle.dumps(store)) < 5000


def test_cycles_are_read_into_rows(corpus, tmp_path):
    store = open_in(corpus, tmp_path)
    out = np.full((2, int(store.lengths[5]) + 5), 7, np.float32)
    cut_row = np.zeros((1, int(store.lengths[4]) - 5), np.float32)
    store.read(np.array([4]), cut_row)
    np.testing.assert_array_equal(cut_row[0], store[4][:-5])
    store.read(np.array([5, 1]), out)
    for row, cycle in zip(out, (5, 1), strict=True):
        size = store.lengths[cycle]
        np.testing.assert_array_equal(row[:size], store[cycle])
        assert (row[size:] == 7).all()


def change(path: Path, how: str) -> None:
    """Damage a file as disks, editors and other programs do."""
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
        return
    if how == "bit flipped":
        content[len(content) // 2] ^= 1
    elif how == "zeroed":
        content[-len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    changed = {"empty": b"", "cut": content[:-9], "other type": b"[1, 2]"}.get(how, content)
    path.write_bytes(changed)


@pytest.mark.parametrize("name", ["samples.f32", "cycles.i64", "index.json"])
@pytest.mark.parametrize("how", ["deleted", "empty", "cut", "zeroed", "bit flipped", "other type"])
def test_damage_is_never_believed(corpus, tmp_path, name, how):
    folder = open_in(corpus, tmp_path).folder
    change(folder / name, how)
    with pytest.raises(UserError, match="delete it"):
        store = open_in(corpus, tmp_path)
        for cycle in range(len(store)):
            store[cycle]
