"""A recording of any length in constant memory: decoded, centred and resampled block by block.

The samples are those that `data.store_build.cut_cycles` takes cycles from, to float32's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.audio import MAX_FILTER_TAPS, Decoder, torchaudio_resampler


@dataclass(frozen=True)
class Stream:
    """A checked recording.

    Attributes:
        path: of the file.
        rate, channels: of the file, Hz.
        mean: of its samples.
        sample_rate: working rate, Hz.
        resampler: as `data.audio.resample`'s; "soxr_hq" where torchaudio's filter would be too
            large for these rates.
        samples: of the whole recording at the working rate.
    """

    path: Path
    rate: int
    channels: int
    mean: float
    sample_rate: int
    resampler: str
    samples: int

    @classmethod
    def open(cls, path: str | Path, sample_rate: int, resampler: str) -> Stream:
        """Decode the recording once to check it.

        Raises:
            BadRecording: as `data.audio.read_recording`.
        """
        decoder = Decoder(path)
        for _ in decoder:
            pass
        decoder.check()
        rate, common = decoder.rate, math.gcd(decoder.rate, sample_rate)
        if rate // common * sample_rate // common > MAX_FILTER_TAPS:
            resampler = "soxr_hq"
        samples = -(-decoder.frames * sample_rate // rate)
        return cls(
            decoder.path, rate, decoder.channels, decoder.mean, sample_rate, resampler, samples
        )

    @property
    def seconds(self) -> float:
        return self.samples / self.sample_rate

    def blocks(self) -> Iterator[np.ndarray]:
        """The samples at the working rate, [n] float32 of any n, in a second pass."""
        blocks = ((mono - self.mean).astype(np.float32) for mono in Decoder(self.path))
        if self.rate == self.sample_rate:
            return blocks
        if self.resampler == "soxr_hq":
            return self._soxr(blocks)
        return self._torchaudio(blocks)

    def _soxr(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        import soxr

        stream = soxr.ResampleStream(self.rate, self.sample_rate, 1, "float32", "HQ")
        yield from map(stream.resample_chunk, blocks)
        yield stream.resample_chunk(np.empty(0, np.float32), last=True)

    def _torchaudio(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The filter makes `new` samples out of each `old` ones and their neighbours: with as many
        neighbours on both sides as it reaches, a part comes out as it does of the whole."""
        transform = torchaudio_resampler(self.rate, self.sample_rate)
        old, new = self.rate // transform.gcd, self.sample_rate // transform.gcd
        reach = -(-transform.width // old) + 1  # in units of `old` samples
        made, held = 0, np.empty(0, np.float32)  # made: units given so far
        left = 0  # units at the start of `held` that were given before
        for block in blocks:
            held = np.concatenate([held, block])
            ready = len(held) // old - left - reach
            if ready > 0:
                with torch.inference_mode():
                    out = transform(torch.from_numpy(held)).numpy()
                yield out[left * new : (left + ready) * new]
                made += ready
                drop = max(0, left + ready - reach)
                held, left = held[drop * old :], left + ready - drop
        with torch.inference_mode():
            rest = transform(torch.from_numpy(held)).numpy()
        yield rest[left * new :][: self.samples - made * new]


def pieces(blocks: Iterable[np.ndarray], spans: Sequence[tuple[int, int]]) -> Iterator[np.ndarray]:
    """The samples of each span (first, after the last), sorted by its first; spans may overlap.

    Only what later spans may still need is kept.
    """
    blocks, held, offset = iter(blocks), np.empty(0, np.float32), 0
    for start, stop in spans:
        while offset + len(held) < stop and (block := next(blocks, None)) is not None:
            keep = min(max(0, start - offset), len(held))
            held, offset = np.concatenate([held[keep:], block]), offset + keep
        yield held[max(0, start - offset) : stop - offset].copy()
