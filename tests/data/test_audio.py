"""Decoding and resampling: every format, and a name for every damage."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from data.audio import BadRecording, read_recording, resample
from tests.data.sounds import spoil, tone_in_noise, write

FORMATS = ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"]


@pytest.mark.parametrize("subtype", [*FORMATS, "FLAC_16", "FLAC_24"])
def test_sample_formats(tmp_path, subtype):
    sound = tone_in_noise(0.5, 8000)
    path = tmp_path / ("a.flac" if "FLAC" in subtype else "a.wav")
    write(path, sound, 8000, subtype.replace("FLAC", "PCM"))
    samples, rate = read_recording(path)
    assert rate == 8000
    assert samples.dtype == np.float32
    step = 2 / 256 if subtype == "PCM_U8" else 2 / 2**16
    np.testing.assert_allclose(samples, sound - sound.mean(), atol=1.01 * step)


@pytest.mark.parametrize("rate", [4000, 8000, 11025, 22050, 32000, 48000, 96000])
@pytest.mark.parametrize("resampler", ["torchaudio", "soxr_hq"])
def test_sample_rates_keep_the_tone(tmp_path, rate, resampler):
    time = np.arange(rate) / rate
    path = write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * time), rate)
    samples, found = read_recording(path)
    out = resample(samples, found, 16000, resampler)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert len(out) == 16000
    np.testing.assert_allclose(out[1000:-1000], expected[1000:-1000], atol=5e-3)


def test_extra_chunks_are_no_damage(tmp_path):
    path = tmp_path / "a.wav"
    with soundfile.SoundFile(path, "w", 8000, 1) as file:
        file.title = "odd"  # a LIST chunk
        file.write(tone_in_noise(0.1, 8000))
    assert len(read_recording(path)[0]) == 800


SPOILT = {
    "empty file": "read as audio",
    "text": "read as audio",
    "no samples": "no samples",
    "cut wav": "cut off",
    "cut by one sample": "cut off",
    "cut flac": "cut off|read as audio",
    "nan": "1 NaN or infinite samples, the first at 0.500 s",
    "inf": "1 NaN or infinite samples",
    "silent": "silent",
    "silent in the mean": "silent",
    "rate": "3000 Hz",
    "missing": "read as audio",
}


@pytest.mark.parametrize("kind", SPOILT)
def test_bad_recordings_are_named(tmp_path, kind):
    path = spoil(tmp_path / "spoilt.wav", kind)
    with pytest.raises(BadRecording, match=SPOILT[kind]) as error:
        read_recording(path)
    assert "spoilt" in str(error.value)


def test_unusual_rates_do_not_eat_the_memory():
    with pytest.raises(BadRecording, match="soxr_hq"):
        resample(np.zeros(100, np.float32), 44101, 16000, "torchaudio")
    assert len(resample(np.zeros(44101, np.float32), 44101, 16000, "soxr_hq")) == 16000
