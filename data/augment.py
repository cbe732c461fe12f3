"""Batched augmentation, on the device: noise, time-stretch, loudness, VTLP, SpecAugment.

B clips, S samples, T frames, F mel bands. What happens to which clip is drawn from the batch's
own seed on the CPU, so that the plan is the same on every device and no global generator is
touched; the costly transforms then run on the chosen clips only. Order: noise, time-stretch,
loudness (waveform), VTLP (mel bank), SpecAugment (normalised log-mel).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Phase vocoder's analysis window (64 ms at 16 kHz) and the share of it between two frames.
STRETCH_SECONDS = 0.064
STRETCH_OVERLAP = 4


@dataclass
class Plan:
    """What happens to a batch; all on the CPU. Pairs are (rows [n] int64, factors [n] float32).

    Attributes:
        noise: factors are the noise's rms, or SNRs in dB.
        speed, loudness, vtlp: factors as in the configuration.
        masked: rows [n] that SpecAugment takes.
        freq_masks, time_masks: [n, masks, 2] uniform numbers for width and start.
        noise_seed: of the samples' own generator, which lives on the device.
    """

    noise: tuple[Tensor, Tensor]
    speed: tuple[Tensor, Tensor]
    loudness: tuple[Tensor, Tensor]
    vtlp: tuple[Tensor, Tensor]
    masked: Tensor
    freq_masks: Tensor
    time_masks: Tensor
    noise_seed: int

    def only(self, row: int) -> Plan:
        """The plan of one clip, as a batch of its own."""

        def pick(rows: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
            here = rows == row
            return torch.zeros_like(rows[here]), factors[here]

        here = self.masked == row
        return Plan(
            noise=pick(*self.noise),
            speed=pick(*self.speed),
            loudness=pick(*self.loudness),
            vtlp=pick(*self.vtlp),
            masked=torch.zeros_like(self.masked[here]),
            freq_masks=self.freq_masks[here],
            time_masks=self.time_masks[here],
            noise_seed=self.noise_seed + row,
        )


class Augmentation:
    """Per-clip random transforms. Every probability is per clip; 1 means always.

    Args:
        noise_probability: additive white Gaussian noise, of rms `noise_rms` (full scale = 1), or,
            if `noise_snr_db` = (low, high) is given, at an SNR drawn from that range in dB,
            relative to the clip's own rms.
        speed_probability, speed_range: time-stretch by a phase vocoder (Flanagan and Golden,
            1966); factor > 1 is faster. Tempo changes, pitch stays. The clip keeps its length:
            what is longer is cut, what is shorter is padded as a short cycle would be.
        loudness_probability, loudness_range: amplitude factor over the whole clip.
        vtlp_probability, vtlp_range, vtlp_fhi: vocal tract length perturbation; see `warp`.
        specaugment_probability: SpecAugment (Park et al., Interspeech 2019, arXiv 1904.08779)
            without its time warp: `freq_masks` bands of width uniform in 0..freq_mask_width - 1
            and `time_masks` spans of 0..time_mask_width - 1 frames, set to zero.
        sample_rate: Hz.
    """

    def __init__(
        self,
        *,
        noise_probability: float = 0.1,
        noise_rms: float = 3.2e-3,
        noise_snr_db: Sequence[float] | None = None,
        speed_probability: float = 0.1,
        speed_range: Sequence[float] = (0.9, 1.1),
        loudness_probability: float = 0.1,
        loudness_range: Sequence[float] = (0.5, 2.0),
        vtlp_probability: float = 0.1,
        vtlp_range: Sequence[float] = (0.9, 1.1),
        vtlp_fhi: float = 4800.0,
        specaugment_probability: float = 0.3,
        freq_masks: int = 2,
        freq_mask_width: int = 48,
        time_masks: int = 2,
        time_mask_width: int = 160,
        sample_rate: int = 16000,
    ):
        self.noise_probability, self.noise_rms = noise_probability, noise_rms
        self.noise_snr_db = tuple(noise_snr_db) if noise_snr_db is not None else None
        self.speed_probability, self.speed_range = speed_probability, tuple(speed_range)
        self.loudness_probability, self.loudness_range = loudness_probability, tuple(loudness_range)
        self.vtlp_probability, self.vtlp_range = vtlp_probability, tuple(vtlp_range)
        self.specaugment_probability = specaugment_probability
        self.freq_masks, self.freq_mask_width = freq_masks, freq_mask_width
        self.time_masks, self.time_mask_width = time_masks, time_mask_width
        self.vtlp_fhi, self.sample_rate = vtlp_fhi, sample_rate

    def draw(self, batch: int, seed: int) -> Plan:
        """Decide what happens to `batch` clips: a pure function of (batch, seed).

        The same numbers are drawn whatever the probabilities, so switching one transform on or
        off leaves the others as they were.
        """
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        def chosen(probability: float, bounds: Sequence[float], neutral: float | None = None):
            take, low, high = uniform(batch) < probability, *bounds
            factor = low + (high - low) * uniform(batch)
            if neutral is not None:  # a factor that changes nothing costs nothing
                take &= factor != neutral
            rows = take.nonzero().flatten()
            return rows, factor[rows]

        noise = chosen(self.noise_probability, self.noise_snr_db or (self.noise_rms,) * 2)
        speed = chosen(self.speed_probability, self.speed_range, neutral=1.0)
        loudness = chosen(self.loudness_probability, self.loudness_range, neutral=1.0)
        vtlp = chosen(self.vtlp_probability, self.vtlp_range, neutral=1.0)
        masked = (uniform(batch) < self.specaugment_probability).nonzero().flatten()
        freq_masks = uniform(batch, self.freq_masks, 2)[masked]
        time_masks = uniform(batch, self.time_masks, 2)[masked]
        noise_seed = int(torch.randint(2**62, (), generator=generator))
        return Plan(noise, speed, loudness, vtlp, masked, freq_masks, time_masks, noise_seed)

    def augment_waveform(
        self, clip: Tensor, plan: Plan, pad: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Noise, time-stretch and loudness of clips [B, S], in place; returns them.

        pad: ([n, S], lengths [n]) -> [n, S] fills the clips that a faster tempo made shorter.
        """
        rows, factor = _sent(plan.noise, clip)
        if len(rows):
            generator = torch.Generator(clip.device).manual_seed(plan.noise_seed)
            white = torch.randn(
                len(rows), clip.shape[1], generator=generator, device=clip.device, dtype=clip.dtype
            )
            if self.noise_snr_db is not None:
                rms = clip[rows].square().mean(dim=1).sqrt()
                factor = rms * 10 ** (-factor / 20)
            clip[rows] += factor.unsqueeze(1) * white
        rows, factor = _sent(plan.speed, clip)
        if len(rows):
            clip[rows] = pad(*time_stretch(clip[rows], factor, self.sample_rate))
        rows, factor = _sent(plan.loudness, clip)
        if len(rows):
            clip[rows] *= factor.unsqueeze(1)
        return clip

    def warp(self, frequency: Tensor, alpha: Tensor) -> Tensor:
        """Frequencies [K] in Hz under warp factors alpha [n] -> [n, K] in Hz.

        Vocal tract length perturbation (Jaitly and Hinton, ICML WDLASL 2013, eq. 1): with the
        boundary b = f_hi min(alpha, 1) / alpha and Nyquist N,
        f' = alpha f for f <= b, else N - (N - f_hi min(alpha, 1)) / (N - b) (N - f).
        """
        nyquist = self.sample_rate / 2
        alpha = alpha.unsqueeze(1)  # [n, 1]
        image = self.vtlp_fhi * alpha.clamp(max=1.0)
        boundary = image / alpha
        slope = (nyquist - image) / (nyquist - boundary)
        above = nyquist - slope * (nyquist - frequency)
        return torch.where(frequency <= boundary, alpha * frequency, above)

    def mask(self, mel: Tensor, plan: Plan) -> Tensor:
        """SpecAugment on normalised log-mel [B, T, F], in place; masked cells become 0."""
        if len(plan.masked) == 0:
            return mel
        time = self._hidden(plan.time_masks, self.time_mask_width, mel.shape[1])
        band = self._hidden(plan.freq_masks, self.freq_mask_width, mel.shape[2])
        rows, time, band = _sent((plan.masked, time, band), mel)
        mel[rows] = mel[rows].masked_fill(time.unsqueeze(2) | band.unsqueeze(1), 0.0)
        return mel

    @staticmethod
    def _hidden(numbers: Tensor, width: int, size: int) -> Tensor:
        """Uniform numbers [n, masks, 2] -> [n, size] bool: union of masks narrower than width."""
        widths = (numbers[..., 0] * min(width, size + 1)).long()
        starts = (numbers[..., 1] * (size - widths + 1)).long()
        at = torch.arange(size)
        inside = (at >= starts.unsqueeze(-1)) & (at < (starts + widths).unsqueeze(-1))
        return inside.any(dim=1)


def _sent(values: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Small tensors of the plan on the device of `like`, without waiting for what it still does."""
    return [value.to(like.device, non_blocking=True) for value in values]


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
