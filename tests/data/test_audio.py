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


def with_length(path, length: int):
    """A WAV of 800 samples whose header promises `length` bytes."""
    content = bytearray(write(path, tone_in_noise(0.1, 8000), 8000).read_bytes())
    content[40:44] = length.to_bytes(4, "little")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("length", [0x7FFFFFFF, 0x7FFFF000, 0x80000000, 0xFFFFFFDA, 0xFFFFFFFF])
def test_wav_written_into_a_pipe_is_read(tmp_path, length):
    assert len(read_recording(with_length(tmp_path / "a.wav", length))[0]) == 800


@pytest.mark.parametrize("length", [1602, 1 << 30, 0x90000000])
def test_wav_that_promises_more_is_cut_off(tmp_path, length):
    with pytest.raises(BadRecording, match=f"promises {length} bytes of sound, 1600 are there"):
        read_recording(with_length(tmp_path / "a.wav", length))


@pytest.mark.parametrize(("samples", "found"), [(0, 800), ((1 << 36) - 1, None)])
def test_flac_of_unknown_or_absurd_length(tmp_path, samples, found):
    path = write(tmp_path / "a.flac", tone_in_noise(0.1, 8000), 8000)
    content = bytearray(path.read_bytes())
    word = int.from_bytes(content[18:26], "big") >> 36 << 36 | samples
    content[18:26] = word.to_bytes(8, "big")
    path.write_bytes(content)
    if found:
        assert len(read_recording(path)[0]) == found
    else:
        with pytest.raises(BadRecording, match=f"cut off: 800 of {samples} samples"):
            read_recording(path)


def test_chunk_of_odd_length_without_padding_is_named(tmp_path):
    content = write(tmp_path / "a.wav", tone_in_noise(0.1, 8000), 8000).read_bytes()
    (tmp_path / "a.wav").write_bytes(content[:36] + b"LIST\5\0\0\0INFOx" + content[36:])
    with pytest.raises(BadRecording, match="No 'data' chunk"):
        read_recording(tmp_path / "a.wav")


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
