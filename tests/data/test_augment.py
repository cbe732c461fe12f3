"""Each augmentation on signals whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from data.augment import Augmentation, time_stretch
from data.config import AudioConfig, AugmentConfig
from data.frontend import AudioFrontend

OFF = dict(
    noise_probability=0.0,
    speed_probability=0.0,
    loudness_probability=0.0,
    vtlp_probability=0.0,
    specaugment_probability=0.0,
)
ON = {name: 1.0 for name in OFF}
RATE = 16000


def _tone(frequency: float, seconds: float = 2.0, amplitude: float = 0.5) -> torch.Tensor:
    time = torch.arange(int(seconds * RATE), dtype=torch.float64) / RATE
    return (amplitude * torch.sin(2 * math.pi * frequency * time)).float()


def _noise(clips: int, seconds: float = 2.0, amplitude: float = 0.1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return amplitude * torch.randn(clips, int(seconds * RATE), generator=generator)


def _frontend(seconds: float = 2.0, **keys) -> AudioFrontend:
    audio = AudioConfig(clip_seconds=seconds)
    return AudioFrontend(audio, 128, 200, augmentation(**keys))


def augmentation(**keys) -> Augmentation:
    return Augmentation(AugmentConfig(**OFF | keys), RATE)


def _waveform(clips: torch.Tensor, seed: int = 0, **keys) -> torch.Tensor:
    """The clips after the waveform transforms."""
    return _frontend(clips.shape[1] / RATE, **keys).clips(clips, _full(clips), seed)


def _full(clips: torch.Tensor) -> torch.Tensor:
    return torch.full((len(clips),), clips.shape[1])


def _peak_frequency(clip: torch.Tensor) -> float:
    window = torch.hann_window(len(clip))
    return torch.fft.rfft(clip * window).abs().argmax().item() * RATE / len(clip)


def test_neutral_factors_change_nothing():
    clips = _noise(3)
    plain = _frontend()(clips, _full(clips))
    assert torch.equal(_frontend()(clips, _full(clips), seed=5), plain)
    neutral = dict(
        ON,
        noise_rms=0.0,
        speed_range=(1.0, 1.0),
        loudness_range=(1.0, 1.0),
        vtlp_range=(1.0, 1.0),
        freq_mask_width=1,
        time_mask_width=1,
    )
    assert torch.equal(_frontend(**neutral)(clips, _full(clips), seed=5), plain)


def test_no_seed_means_no_augmentation():
    clips = _noise(2)
    plain = AudioFrontend(AudioConfig(clip_seconds=2.0), 128, 200)
    assert torch.equal(_frontend(**ON)(clips, _full(clips)), plain(clips, _full(clips)))


def test_the_seed_alone_decides():
    clips, frontend = _noise(4), _frontend(**ON)
    before = clips.clone()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = frontend(clips, _full(clips), seed=11)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert torch.equal(frontend(clips, _full(clips), seed=11), first)
    assert not torch.equal(frontend(clips, _full(clips), seed=12), first)
    assert torch.equal(clips, before)


def test_clips_do_not_depend_on_their_neighbours():
    clips, frontend = _noise(6), _frontend(**dict.fromkeys(ON, 0.5))
    length = torch.tensor([32000, 20000, 9000, 300, 31999, 1])
    first = frontend(clips, length, seed=3)
    changed, kept = [0, 2, 4], [1, 3, 5]
    clips[changed] *= -3
    length[changed] = torch.tensor([17, 32000, 5000])
    again = frontend(clips, length, seed=3)
    assert torch.equal(again[kept], first[kept])
    assert not (again[changed] == first[changed]).flatten(1).all(dim=1).any()


def test_switching_one_off_leaves_the_others():
    some = {name: 0.1 for name in OFF}
    all_on, no_speed = augmentation(**some), augmentation(**some | {"speed_probability": 0.0})
    a, b = all_on.draw(64, seed=1), no_speed.draw(64, seed=1)
    assert not a.speed.isnan().all()
    assert b.speed.isnan().all()
    b.speed = a.speed
    for name, value in vars(a).items():
        assert torch.equal(value.nan_to_num(-1), getattr(b, name).nan_to_num(-1)), name


def test_decisions_come_with_their_probabilities():
    plan = augmentation(
        noise_probability=0.1,
        speed_probability=0.25,
        loudness_probability=0.5,
        vtlp_probability=1.0,
        specaugment_probability=0.3,
    ).draw(20000, seed=0)
    noisy, faster = ~plan.noise.isnan(), ~plan.speed.isnan()
    for taken, probability in (
        (noisy, 0.1),
        (faster, 0.25),
        (~plan.loudness.isnan(), 0.5),
        (plan.masked, 0.3),
        (noisy & faster, 0.025),  # decisions are independent
    ):
        spread = 4 * math.sqrt(probability * (1 - probability) / 20000)
        assert abs(taken.float().mean() - probability) < spread
    assert plan.vtlp.min() >= 0.9  # 1 means always: none is NaN
    assert plan.vtlp.max() <= 1.1
    assert abs(plan.vtlp.mean() - 1.0) < 0.002


def test_noise_has_its_rms_and_is_white():
    clips = torch.zeros(4, 32000)
    out = _waveform(clips, noise_probability=1.0)
    rms = out.square().mean(dim=1).sqrt()
    assert torch.allclose(rms, torch.full((4,), 3.2e-3), rtol=0.03)
    assert not torch.equal(out[0], out[1])
    spectrum = torch.fft.rfft(out).abs().square().mean(dim=0)[1:-1]
    quarters = torch.stack([q.mean() for q in spectrum.chunk(4)])
    assert torch.allclose(quarters / quarters.mean(), torch.ones(4), atol=0.06)


@pytest.mark.parametrize("snr", [-5.0, 0.0, 20.0])
def test_noise_by_snr(snr):
    clips = torch.stack([_tone(440.0, amplitude=a) for a in (0.9, 0.1, 1e-3)])
    noise = _waveform(clips, noise_probability=1.0, noise_snr_db=(snr, snr)) - clips
    measured = 10 * torch.log10(clips.square().mean(dim=1) / noise.square().mean(dim=1))
    assert torch.allclose(measured, torch.full((3,), snr), atol=0.15)


def test_loudness_scales_whole_clips():
    clips = _noise(64)
    out = _waveform(clips, loudness_probability=1.0)
    gain = out[:, 0] / clips[:, 0]
    assert torch.allclose(out, clips * gain.unsqueeze(1), rtol=1e-5)
    assert gain.min() >= 0.5
    assert gain.max() <= 2.0
    assert gain.max() - gain.min() > 1.0


@pytest.mark.parametrize("rate", [0.9, 0.97, 1.1])
def test_stretch_keeps_the_pitch_and_the_level(rate):
    clip = _tone(437.0)
    out, length = time_stretch(clip.unsqueeze(0), torch.tensor([rate]), RATE)
    assert length.item() == min(32000, round(32000 / rate))
    middle = out[0, 4000:24000]
    assert abs(_peak_frequency(middle) - 437.0) < 1.0
    assert abs(middle.square().mean().sqrt().item() / (0.5 / math.sqrt(2)) - 1) < 0.02


@pytest.mark.parametrize("rate", [0.9, 1.1])
def test_stretch_moves_events_to_their_new_times(rate):
    clip = torch.zeros(32000)
    for second in (0.3, 0.8, 1.3):
        start = int(second * RATE)
        clip[start : start + 800] = _tone(1000.0)[:800]
    out, _ = time_stretch(clip.unsqueeze(0), torch.tensor([rate]), RATE)
    power = out[0].square()
    for second in (0.3, 0.8, 1.3):
        centre = (second + 0.025) / rate
        near = slice(int((centre - 0.1) * RATE), int((centre + 0.1) * RATE))
        at = torch.arange(32000)[near] / RATE
        found = (at * power[near]).sum() / power[near].sum()
        assert abs(found - centre) < 0.025  # the vocoder smears over its 64 ms window
    assert power.sum() / clip.square().sum() == pytest.approx(1 / rate, rel=0.05)


def test_a_faster_clip_is_filled_like_a_short_cycle():
    clip = _tone(440.0).unsqueeze(0)
    out = _waveform(clip, speed_probability=1.0, speed_range=(1.25, 1.25))
    assert out.shape == clip.shape
    start = round(32000 / 1.25)
    assert out[0, start : start + 10].abs().max() < 0.05  # the junction fades
    assert abs(out[0, start + 500 :].square().mean().sqrt() - 0.5 / math.sqrt(2)) < 0.02


@pytest.mark.parametrize("alpha", [0.9, 1.1])
@pytest.mark.parametrize("frequency", [1000.0, 3000.0, 6500.0])
def test_vtlp_moves_a_tone_to_the_warped_frequency(alpha, frequency):
    """f -> alpha f below the boundary, and the upper piece keeps Nyquist where it is."""
    keys = dict(vtlp_probability=1.0, vtlp_range=(alpha, alpha))
    frontend = _frontend(**keys)
    if frequency < 4300:
        target = alpha * frequency
    else:
        image = 4800 * min(alpha, 1.0)
        slope = (8000 - image) / (8000 - image / alpha)
        target = 8000 - slope * (8000 - frequency)
    clips = torch.stack([_tone(frequency), _tone(target)])
    moved = frontend(clips[:1], _full(clips[:1]), seed=0)[0, 0, :, 100]
    there = frontend(clips[1:], _full(clips[1:]))[0, 0, :, 100]
    here = frontend(clips[:1], _full(clips[:1]))[0, 0, :, 100]
    assert abs(moved.argmax() - there.argmax()) <= 1
    assert moved.argmax() != here.argmax()


def test_specaugment_masks():
    masking = augmentation(specaugment_probability=1.0)
    bands, frames, both = [], [], 0
    for seed in range(40):
        mel = torch.ones(8, 997, 128)
        mel = masking.mask(mel, masking.draw(8, seed))
        for clip in mel:
            band = (clip == 0).all(dim=0)
            time = (clip == 0).all(dim=1)
            assert torch.equal(clip == 0, band.unsqueeze(0) | time.unsqueeze(1))
            for hidden, widths, limit in ((band, bands, 48), (time, frames, 160)):
                edges = torch.diff(hidden.int(), prepend=torch.zeros(1, dtype=torch.int))
                assert (edges == 1).sum() <= 2
                assert hidden.sum() <= 2 * (limit - 1)
                widths.append(int(hidden.sum()))
            both += bool(band.any() and time.any())
    assert both > 250
    # two masks of mean width (limit - 1) / 2, which sometimes overlap
    assert 36 < sum(bands) / len(bands) < 47
    assert 130 < sum(frames) / len(frames) < 159


def test_masked_cells_are_zero_after_normalisation():
    clips = _noise(16)
    out = _frontend(
        specaugment_probability=1.0, freq_masks=0, time_masks=1, time_mask_width=150
    )(clips, _full(clips), seed=0)  # fmt: skip
    hidden = (out == 0).all(dim=2)  # [B, 1, T]
    assert hidden.any(dim=2).sum() > 10
    assert not hidden.all(dim=2).any()


def test_masked_cells_are_the_clips_mean():
    mel = torch.randn(16, 120, 40, generator=torch.Generator().manual_seed(0)) - 0.5
    every = {"specaugment_probability": 0.8, "freq_mask_width": 12, "time_mask_width": 40}
    plan = augmentation(**every).draw(16, seed=1)
    zero = augmentation(**every).mask(mel.clone(), plan)
    filled_in = augmentation(mask_value="mean", **every).mask(mel.clone(), plan)
    assert 8 < plan.masked.sum() < 16
    for before, cleared, filled in zip(mel, zero, filled_in, strict=True):
        hidden = cleared == 0
        assert torch.equal(filled[~hidden], before[~hidden])
        mean = before.double().mean().float().expand(int(hidden.sum()))
        assert torch.allclose(filled[hidden], mean, atol=1e-6)


def test_augmentation_runs_on_zero_padding_too():
    audio = AudioConfig(clip_seconds=1.0, pad_type="zero")
    frontend = AudioFrontend(audio, 128, 98, augmentation(**ON))
    out = frontend(_noise(2)[:, :8000], torch.tensor([8000, 3000]), seed=0)
    assert torch.isfinite(out).all()
