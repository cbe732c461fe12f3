"""Batched augmentation, on the device: noise, time-stretch, loudness, VTLP, SpecAugment.

B clips, S samples, T frames, F mel bands. What happens to which clip is drawn from the batch's
own seed on the CPU, so that the plan is the same on every device and no global generator is
touched; the costly transforms then run on the chosen clips only. Order: noise, time-stretch,
loudness (waveform), VTLP (mel bank), SpecAugment (normalised log-mel).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.batch import TensorRecord
from data.config import AugmentConfig

#: Phase vocoder's analysis window (64 ms at 16 kHz) and the share of it between two frames.
STRETCH_SECONDS = 0.064
STRETCH_OVERLAP = 4


@dataclass
class Plan(TensorRecord):
    """What happens to each clip of a batch; everything on the CPU, NaN where nothing happens.

    Attributes:
        noise: [B] rms of the noise (full scale = 1), or its SNR in dB.
        speed, loudness, vtlp: [B] factors as in the configuration.
        masked: [B] bool, the clips that SpecAugment takes.
        freq_masks, time_masks: [B, masks, 2] uniform numbers for width and start.
        noise_seed: [B] int64, of the noise samples' generator; the first clip's serves a batch.
    """

    noise: Tensor
    speed: Tensor
    loudness: Tensor
    vtlp: Tensor
    masked: Tensor
    freq_masks: Tensor
    time_masks: Tensor
    noise_seed: Tensor


class Augmentation:
    """Per-clip random transforms.

    Noise is additive white Gaussian noise; its SNR, where one is given, is relative to the clip's
    own rms. Time-stretch is a phase vocoder's (Flanagan and Golden, 1966): factor > 1 is faster,
    the pitch stays, and the clip keeps its length: what is longer is cut, what is shorter is padded
    as a short cycle would be. Vocal tract length perturbation: see `warp`. SpecAugment (Park et
    al., Interspeech 2019, arXiv 1904.08779) comes without its time warp: `freq_masks` bands of
    width uniform in 0..freq_mask_width - 1 and `time_masks` spans of 0..time_mask_width - 1 frames
    are set to `mask_value`.

    Args:
        augment: probabilities, per clip, and ranges; `enabled` is not read here.
        sample_rate: Hz.
    """

    def __init__(self, augment: AugmentConfig, sample_rate: int):
        self.augment, self.sample_rate = augment, sample_rate

    def draw(self, batch: int, seed: int) -> Plan:
        """Decide what happens to `batch` clips: a pure function of (batch, seed).

        The same numbers are drawn whatever the probabilities, so switching one transform on or
        off leaves the others as they were.
        """
        generator, augment = torch.Generator().manual_seed(seed), self.augment

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        def factors(probability: float, bounds: Sequence[float], neutral: float = math.nan):
            take, low, high = uniform(batch) < probability, *bounds
            drawn = low + (high - low) * uniform(batch)
            # a factor that changes nothing costs nothing
            return drawn.where(take & (drawn != neutral), math.nan)

        return Plan(
            noise=factors(
                augment.noise_probability, augment.noise_snr_db or [augment.noise_rms] * 2
            ),
            speed=factors(augment.speed_probability, augment.speed_range, neutral=1.0),
            loudness=factors(augment.loudness_probability, augment.loudness_range, neutral=1.0),
            vtlp=factors(augment.vtlp_probability, augment.vtlp_range, neutral=1.0),
            masked=uniform(batch) < augment.specaugment_probability,
            freq_masks=uniform(batch, augment.freq_masks, 2),
            time_masks=uniform(batch, augment.time_masks, 2),
            noise_seed=torch.randint(2**62, (), generator=generator) + torch.arange(batch),
        )

    def noise(self, clip: Tensor, plan: Plan) -> None:
        """White Gaussian noise on clips [B, S], in place."""
        rows, factor = chosen(plan.noise, clip.device)
        if len(rows) == 0:
            return
        generator = torch.Generator(clip.device).manual_seed(int(plan.noise_seed[0]))
        white = clip.new_empty(len(rows), clip.shape[1]).normal_(generator=generator)
        if self.augment.noise_snr_db is not None:
            factor = clip[rows].square().mean(dim=1).sqrt() * 10 ** (-factor / 20)
        clip[rows] += factor.unsqueeze(1) * white

    def speed(self, clip: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
        """Time-stretch of clips [B, S]: the rows [n] it takes, what becomes of them [n, S], and
        the samples of it that are filled, [n] int64; the rest is for padding."""
        rows, rate = chosen(plan.speed, clip.device)
        if len(rows) == 0:
            return rows, clip[:0], rows
        return rows, *time_stretch(clip[rows], rate, self.sample_rate)

    def loudness(self, clip: Tensor, plan: Plan) -> None:
        """Another amplitude of clips [B, S], in place."""
        rows, factor = chosen(plan.loudness, clip.device)
        if len(rows):
            clip[rows] *= factor.unsqueeze(1)

    def warp(self, frequency: Tensor, alpha: Tensor) -> Tensor:
        """Frequencies [K] in Hz under warp factors alpha [n] -> [n, K] in Hz.

        Vocal tract length perturbation (Jaitly and Hinton, ICML WDLASL 2013, eq. 1): with the
        boundary b = f_hi min(alpha, 1) / alpha and Nyquist N,
        f' = alpha f for f <= b, else N - (N - f_hi min(alpha, 1)) / (N - b) (N - f).
        """
        nyquist = self.sample_rate / 2
        alpha = alpha.unsqueeze(1)  # [n, 1]
        image = self.augment.vtlp_fhi * alpha.clamp(max=1.0)
        boundary = image / alpha
        slope = (nyquist - image) / (nyquist - boundary)
        above = nyquist - slope * (nyquist - frequency)
        return torch.where(frequency <= boundary, alpha * frequency, above)

    def mask(self, mel: Tensor, plan: Plan, share: float = 1.0) -> Tensor:
        """SpecAugment on normalised log-mel [B, T, F], in place; masked cells become 0 or the mean
        over the clip as it was before.

        share: of the longest clip's length, which narrows the time masks alike.
        """
        rows = plan.masked.nonzero().flatten()
        if len(rows):
            width = max(1, round(self.augment.time_mask_width * share))
            time = self._hidden(plan.time_masks[rows], width, mel.shape[1])
            band = self._hidden(plan.freq_masks[rows], self.augment.freq_mask_width, mel.shape[2])
            rows, time, band = (x.to(mel.device, non_blocking=True) for x in (rows, time, band))
            clips = mel[rows]
            fill = clips.mean((1, 2), keepdim=True) if self.augment.mask_value == "mean" else 0.0
            mel[rows] = torch.where(time.unsqueeze(2) | band.unsqueeze(1), fill, clips)
        return mel

    @staticmethod
    def _hidden(numbers: Tensor, width: int, size: int) -> Tensor:
        """Uniform numbers [n, masks, 2] -> [n, size] bool: union of masks narrower than width."""
        widths = (numbers[..., 0] * min(width, size + 1)).long()
        starts = (numbers[..., 1] * (size - widths + 1)).long()
        at = torch.arange(size)
        inside = (at >= starts.unsqueeze(-1)) & (at < (starts + widths).unsqueeze(-1))
        return inside.any(dim=1)


def chosen(factors: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Rows [n] of a plan's factors [B] that are not NaN, and their factors [n], on `device`; a
    copy that waited would wait for everything that the device still does."""
    rows = factors.isnan().logical_not_().nonzero().flatten()
    return tuple(value.to(device, non_blocking=True) for value in (rows, factors[rows]))


def time_stretch(clip: Tensor, rate: Tensor, sample_rate: int) -> tuple[Tensor, Tensor]:
    """Change the tempo of clips [n, S] by their rates [n]; rate > 1 is faster; the pitch stays.

    A phase vocoder: magnitudes interpolated between analysis frames, phases advanced by what the
    analysis saw between them. Analysis and synthesis use one hop, so that advance needs no
    unwrapping. Bins drift out of phase on the way, which costs a noise-like sound some 3 dB; each
    clip gets the rms of what it was made from back. Only the first S samples are computed.

    Returns:
        [n, S], and the samples of it that were filled, [n] int64: min(S, round(S / rate)).
    """
    n_fft = 1 << round(math.log2(STRETCH_SECONDS * sample_rate))
    hop, samples = n_fft // STRETCH_OVERLAP, clip.shape[1]
    window = torch.hann_window(n_fft, device=clip.device)
    spectrum = torch.stft(
        clip, n_fft, hop, window=window, pad_mode="constant", return_complex=True
    )  # [n, K, T]
    frames = spectrum.shape[2]
    position = torch.arange(frames, device=clip.device) * rate.unsqueeze(1)  # [n, T]
    position = position.clamp(max=frames - 1.0)
    before = position.long().clamp(max=frames - 2)
    share = (position - before).unsqueeze(1)
    # |z| by its square, and phases as unit phasors, cost a fraction of abs, angle, cos and sin
    power = spectrum.real.square() + spectrum.imag.square()
    # a phasor from a subnormal power is not of length 1, and its powers leave the range of floats
    normal = power >= torch.finfo(power.dtype).tiny
    phasor = torch.where(normal, spectrum * power.rsqrt(), 1.0)
    magnitude = power.sqrt_()
    index = before.unsqueeze(1).expand_as(spectrum)
    now, then = magnitude.gather(2, index), magnitude.gather(2, index + 1)
    advance = (phasor[:, :, 1:] * phasor[:, :, :-1].conj()).gather(2, index[:, :, :-1])
    phase = torch.cat([phasor[:, :, :1], advance], dim=2).cumprod(2)
    out = _overlap_add(torch.lerp(now, then, share.to(now.dtype)) * phase, window, samples)
    length = (samples / rate).round().long().clamp(max=samples)
    used = (samples * rate).round().long().clamp(max=samples)
    gain = _rms(clip, used) / _rms(out, length).clamp(min=torch.finfo(out.dtype).tiny)
    return out * gain.unsqueeze(1), length


def _overlap_add(spectrum: Tensor, window: Tensor, samples: int) -> Tensor:
    """Centred inverse STFT, [n, K, T] -> [n, samples]; torch.istft at a quarter of its time."""
    n_fft, hop = len(window), len(window) // STRETCH_OVERLAP
    frames = torch.fft.irfft(spectrum.transpose(1, 2), n=n_fft) * window  # [n, T, n_fft]
    parts = frames.unflatten(2, (STRETCH_OVERLAP, hop))
    weights = window.square().view(STRETCH_OVERLAP, 1, hop)
    total = frames.new_zeros(len(frames), frames.shape[1] + STRETCH_OVERLAP - 1, hop)
    weight = frames.new_zeros(total.shape[1:])
    for i in range(STRETCH_OVERLAP):
        total[:, i : i + frames.shape[1]] += parts[:, :, i]
        weight[i : i + frames.shape[1]] += weights[i]
    inside = slice(n_fft // 2, n_fft // 2 + samples)
    return total.flatten(1)[:, inside] / weight.flatten()[inside]


def _rms(clip: Tensor, length: Tensor) -> Tensor:
    """Root mean square of the first `length` [n] samples of clips [n, S] -> [n]."""
    inside = torch.arange(clip.shape[1], device=clip.device) < length.unsqueeze(1)
    return (clip.square().where(inside, 0.0).sum(dim=1) / length).sqrt()
