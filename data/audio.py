"""One recording: read, check, mix to mono, centre, resample.

Whatever makes a recording unusable raises `BadRecording` with the file's name, the reason and the
remedy. Nothing is repaired silently.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile

from utils.common.errors import UserError

MIN_RATE, MAX_RATE = 4_000, 96_000  # Hz
#: Taps of torchaudio's polyphase filter above which it is not built (200 MB of float32). Rates
#: that share a factor with 16 kHz, which is all the usual ones, stay far below.
MAX_FILTER_TAPS = 50_000_000


class BadRecording(UserError):
    """A recording that cannot be used as it is."""


def read_recording(path: str | Path) -> tuple[np.ndarray, int]:
    """Samples [n] float32 (mono, mean removed) and sample rate in Hz.

    WAV of 8 to 32 bit or float, FLAC, and whatever else libsndfile reads; several channels are
    averaged.

    Raises:
        BadRecording: unreadable, empty, cut off, NaN or infinite, silent, or an odd sample rate.
    """
    path = Path(path)
    try:
        with soundfile.SoundFile(path) as file:
            rate, declared = file.samplerate, file.frames
            samples = file.read(dtype="float32", always_2d=True)  # [n, channels]
    except (soundfile.LibsndfileError, OSError, RuntimeError) as error:
        raise BadRecording(
            f"{path} cannot be read as audio ({error}); get the file again or leave it out"
        ) from error
    problem = _cut_off(path) or _unusable(samples, declared, rate)
    if not problem:
        mono = samples.mean(axis=1, dtype=np.float64)
        if _constant(mono):  # channels of opposite sign are silent in the mean only
            problem = "is silent: all its samples are equal (mean of its channels)"
    if problem:
        raise BadRecording(f"{path} {problem}; get the file again or leave it out")
    return (mono - mono.mean()).astype(np.float32), rate


def silent_cycles(
    samples: np.ndarray, rate: int, starts: Sequence[float], ends: Sequence[float]
) -> int:
    """How many cycles, from `starts` to `ends` in s, hold nothing but equal samples."""
    cycles = (samples[int(a * rate) : int(b * rate)] for a, b in zip(starts, ends, strict=True))
    return sum(_constant(cycle) for cycle in cycles)


def _constant(samples: np.ndarray) -> bool:
    return len(samples) > 0 and bool((samples == samples[0]).all())


def _unusable(samples: np.ndarray, declared: int, rate: int) -> str | None:
    """What is wrong with decoded samples [n, channels], if anything is."""
    if not MIN_RATE <= rate <= MAX_RATE:
        return f"is sampled at {rate} Hz, outside {MIN_RATE}..{MAX_RATE} Hz"
    if len(samples) == 0:
        return "has no samples"
    if len(samples) < declared:
        return f"is cut off: {len(samples)} of {declared} samples can be read"
    finite = np.isfinite(samples).all(axis=1)
    if not finite.all():
        first = int(np.argmin(finite))
        return (
            f"has {int((~finite).sum())} NaN or infinite samples, the first at {first / rate:.3f} s"
        )
    return None


def _cut_off(path: Path) -> str | None:
    """Compare a WAV's data chunk with the file's size: libsndfile reads what is there, silently."""
    size = path.stat().st_size
    with path.open("rb") as file:
        riff, _, wave = struct.unpack("<4sI4s", file.read(12).ljust(12))
        while (riff, wave) == (b"RIFF", b"WAVE") and len(header := file.read(8)) == 8:
            name, length = struct.unpack("<4sI", header)
            if name == b"data":
                there = size - file.tell()
                streamed = length in (0, 0xFFFFFFFF)  # writers that could not go back say so
                if there >= length or streamed:
                    return None
                return f"is cut off: its header promises {length} bytes of sound, {there} are there"
            file.seek(length + length % 2, 1)
    return None


def resample(samples: np.ndarray, rate: int, sample_rate: int, resampler: str) -> np.ndarray:
    """Samples [n] at `rate` -> [ceil(n sample_rate / rate)] float32 at `sample_rate` (Hz).

    "torchaudio": torchaudio.transforms.Resample with its defaults (sinc_interp_hann, width 6,
    rolloff 0.99). "soxr_hq": libsoxr's HQ recipe, librosa's default.
    """
    if rate == sample_rate:
        return samples
    if resampler == "soxr_hq":
        import soxr

        return soxr.resample(samples, rate, sample_rate, quality="HQ").astype(np.float32)
    import torch

    transform = _torchaudio_resampler(rate, sample_rate)
    with torch.inference_mode():
        return transform(torch.from_numpy(samples)).numpy()


@lru_cache(maxsize=4)
def _torchaudio_resampler(rate: int, sample_rate: int):
    common = math.gcd(rate, sample_rate)
    if (rate // common) * (sample_rate // common) > MAX_FILTER_TAPS:
        raise BadRecording(
            f"torchaudio's resampler cannot go from {rate} to {sample_rate} Hz in reasonable "
            f"memory (no common factor); set audio.resampler: soxr_hq"
        )
    try:
        from torchaudio.transforms import Resample
    except (ImportError, OSError) as error:
        raise UserError(
            f"torchaudio cannot be imported ({error}); install the build that matches torch, or "
            f"set audio.resampler: soxr_hq"
        ) from error
    return Resample(rate, sample_rate)
