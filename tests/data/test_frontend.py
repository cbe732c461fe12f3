"""The front end against torchaudio's Kaldi code, the transformers extractor, and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional
from torchaudio.compliance.kaldi import fbank

from data.audio import read_recording, resample
from data.augment import Augmentation
from data.config import AudioConfig, AugmentConfig
from data.frontend import AudioFrontend, Backend, mel_bank, pad_batch, pad_clip

SECONDS = 1.5
PAPER = dict(frame_length_ms=40.0, frame_shift_ms=10.0, low_freq=100.0, high_freq=8000.0)


def make(n_mels: int = 128, n_frames: int = 1024, augment: dict | None = None, **audio):
    """Front end at the paper's settings but for those given."""
    audio = AudioConfig(**audio)
    augmentation = Augmentation(AugmentConfig(**augment), audio.sample_rate) if augment else None
    return AudioFrontend(audio, n_mels, n_frames, augmentation)


def _signals(rate: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    n = int(SECONDS * rate)
    noise = torch.randn(n, generator=generator)
    time = torch.arange(n, dtype=torch.float64) / rate

    def tone(frequency, amplitude=0.5):
        return (amplitude * torch.sin(2 * math.pi * frequency * time)).float()

    return {
        "noise": 0.1 * noise,
        "quiet noise": 1e-4 * noise,
        "offset": 0.9 + 1e-4 * noise,
        "drift": 1e-4 * noise + tone(0.7, 0.9),
        "quietest tone": tone(0.2799 * rate, 5.3e-6),  # one band above the floor
        "tone 50": tone(50.0, 0.9),
        "tone 1000": tone(1000.0, 1.0),
        "tone off the grid": tone(0.34 * rate),
        "two tones": tone(500.0) + tone(rate / 4, 0.4),
        "square": torch.sign(tone(100.1)),
        "chirp": (0.3 * torch.sin(math.pi * rate / 2 / SECONDS * time**2)).float(),
        "impulses": (torch.arange(n) % 8000 == 0).float(),
        "half silent": torch.cat([noise[: n // 2], torch.zeros(n - n // 2)]),
        "silence": torch.zeros(n),
    }


def _kaldi(clip: torch.Tensor, rate: int, n_mels: int, settings: dict) -> torch.Tensor:
    return fbank(
        clip.unsqueeze(0),
        sample_frequency=float(rate),
        num_mel_bins=n_mels,
        frame_length=settings["frame_length_ms"],
        frame_shift=settings["frame_shift_ms"],
        low_freq=settings["low_freq"],
        high_freq=settings["high_freq"],
        window_type="hanning",
    )


def _check(clip: torch.Tensor, rate: int, n_mels: int, settings: dict, name: str) -> None:
    """Our largest error against float64 is at most 1.5 times that of torchaudio's float32 code."""
    frontend = make(n_mels, sample_rate=rate, clip_seconds=len(clip) / rate, **settings)
    ours = frontend.log_mel(clip.unsqueeze(0))
    assert ours.dtype == torch.float32
    exact = _kaldi(clip.double(), rate, n_mels, settings)
    assert ours.shape[1:] == exact.shape
    error = (ours[0] - exact).abs().max().item()
    theirs = (_kaldi(clip, rate, n_mels, settings) - exact).abs().max().item()
    assert error <= 1.5 * theirs, f"{name}: {error:.1e} against torchaudio's {theirs:.1e}"
    assert error < 2e-6, name  # float32 of numbers up to 16


@pytest.mark.parametrize(
    ("rate", "n_mels", "settings"),
    [
        (16000, 128, PAPER),
        (16000, 128, PAPER | {"frame_length_ms": 25.0, "low_freq": 20.0}),
        (16000, 64, PAPER | {"frame_length_ms": 25.0, "frame_shift_ms": 12.5}),
        (16000, 40, PAPER | {"frame_length_ms": 64.0, "frame_shift_ms": 7.0}),  # no FFT padding
        (8000, 23, PAPER | {"high_freq": 3800.0}),
        (22050, 80, PAPER | {"frame_length_ms": 33.0, "frame_shift_ms": 11.0}),
        (4000, 128, PAPER | {"high_freq": 2000.0}),  # more bands than bins in places: empty bands
    ],
)
def test_log_mel_is_kaldis(rate, n_mels, settings):
    for name, clip in _signals(rate).items():
        _check(clip, rate, n_mels, settings, name)


@pytest.mark.real
def test_log_mel_is_kaldis_on_real_recordings(icbhi_root):
    paths = sorted((icbhi_root / "recordings").glob("*.wav"))
    for path in paths[:: max(1, len(paths) // 5)]:
        samples, rate = read_recording(path)
        clip = torch.from_numpy(resample(samples[: 3 * rate], rate, 16000, "torchaudio"))
        _check(clip, 16000, 128, PAPER, path.name)


def test_mel_filters_are_those_of_a_numpy_implementation():
    from transformers.audio_utils import mel_filter_bank  # shares no code with torchaudio

    ours = mel_bank(16000 / 1024 * torch.arange(512), 128, 100.0, 8000.0)
    theirs = mel_filter_bank(
        513, 128, 100.0, 8000.0, 16000, mel_scale="kaldi", triangularize_in_mel_space=True
    )
    np.testing.assert_allclose(ours, theirs.T, atol=5e-5)


def test_every_clip_is_computed_by_itself():
    clips = torch.stack(list(_signals(16000).values()))
    frontend = make(clip_seconds=SECONDS)
    whole = frontend.log_mel(clips)
    for row, clip in zip(whole, clips, strict=True):
        assert torch.equal(row, frontend.log_mel(clip.unsqueeze(0))[0])


def test_the_dense_products_of_other_devices_agree():
    """What runs on CUDA, run here, with rows that have a mel bank of their own."""
    clips = torch.stack(list(_signals(16000).values()))
    frontend = make(clip_seconds=SECONDS, augment={"vtlp_probability": 0.5})
    banks = frontend._warped_banks(frontend.augmentation.draw(len(clips), seed=0))
    assert 0 < len(banks) < len(clips)
    dense = frontend._batch_log_mel(clips, banks)
    for row, clip in enumerate(clips.split(1)):
        own = {0: banks[row]} if row in banks else None
        assert torch.allclose(dense[row], frontend._clip_log_mel(clip, own)[0], atol=2e-6)


def test_augmenting_clips_is_augmenting_the_batch():
    """What a CPU does against what a GPU does; the noise samples alone may differ."""
    clips = torch.stack(list(_signals(16000).values()))
    length = torch.full((len(clips),), 9000)
    every = {f"{name}_probability": 0.5 for name in ("speed", "loudness", "vtlp", "specaugment")}
    frontend = make(clip_seconds=SECONDS, augment=every | {"noise_probability": 0.0})
    plan = frontend.augmentation.draw(len(clips), seed=1)
    batched = frontend._spectrogram(
        Backend(pad_batch, frontend._batch_log_mel), clips, length, plan
    )
    assert torch.allclose(frontend(clips, length, seed=1), batched, atol=1e-4)


def test_autocast_does_not_reach_the_front_end():
    clips = torch.stack(list(_signals(16000).values()))
    length = torch.full((len(clips),), clips.shape[1])
    frontend = make(clip_seconds=SECONDS)
    plain = frontend(clips, length)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = frontend(clips, length)
    assert cast.dtype == torch.float32
    assert torch.equal(plain, cast)


@pytest.mark.parametrize("seconds", [0.5, 10.0, 12.0])  # the last is cut to 1024 frames
def test_equals_the_transformers_feature_extractor(seconds):
    from transformers import ASTFeatureExtractor

    samples = int(16000 * seconds)
    clips = 0.1 * torch.randn(2, samples, generator=torch.Generator().manual_seed(0))
    theirs = ASTFeatureExtractor()(
        [clip.numpy() for clip in clips], sampling_rate=16000, return_tensors="pt"
    )["input_values"]  # [B, 1024, 128]
    frontend = make(
        clip_seconds=seconds, frame_length_ms=25.0, low_freq=20.0, high_freq=8000.0, fit="pad"
    )
    ours = frontend(clips, torch.tensor([samples, samples]))
    assert torch.allclose(ours[:, 0].transpose(1, 2), theirs, atol=3e-4)  # torchaudio's error


def test_normalisation_and_stretch():
    clips = 0.1 * torch.randn(2, 160000, generator=torch.Generator().manual_seed(0))
    out = make()(clips, torch.tensor([160000, 160000]))
    assert out.shape == (2, 1, 128, 1024)
    mel = torch.stack([_kaldi(clip, 16000, 128, PAPER) for clip in clips])
    assert mel.shape == (2, 997, 128)
    mel = (mel + 4.2677393) / (2 * 4.5689974)
    expected = functional.interpolate(
        mel.unsqueeze(1), size=(1024, 128), mode="bilinear", align_corners=False
    )
    assert torch.allclose(out, expected.transpose(2, 3), atol=2e-5)


def test_fewer_bands_are_stretched_as_frames_are():
    clip = 0.1 * torch.randn(1, 16000, generator=torch.Generator().manual_seed(0))
    length = torch.tensor([16000])
    masks = Augmentation(AugmentConfig(specaugment_probability=1.0), 16000)
    tall = AudioFrontend(AudioConfig(clip_seconds=1.0, n_mels=128), 256, 200, masks)
    plain = make(128, 97, clip_seconds=1.0)  # the frames as they are
    expected = functional.interpolate(plain(clip, length), size=(256, 200), mode="bilinear")
    assert torch.allclose(tall(clip, length), expected, atol=1e-5)
    assert torch.allclose(tall.traced(clip, length, 16000), expected, atol=1e-4)
    assert tall(clip, length, seed=0).shape == (1, 1, 256, 200)


def test_pad_cuts_what_is_too_long():
    clip = torch.randn(1, 16000, generator=torch.Generator().manual_seed(0))
    frontend = make(clip_seconds=1.0, fit="pad", n_frames=50)
    out = frontend(clip, torch.tensor([16000]))
    assert torch.equal(
        out[0, 0], frontend.normalise(frontend.log_mel(clip)[0]).T[:, :50].contiguous()
    )


def _naive_pad(cycle: list[float], samples: int, pad_type: str, fade: int) -> list[float]:
    """The rule, sample by sample."""
    n = len(cycle)
    if n >= samples:
        return cycle[:samples]
    if pad_type == "zero":
        before = (samples - n) // 2
        return [0.0] * before + cycle + [0.0] * (samples - n - before)
    if pad_type == "tile":
        whole = np.tile(cycle, math.ceil(samples / n))[:samples]
        left = np.arange(samples)[::-1]  # samples that follow
        return (whole * np.minimum(left / (fade - 1), 1.0)).tolist()
    out = []
    copies = math.ceil(samples / n)
    for copy in range(copies):
        for i, value in enumerate(cycle):
            if n > fade:
                if copy > 0 and i < fade:
                    value *= i / (fade - 1)
                if copy < copies - 1 and i >= n - fade:
                    value *= (n - 1 - i) / (fade - 1)
            out.append(value)
    return out[:samples]


@pytest.mark.parametrize("pad_type", ["repeat", "tile", "zero"])
def test_padding_equals_the_naive_loop(pad_type):
    samples, fade = 400, 25
    lengths = [1, 24, 25, 26, 30, 49, 50, 51, 100, 199, 200, 201, 399, 400, 401, 450]
    random = np.random.default_rng(0)
    wave = torch.zeros(len(lengths), max(lengths))
    for row, n in zip(wave, lengths, strict=True):
        row[:n] = torch.from_numpy(random.standard_normal(n).astype(np.float32))
    batched = pad_batch(wave, torch.tensor(lengths), samples, pad_type, fade)
    for other, row, n in zip(batched, wave, lengths, strict=True):
        expected = torch.tensor(_naive_pad(row[:n].tolist(), samples, pad_type, fade))
        clip = pad_clip(row.unsqueeze(0), torch.tensor([n]), samples, pad_type, fade)
        assert torch.allclose(clip[0], expected, atol=1e-6), n
        assert torch.allclose(other, expected, atol=1e-6), n


def test_tiled_front_end_of_the_kaist_line():
    """Numbers that the authors' own functions give for two tones of 1.5 s in a clip of 8 s."""
    at = torch.arange(24000.0)  # the rounding of the phases is part of the numbers
    tones = (torch.sin(2 * math.pi * f * at / 16000) for f in (200, 1500))
    sound = sum(a * tone for a, tone in zip((0.1, 0.02), tones, strict=True))
    tiled = {"clip_seconds": 8.0, "pad_type": "tile", "frame_length_ms": 25.0, "low_freq": 20.0}
    frontend = make(n_frames=798, **tiled)
    batch = sound.unsqueeze(0), torch.tensor([24000])
    clip = frontend.clips(*batch)[0]
    expected = {24000: 0.0, -1000: 0.019997, -500: -0.042882, -1: 0.0}
    for at, value in expected.items():
        assert clip[at].item() == pytest.approx(value, abs=1e-5)
    mel = frontend(*batch)[0, 0].T  # [798, 128]
    assert mel.shape == (798, 128)
    assert mel.mean().item() == pytest.approx(-1.034497, abs=1e-4)
    assert mel.std().item() == pytest.approx(0.469194, abs=1e-4)
    cells = {(0, 10): 0.391142, (100, 20): -0.828728, (400, 60): -0.724335, (797, 127): -1.277594}
    for cell, value in cells.items():
        assert mel[cell].item() == pytest.approx(value, abs=1e-4)


def test_a_clip_shorter_than_its_fade_is_tiled():
    frontend = make(clip_seconds=0.05, pad_type="tile")
    clip = frontend.clips(torch.ones(1, 300), torch.tensor([300]))[0]
    assert torch.allclose(clip, torch.linspace(1, 0, 800), atol=1e-6)


def test_paper_fade_and_clip_length():
    """250 samples of fade at 16 kHz, clips of exactly 10 s."""
    frontend = make()
    clip = frontend.clips(torch.ones(1, 1000), torch.tensor([1000]))[0]
    assert clip.shape == (160000,)
    assert (clip[:750] == 1).all()
    assert clip[999] == clip[1000] == 0
    assert (clip[1250:1750] == 1).all()
    assert 0 < clip[1249 - 1] < 1
    assert (clip[-750:] == 1).all()  # the last copy does not fade out


def test_no_gradient_and_no_state():
    frontend = make(clip_seconds=0.5, augment={"noise_probability": 1.0})
    assert not list(frontend.parameters())
    assert not frontend.state_dict()
    out = frontend(torch.randn(2, 8000), torch.tensor([8000, 4000]), seed=1)
    assert not out.requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_equals_cpu():
    wave = torch.stack(list(_signals(16000).values()))
    length = torch.randint(100, wave.shape[1], (len(wave),))
    for i, n in enumerate(length):
        wave[i, n:] = 0
    frontend = make(clip_seconds=SECONDS)
    cpu = frontend(wave, length)
    cuda = frontend.cuda()(wave.cuda(), length.cuda()).cpu()
    assert torch.allclose(cpu, cuda, atol=1e-5)
