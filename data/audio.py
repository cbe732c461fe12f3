"""One recording: read, check, mix to mono, centre, resample.

Whatever makes a recording unusable raises `BadRecording` with the file's name, the reason and the
remedy. Nothing is repaired silently.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

import numpy as np
import soundfile

from utils.common.errors import UserError

MIN_RATE, MAX_RATE = 4_000, 384_000  # Hz
#: Samples of all channels that are decoded at a time: memory follows from what is there, never from
#: what a header promises.
BLOCK = 1 << 18
#: Taps of torchaudio's polyphase filter above which it is not built (200 MB of float32). Rates
#: that share a factor with 16 kHz, which is all the usual ones, stay far below.
MAX_FILTER_TAPS = 50_000_000


#: Lengths, or a little more than them, that writers give who cannot go back to write the true one.
STREAMED = (0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
#: Frames that libsndfile reports where a header does not say how many there are.
UNKNOWN = 1 << 62


class BadRecording(UserError):
    """A recording that cannot be used as it is."""


class _Sequential(soundfile.SoundFile):
    """Read from front to end: a FLAC of unknown length cannot be sought in."""

    def seekable(self) -> bool:
        return False


class Decoder:
    """One pass over a recording's samples, which notes whatever is wrong with them.

    Attributes:
        rate: Hz; channels: of the file; frames: samples that were there, of each channel.
        mean: of all samples.

    Raises:
        BadRecording: (opening or iterating) unreadable, cut off, or an odd sample rate.
    """

    def __init__(self, path: str | Path):
        self.path, self.frames, self.total = Path(path), 0, 0.0
        self.bad, self.first_bad = 0, 0  # NaN or infinite samples
        self.first, self.constant = 0.0, True
        with self._opened() as file:
            self.rate, self.channels, self.declared = file.samplerate, file.channels, file.frames
        if problem := _cut_off(self.path):
            self._refuse(problem)
        if not MIN_RATE <= self.rate <= MAX_RATE:
            self._refuse(f"is sampled at {self.rate} Hz, outside {MIN_RATE}..{MAX_RATE} Hz")

    def __iter__(self) -> Iterator[np.ndarray]:
        """Mean of the channels, [n] float64, block by block."""
        frames = max(1, BLOCK // self.channels)
        with self._opened() as file:
            while len(samples := file.read(frames, dtype="float32", always_2d=True)):
                yield self._seen(samples)

    def _seen(self, samples: np.ndarray) -> np.ndarray:
        finite = np.isfinite(samples).all(axis=1)
        if not finite.all():
            if not self.bad:
                self.first_bad = self.frames + int(np.argmin(finite))
            self.bad += int((~finite).sum())
            samples = np.where(finite[:, None], samples, 0.0)
        mono = samples.mean(axis=1, dtype=np.float64)
        if not self.frames:
            self.first = mono[0]
        self.constant = self.constant and bool((mono == self.first).all())
        self.frames, self.total = self.frames + len(mono), self.total + float(mono.sum())
        return mono

    @property
    def mean(self) -> float:
        return self.total / self.frames

    def check(self) -> None:
        """Once every sample was seen.

        Raises:
            BadRecording: empty, cut off, NaN or infinite, silent.
        """
        if self.frames == 0:
            self._refuse("has no samples")
        if self.frames < self.declared < UNKNOWN:
            self._refuse(f"is cut off: {self.frames} of {self.declared} samples can be read")
        if self.bad:
            first = f"the first at {self.first_bad / self.rate:.3f} s"
            self._refuse(f"has {self.bad} NaN or infinite samples, {first}")
        if self.constant:  # channels of opposite sign are silent in the mean only
            self._refuse("is silent: all its samples are equal (mean of its channels)")

    @contextmanager
    def _opened(self) -> Iterator[soundfile.SoundFile]:
        try:
            with _Sequential(self.path) as file:
                yield file
        except (soundfile.LibsndfileError, OSError, RuntimeError) as error:
            reason = getattr(error, "error_string", error)
            reason = reason if self.path.is_file() else "there is no such file"
            self._refuse(f"cannot be read as audio ({reason})", error)

    def _refuse(self, problem: str, cause: Exception | None = None) -> NoReturn:
        message = f"{self.path} {problem}; get the file again or leave it out"
        raise BadRecording(message) from cause


def read_recording(path: str | Path) -> tuple[np.ndarray, int]:
    """Samples [n] float32 (mono, mean removed) and sample rate in Hz.

    WAV of 8 to 32 bit or float, FLAC, and whatever else libsndfile reads; several channels are
    averaged.

    Raises:
        BadRecording: unreadable, empty, cut off, NaN or infinite, silent, or an odd sample rate.
    """
    decoder = Decoder(path)
    mono = np.concatenate([np.empty(0), *decoder])
    decoder.check()
    return (mono - mono.mean()).astype(np.float32), decoder.rate


def silent_cycles(
    samples: np.ndarray, rate: int, starts: Sequence[float], ends: Sequence[float]
) -> int:
    """How many cycles, from `starts` to `ends` in s, hold nothing but equal samples."""
    cycles = (samples[int(a * rate) : int(b * rate)] for a, b in zip(starts, ends, strict=True))
    return sum(_constant(cycle) for cycle in cycles)


def _constant(samples: np.ndarray) -> bool:
    return len(samples) > 0 and bool((samples == samples[0]).all())


def _cut_off(path: Path) -> str | None:
    """Compare a WAV's data chunk with the file's size: libsndfile reads what is there, silently."""
    size = path.stat().st_size
    with path.open("rb") as file:
        riff, _, wave = struct.unpack("<4sI4s", file.read(12).ljust(12))
        while (riff, wave) == (b"RIFF", b"WAVE") and len(header := file.read(8)) == 8:
            name, length = struct.unpack("<4sI", header)
            if name == b"data":
                there = size - file.tell()
                if there >= length or any(0 <= end - length < 4096 for end in STREAMED):
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

    transform = torchaudio_resampler(rate, sample_rate)
    with torch.inference_mode():
        return transform(torch.from_numpy(samples)).numpy()


@lru_cache(maxsize=4)
def torchaudio_resampler(rate: int, sample_rate: int):
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
