"""Recordings block by block: the samples of a recording read whole, and no more of them held."""

from __future__ import annotations

import numpy as np
import pytest

from data import audio
from data.audio import BadRecording, read_recording, resample
from data.segments import average, window_spans
from data.stream import Stream, pieces
from tests.data.sounds import spoil, tone_in_noise, write


@pytest.mark.parametrize("block", [999, 1 << 18])
@pytest.mark.parametrize("resampler", ["torchaudio", "soxr_hq"])
@pytest.mark.parametrize("rate", [4000, 11025, 16000, 44100, 96000, 192000])
def test_blocks_are_the_whole(tmp_path, monkeypatch, rate, resampler, block):
    monkeypatch.setattr(audio, "BLOCK", block)
    sound = tone_in_noise(0.3, rate)
    path = write(tmp_path / "a.wav", np.stack([sound, 0.5 * sound], axis=1), rate, "PCM_24")
    whole = resample(*read_recording(path), 16000, resampler)
    stream = Stream.open(path, 16000, resampler)
    assert (stream.rate, stream.channels) == (rate, 2)
    assert 0 <= stream.samples - len(whole) <= (resampler == "soxr_hq"), "soxr rounds down"
    np.testing.assert_allclose(np.concatenate([*stream.blocks()]), whole, atol=1e-6)


def test_rates_without_a_common_factor_are_resampled_by_soxr(tmp_path):
    path = write(tmp_path / "a.wav", tone_in_noise(0.2, 44101), 44101)
    stream = Stream.open(path, 16000, "torchaudio")
    assert stream.resampler == "soxr_hq"
    assert abs(len(np.concatenate([*stream.blocks()])) - stream.samples) <= 1


@pytest.mark.parametrize("kind", ["no samples", "cut wav", "cut flac", "nan", "silent", "rate"])
def test_bad_recordings_are_refused_before_they_are_heard(tmp_path, kind):
    with pytest.raises(BadRecording, match="spoilt"):
        Stream.open(spoil(tmp_path / "spoilt.wav", kind), 16000, "torchaudio")


def test_pieces_hold_what_is_still_needed():
    read = []

    def blocks():
        for start in range(0, 1000, 10):
            read.append(start)
            yield np.arange(start, start + 10, dtype=np.float32)

    spans = [(3, 5), (3, 25), (20, 21), (500, 512), (995, 1200)]
    found = pieces(blocks(), spans)
    for start, stop in spans:
        np.testing.assert_array_equal(next(found), np.arange(start, min(stop, 1000)))
        assert len(read) == -(-min(stop, 1000) // 10), "read ahead"


@pytest.mark.parametrize("samples", [1, 39, 40, 41, 100, 103])
def test_windows_cover_everything_to_the_end(samples):
    spans = window_spans(samples, 40, 10)
    assert spans[0, 0] == 0 and spans[-1, 1] == samples
    assert (np.diff(spans) == min(samples, 40)).all() and (np.diff(spans[:, 0]) <= 10).all()


def test_steps_average_the_windows_around_them():
    spans, edges = window_spans(103, 40, 10), np.append(np.arange(10) * 10, 103)
    value = np.random.default_rng(0).random((len(spans), 2))
    count, (mean,) = average(spans, edges, value)
    for step, middle in enumerate((edges[:-1] + edges[1:]) / 2):
        inside = (spans[:, 0] <= middle) & (middle < spans[:, 1])
        assert count[step] == inside.sum() > 0
        np.testing.assert_allclose(mean[step], value[inside].mean(axis=0))
