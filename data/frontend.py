"""The front end: waveform batch in, log-mel batch out, on whatever device the batch lies.

B clips, S samples, T frames, F mel bands, K FFT bins. The log-mel is that of
`torchaudio.compliance.kaldi.fbank` (Hann window, no dither, power spectrum), computed in float64
up to the power spectrum whatever autocast or TF32 settings say. A CPU takes clip by clip, a GPU
the whole batch; the `Backend` is chosen once per call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from data.augment import Augmentation, Plan, chosen
from data.config import AudioConfig
from data.loader import buckets_of

PREEMPHASIS = 0.97
#: Floor of the mel energies before the logarithm, as in Kaldi's float32 code.
FLOOR = torch.finfo(torch.float32).eps
#: Mel energy below which, in all bands, the CPU sums in float64: where nothing is loud, torchaudio
#: itself is exact to float32's last bit, and float32 sums would be the largest error left here.
QUIET = math.exp(-8)
#: Frames that the CPU takes at a time: frames, spectra and bands then stay in the cache.
CPU_FRAMES = 256
#: Clips that a GPU takes at a time: some 25 MB each.
GPU_CLIPS = 64
#: Bands that one product of the mel bank makes on the CPU, see `band_blocks`.
BLOCK_BANDS = 16


def mel_bank(bins: Tensor, n_mels: int, low_freq: float, high_freq: float) -> Tensor:
    """Triangular mel filters over the FFT's bins, Kaldi's: no weight at the Nyquist bin.

    The mel scale is Kaldi's 1127 ln(1 + f / 700). The arithmetic is float32 and in torchaudio's
    order, so that the filters agree to the last bit: an exact bank would differ from torchaudio's
    by more than all other rounding together.

    Args:
        bins: [..., n_fft / 2] Hz, where each bin but Nyquist's is, or is to appear.

    Returns:
        [..., n_mels, n_fft / 2 + 1] float32.
    """
    low, high = (1127.0 * math.log(1.0 + f / 700.0) for f in (low_freq, high_freq))
    delta = (high - low) / (n_mels + 1)
    band = torch.arange(n_mels).unsqueeze(1)
    left, centre, right = low + band * delta, low + (band + 1.0) * delta, low + (band + 2.0) * delta
    mel = (1127.0 * torch.log(1.0 + bins / 700.0)).unsqueeze(-2)
    slopes = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre))
    return functional.pad(slopes.clamp(min=0.0), (0, 1))


def band_blocks(bank: Tensor, size: int) -> list[tuple[slice, slice, Tensor]]:
    """Cut a bank [F, K] into blocks of `size` bands, each with only the bins it touches.

    A filter covers few bins, so the blocks' products cost a quarter of the dense one. Each weight
    is there twice, for the squared real and imaginary part that lie side by side in an FFT.

    Returns:
        (bands, columns of the interleaved spectrum, weights [2 k, size]) per block.
    """
    blocks = []
    for start in range(0, bank.shape[0], size):
        part = bank[start : start + size]
        used = part.any(dim=0).nonzero().flatten()
        first, stop = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
        weights = part[:, first:stop].repeat_interleave(2, dim=1).t().contiguous()
        bands = slice(start, start + part.shape[0])
        blocks.append((bands, slice(2 * first, 2 * stop), weights))
    return blocks


class Backend(NamedTuple):
    """The two steps that a CPU and a GPU do differently: `pad_clip` and
    `AudioFrontend._clip_log_mel`, or `pad_batch` and `AudioFrontend._batch_log_mel`."""

    pad: Callable[..., Tensor]
    log_mel: Callable[..., Tensor]


class AudioFrontend(nn.Module):
    """Waveforms -> normalised log-mel spectrograms of the size the transformer takes.

    Padding to the clip length; augmentation (with a seed only); log-mel as
    `torchaudio.compliance.kaldi.fbank(window_type="hanning")`; (x - mean) / (2 std); SpecAugment;
    stretching or padding to `n_frames`. It has no parameters and takes no gradient.

    With `audio.buckets` the clip of a batch is the shortest that holds its S samples, and T is that
    share of `n_frames` (the width of time masks, too, is that share of theirs).

    Args:
        audio: rate, clip length, padding, analysis frames, mel bank, normalisation, fit. `fit: pad`
            means log-mel 0 before normalisation, which is what the AST's own feature extractor
            feeds it.
        n_mels, n_frames: size of the output, F and T, of the longest clip. With `audio.n_mels` the
            mel bank has that many bands (`self.n_mels`), and the spectrogram is stretched to F.
        augmentation: applied when `forward` gets a seed; None: never.
    """

    def __init__(
        self,
        audio: AudioConfig,
        n_mels: int,
        n_frames: int,
        augmentation: Augmentation | None = None,
    ):
        super().__init__()
        self.audio, self.n_mels = audio, audio.n_mels or n_mels
        self.size = (n_mels, n_frames)
        self.augmentation = augmentation
        self.clip_samples = audio.clip_samples  # of each bucket
        share = 16 if audio.pad_type == "tile" else 64
        self.fade = min(audio.sample_rate // share, self.clip_samples[0])  # samples
        self.frame_length = int(audio.sample_rate * audio.frame_length_ms * 0.001)
        self.frame_shift = int(audio.sample_rate * audio.frame_shift_ms * 0.001)
        self.n_fft = 1 << (self.frame_length - 1).bit_length()
        window = torch.hann_window(self.frame_length, periodic=False, dtype=torch.float64)[1:]
        self.bins = (audio.sample_rate / self.n_fft) * torch.arange(self.n_fft / 2)  # Hz
        bank = mel_bank(self.bins, self.n_mels, audio.low_freq, audio.high_freq)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("bank", bank.t().double(), persistent=False)  # [K, F]
        self._blocks = band_blocks(bank, BLOCK_BANDS)

    def forward(self, waveform: Tensor, length: Tensor, seed: int | None = None) -> Tensor:
        """waveform [B, S], length [B] (samples) -> [B, 1, F, T] float32.

        seed: of this batch's augmentation; None: no augmentation.
        """
        shape = (1, self.size[0], self.frames(self._samples(waveform)))
        return self._run(self._spectrogram, shape, seed, waveform, length)

    def clips(self, waveform: Tensor, length: Tensor, seed: int | None = None) -> Tensor:
        """The waveforms that `forward` transforms, padded and augmented: [B, samples]."""
        return self._run(self._clip, (self._samples(waveform),), seed, waveform, length)

    def transform(self, clips: Tensor, seed: int | None = None) -> Tensor:
        """What `forward` makes of the clips [B, samples] that `clips` gave for the same seed."""
        shape = (1, self.size[0], self.frames(clips.shape[1]))
        return self._run(self._transform, shape, seed, clips)

    def frames(self, samples: int) -> int:
        """T of a clip of so many samples."""
        return round(self.size[1] * self._share(samples))

    def _share(self, samples: int) -> float:
        """Of the longest clip."""
        return samples / self.clip_samples[-1]

    def _samples(self, waveform: Tensor) -> int:
        """Samples of the clips that a batch [B, S] is padded to."""
        return self.clip_samples[buckets_of(waveform.shape[1], self.clip_samples)]

    @torch.no_grad()
    def _run(
        self,
        stage: Callable[..., Tensor],
        shape: tuple[int, ...],
        seed: int | None,
        waveform: Tensor,
        *length: Tensor,
    ) -> Tensor:
        """A stage of the front end, [B, *shape], on the back end of the device."""
        batch = (waveform.float(), *length)
        if seed is not None and self.augmentation is not None:
            batch += (self.augmentation.draw(len(waveform), seed),)
        with torch.autocast(waveform.device.type, enabled=False):
            if waveform.device.type == "cpu":
                backend = Backend(pad_clip, self._clip_log_mel)
                return for_each_clip(partial(stage, backend), shape, *batch)
            return stage(Backend(pad_batch, self._batch_log_mel), *batch)

    def _clip(
        self, backend: Backend, waveform: Tensor, length: Tensor, plan: Plan | None = None
    ) -> Tensor:
        samples = self._samples(waveform)
        shape = {"samples": samples, "pad_type": self.audio.pad_type, "fade": self.fade}
        clip = backend.pad(waveform, length, **shape)
        if plan is not None:
            self.augmentation.noise(clip, plan)
            rows, stretched, filled = self.augmentation.speed(clip, plan)
            if len(rows):
                clip[rows] = backend.pad(stretched, filled, **shape)
            self.augmentation.loudness(clip, plan)
        return clip

    def _spectrogram(
        self, backend: Backend, waveform: Tensor, length: Tensor, plan: Plan | None = None
    ) -> Tensor:
        clip = self._clip(backend, waveform, length, plan)  # [B, samples]
        return self._transform(backend, clip, plan)

    def _transform(self, backend: Backend, clip: Tensor, plan: Plan | None = None) -> Tensor:
        if plan is None:
            return self._fitted(self.normalise(backend.log_mel(clip)), clip.shape[1])
        mel = self.normalise(backend.log_mel(clip, self._warped_banks(plan)))  # [B, T, F]
        masked = self.augmentation.mask(mel, plan, self._share(clip.shape[1]))
        return self._fitted(masked, clip.shape[1])

    def traced(self, waveform: Tensor, length: Tensor, samples: int) -> Tensor:
        """`forward` without augmentation as one batched expression, whatever the device: what
        torch.export takes, for clips of so many samples."""
        clip = pad_batch(waveform, length, samples, self.audio.pad_type, self.fade)
        energy = self._power(*self._frames(clip)) @ self.bank
        return self._fitted(self.normalise(self._log(energy.float())), samples)

    def normalise(self, mel: Tensor) -> Tensor:
        """(x - mean) / (2 std), the AST's convention."""
        return (mel - self.audio.mean) / (2 * self.audio.std)

    def log_mel(self, clip: Tensor) -> Tensor:
        """[B, S] -> [B, T, F] float32, natural logarithm of the mel energies."""
        if clip.device.type == "cpu":
            frames = (clip.shape[1] - self.frame_length) // self.frame_shift + 1
            return for_each_clip(self._clip_log_mel, (frames, self.n_mels), clip)
        return self._batch_log_mel(clip)

    def _warped_banks(self, plan: Plan) -> dict[int, Tensor]:
        """Mel banks [F, K] of the rows that VTLP takes."""
        rows, factors = chosen(plan.vtlp)
        if len(rows) == 0:
            return {}
        bins = self.augmentation.warp(self.bins, factors)
        banks = mel_bank(bins, self.n_mels, self.audio.low_freq, self.audio.high_freq)
        return dict(zip(rows.tolist(), banks, strict=True))

    def _batch_log_mel(self, clip: Tensor, banks: dict[int, Tensor] | None = None) -> Tensor:
        """[B, S] -> [B, T, F], batched, for the GPU.

        banks: mel bank [F, K] of each row that has its own.
        """
        parts = clip.split(GPU_CLIPS)
        energy = torch.cat([self._power(*self._frames(part)) @ self.bank for part in parts])
        if banks:
            # non_blocking: a copy that waited would wait for the whole step before it
            rows = torch.tensor(list(banks)).to(clip.device, non_blocking=True)
            own = torch.stack(list(banks.values())).transpose(1, 2)  # [n, K, F]
            own = own.to(energy, non_blocking=True)
            energy[rows] = self._power(*self._frames(clip[rows])) @ own
        return self._log(energy.float())

    def _clip_log_mel(self, clip: Tensor, banks: dict[int, Tensor] | None = None) -> Tensor:
        """The same for one clip, [1, S] -> [1, T, F], some frames at a time."""
        blocks = band_blocks(banks[0], BLOCK_BANDS) if banks else self._blocks
        frames, offset = self._frames(clip)
        out = clip.new_empty(1, frames.shape[1], self.n_mels)
        buffer = offset.new_zeros(CPU_FRAMES, self.n_fft)
        for start in range(0, frames.shape[1], CPU_FRAMES):
            part = slice(start, start + CPU_FRAMES)
            self._chunk(frames[0, part], offset[0, part], blocks, buffer, out[0, part])
        return out

    def _frames(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-emphasised frames [B, T, L - 1] float64 (a view) and their offset [B, T, 1].

        Kaldi removes each frame's mean m before the pre-emphasis. Both are linear:
        (x_j - m) - 0.97 (x_{j-1} - m) = (x_j - 0.97 x_{j-1}) - 0.03 m, so one pass over the clip
        serves all the frames that overlap, and 0.03 m is the offset to subtract. A frame's first
        sample is left out: the Hann window is zero there.

        float64 up to the power spectrum, because a tone's leakage in distant bands lies at the
        rounding error of a float32 FFT.
        """
        x = clip.double()
        signal = torch.sub(x[:, 1:], x[:, :-1], alpha=PREEMPHASIS)
        frames = signal.unfold(-1, self.frame_length - 1, self.frame_shift)
        block = math.gcd(self.frame_length, self.frame_shift)
        sums = x[:, : x.shape[1] // block * block].unflatten(-1, (-1, block)).sum(-1)
        sums = sums.unfold(-1, self.frame_length // block, self.frame_shift // block)
        return frames, sums.sum(-1, keepdim=True) * ((1 - PREEMPHASIS) / self.frame_length)

    def _power(self, frames: Tensor, offset: Tensor) -> Tensor:
        """Power spectra [B, T, K] float64 of all frames at once."""
        spectrum = torch.fft.rfft((frames - offset) * self.window, n=self.n_fft)
        return spectrum.abs().square_()

    def _chunk(
        self, frames: Tensor, offset: Tensor, blocks: list, buffer: Tensor, out: Tensor
    ) -> None:
        """Log-mel of some frames [t, L - 1], through buffer [>= t, n_fft], to out [t, F]."""
        buffer = buffer[: len(frames)]
        windowed = buffer[:, : frames.shape[1]]  # the rest stays zero
        torch.sub(frames, offset, out=windowed)
        windowed.mul_(self.window)
        spectrum = torch.view_as_real(torch.fft.rfft(buffer)).flatten(1)  # [t, 2 K]
        power = spectrum.float().square_()
        for bands, columns, weights in blocks:
            torch.mm(power[:, columns], weights, out=out[:, bands])
        if out.max() < QUIET:
            for bands, columns, weights in blocks:
                out[:, bands] = self._log(spectrum[:, columns].square() @ weights.double())
        else:
            self._log(out)

    @staticmethod
    def _log(energy: Tensor) -> Tensor:
        return energy.clamp_(min=FLOOR).log_()

    def _fitted(self, mel: Tensor, samples: int) -> Tensor:
        """Normalised log-mel of clips of so many samples -> [B, 1, F, T], by `fit`."""
        height, width = self.size[0], self.frames(samples)
        if self.n_mels != height:
            mel = functional.interpolate(mel.contiguous(), size=height, mode="linear")
        mel = mel.transpose(1, 2)  # [B, F, frames of the analysis]
        if self.audio.fit == "stretch":
            mel = functional.interpolate(mel.contiguous(), size=width, mode="linear")
        else:
            missing = width - mel.shape[-1]  # negative: the clip's last frames are cut
            empty = self.normalise(torch.tensor(0.0)).item()
            mel = functional.pad(mel, (0, missing), value=empty)
        return mel.unsqueeze(1).contiguous()


def for_each_clip(
    function: Callable[..., Tensor], shape: tuple[int, ...], *batch: Tensor | Plan
) -> Tensor:
    """`function` of every clip of a batch as a batch of one, [B, *shape], on torch's CPU threads.

    Within such a thread torch computes alone, without gradients. Threads that share every single
    operation, torch's way, wait for each other some hundred times a clip, which on a busy machine
    takes most of the time.
    """
    clips, threads = len(batch[0]), torch.get_num_threads()
    with torch.inference_mode(False):  # other threads may not write to an inference tensor
        out = torch.empty(clips, *shape)

    def one(clip: int) -> None:  # a thread's memory, freed by itself, is reused without page faults
        out[clip] = function(*(part[clip : clip + 1] for part in batch))[0]

    if min(threads, clips) < 2:
        for clip in range(clips):
            one(clip)
        return out
    # The number of threads is each thread's own; it is also the default of threads yet to come,
    # which is put back.
    with ThreadPoolExecutor(min(threads, clips), initializer=_alone) as pool:
        list(pool.map(one, range(clips)))
    torch.set_num_threads(threads)
    return out


def _alone() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


def pad_clip(waveform: Tensor, length: Tensor, samples: int, pad_type: str, fade: int) -> Tensor:
    """Bring a cycle [1, S] of `length` [1] samples to [1, samples].

    A longer cycle is cut. "zero": the cycle in the middle, zeros around it. "repeat": copies of
    the cycle, the last one cut; each but the first fades in over `fade` samples, each but the
    last fades out (linear, torchaudio.transforms.Fade's ramp k / (fade - 1)). A cycle that is not
    longer than the fade is repeated as it is. "tile": copies as they are, of which only the last
    `fade` samples of the clip fade out. Slices copy far faster on a CPU than a gather.
    """
    n = min(int(length), samples)
    if n == 0:
        raise ValueError("a cycle without samples cannot become a clip")
    cycle, out = waveform[0, :n], waveform.new_zeros(samples)
    if pad_type == "zero" or n == samples:
        start = (samples - n) // 2
        out[start : start + n] = cycle
        return out.unsqueeze(0)
    ramp = torch.linspace(0, 1, fade, dtype=cycle.dtype)
    if pad_type == "tile":
        out = cycle.repeat(-(-samples // n))[:samples]
        out[-fade:] *= ramp.flip(0)
        return out.unsqueeze(0)
    first, middle, last = cycle.clone(), cycle.clone(), cycle.clone()
    if n > fade:
        for copy in (middle, last):
            copy[:fade] *= ramp
        for copy in (first, middle):
            copy[-fade:] *= ramp.flip(0)
    whole = (samples - 1) // n - 1  # copies between the first and the last
    out[:n] = first
    if whole > 0:
        out[n : n + whole * n].view(whole, n).copy_(middle)
    out[(whole + 1) * n :] = last[: samples - (whole + 1) * n]
    return out.unsqueeze(0)


def pad_batch(waveform: Tensor, length: Tensor, samples: int, pad_type: str, fade: int) -> Tensor:
    """The same for cycles [B, S] of lengths [B], by one gather without a host sync."""
    device = waveform.device
    n = length.to(device, non_blocking=True).clamp(max=samples).unsqueeze(1)  # [B, 1]
    at = torch.arange(samples, device=device)  # [samples]
    if pad_type == "zero":
        source = at - (samples - n) // 2
        inside = (source >= 0) & (source < n)
        clip = waveform.gather(1, source.clamp(0, waveform.shape[1] - 1))
        return torch.where(inside, clip, 0.0)
    source, copy = at % n, at // n
    clip = waveform.gather(1, source)
    ramp = torch.linspace(0, 1, fade, dtype=clip.dtype, device=device)
    if pad_type == "tile":
        faded = (at >= samples - fade) & (n < samples)
        return torch.where(faded, clip * ramp[(samples - 1 - at).clamp(max=fade - 1)], clip)
    fades_in = (copy > 0) & (source < fade) & (n > fade)
    fades_out = (copy < copy[:, -1:]) & (n - 1 - source < fade) & (n > fade)
    clip = torch.where(fades_in, clip * ramp[source.clamp(max=fade - 1)], clip)
    return torch.where(fades_out, clip * ramp[(n - 1 - source).clamp(max=fade - 1)], clip)
