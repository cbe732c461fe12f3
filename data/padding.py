"""Cycles of any length -> clips of one length: repetition with faded junctions, zeros, cutting."""

from __future__ import annotations

import torch
from torch import Tensor


def pad_clips(waveform: Tensor, length: Tensor, samples: int, pad_type: str, fade: int) -> Tensor:
    """Bring every cycle of a batch to `samples`.

    Longer cycles are cut. "zero": the cycle in the middle, zeros around it. "repeat": copies of
    the cycle, the last one cut; each but the first fades in over `fade` samples, each but the
    last fades out (linear, torchaudio.transforms.Fade's ramp k / (fade - 1)). A cycle that is not
    longer than the fade is repeated as it is.

    Args:
        waveform: [B, S], zero behind each cycle's own samples.
        length: [B] int64, samples of each cycle, at least 1.

    Returns:
        [B, samples], on the device of `waveform`.
    """
    if waveform.device.type == "cpu":  # slices copy far faster than a gather on a CPU
        out = waveform.new_zeros(len(waveform), samples)
        ramp = _ramp(fade, waveform)
        for row, cycle, n in zip(out, waveform, length.tolist(), strict=True):
            _pad_one(row, cycle[: min(n, samples)], pad_type, ramp)
        return out
    return _pad_batch(
        waveform, length.to(waveform.device, non_blocking=True), samples, pad_type, fade
    )


def _ramp(fade: int, like: Tensor) -> Tensor:
    return torch.linspace(0, 1, fade, dtype=like.dtype, device=like.device)


def _pad_one(out: Tensor, cycle: Tensor, pad_type: str, ramp: Tensor) -> None:
    """Fill out [samples] (zeros) with one cycle [n], n <= samples."""
    n, samples, fade = len(cycle), len(out), len(ramp)
    if n == 0:
        raise ValueError("a cycle without samples can not become a clip")
    if pad_type == "zero" or n == samples:
        start = (samples - n) // 2
        out[start : start + n] = cycle
        return
    middle = cycle.clone()
    first, last = cycle.clone(), cycle.clone()
    if n > fade:
        first[-fade:] *= ramp.flip(0)
        last[:fade] *= ramp
        middle[:fade] *= ramp
        middle[-fade:] *= ramp.flip(0)
    out[:n] = first
    whole = (samples - 1) // n - 1  # copies between the first and the last
    if whole > 0:
        out[n : n + whole * n].view(whole, n).copy_(middle)
    start = (whole + 1) * n
    out[start:] = last[: samples - start]


def _pad_batch(waveform: Tensor, length: Tensor, samples: int, pad_type: str, fade: int) -> Tensor:
    """The same by one gather for the batch, without a word from the device to the host."""
    n = length.clamp(max=samples).unsqueeze(1)  # [B, 1]
    at = torch.arange(samples, device=waveform.device)  # [samples]
    if pad_type == "zero":
        source = at - (samples - n) // 2
        inside = (source >= 0) & (source < n)
        clip = waveform.gather(1, source.clamp(0, waveform.shape[1] - 1))
        return torch.where(inside, clip, 0.0)
    source, copy = at % n, at // n
    clip = waveform.gather(1, source)
    ramp = _ramp(fade, waveform)
    fades_in = (copy > 0) & (source < fade) & (n > fade)
    fades_out = (copy < (samples - 1) // n) & (n - 1 - source < fade) & (n > fade)
    clip = torch.where(fades_in, clip * ramp[source.clamp(max=fade - 1)], clip)
    return torch.where(fades_out, clip * ramp[(n - 1 - source).clamp(max=fade - 1)], clip)
