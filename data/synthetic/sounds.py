"""Synthetic lung sounds: breathing, crackles, wheezes, and the four devices' colouring and noise.

Durations and frequencies follow the literature:

- breathing: band-shaped noise whose power falls with frequency, inspiration louder and brighter
  than expiration (Pasterkamp, Kraman and Wodicka, Am J Respir Crit Care Med 156:974, 1997);
- crackles: damped oscillations described by initial deflection width (IDW) and two-cycle duration
  (2CD); fine about 0.7 ms and 5 ms, coarse about 1.5 ms and 10 ms (Murphy, Holford and Knowler,
  N Engl J Med 296:968, 1977; Sovijarvi et al., Eur Respir Rev 10:597, 2000), coarse up to 15 ms
  (Bohadana, Izbicki and Kraman, N Engl J Med 370:744, 2014); most energy between 0.1 and 1 kHz
  (Mori et al., Thorax 35:843, 1980);
- wheezes: tones with a slowly moving pitch, longer than 80 to 250 ms, 100 to 1000 Hz with
  harmonics, mostly in expiration (Sovijarvi et al. 2000; Bohadana et al. 2014).

What is heard never depends on the auscultation site, and nothing here reads a label.
Amplitudes are relative to the breath's rms (1) until `render` applies the device's gain.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import fft, signal

WIDEBAND_RATE = 44100  # Hz
NARROWBAND_RATE = 4000  # Hz, Litt3200
#: The chest's sound ends well below 6 kHz: it is made at a third of the wide-band rate, and for
#: Litt3200 at three times the file's rate, so that nothing folds back.
_CHEST_RATES = {WIDEBAND_RATE: WIDEBAND_RATE // 3, NARROWBAND_RATE: NARROWBAND_RATE * 3}


@dataclass(frozen=True)
class DeviceProfile:
    """What a device does to the sound.

    Attributes:
        rate: Hz of the written file.
        subtypes: bit depths with their probabilities.
        mode: acquisition mode in the file name (sc | mc).
        roll_off: Hz where the response is 3 dB down, and `order`: 6 dB per octave each beyond.
        resonance: Hz and gain of a resonance a fifth of its frequency wide.
        noise_white: rms of the device's own white noise, breath rms = 1.
        rumble: rms of body and handling noise, 12 dB per octave above 40 Hz, breath rms = 1.
        level: median rms of the breath in the file, full scale = 1.
    """

    rate: int
    subtypes: dict[str, float]
    mode: str
    roll_off: float
    order: int
    resonance: tuple[float, float]
    noise_white: float
    rumble: float
    level: float


#: Levels and spectra as in the real recordings: AKGC417L loud and wide-band, Litt3200 silent
#: above 1 kHz, LittC2SE dull over a flat noise floor, Meditron clear with a bump near 1.2 kHz.
PROFILES: dict[str, DeviceProfile] = {
    "AKGC417L": DeviceProfile(
        WIDEBAND_RATE, {"PCM_24": 1.0}, "mc", 3000.0, 1, (400.0, 1.3), 0.08, 8.0, 0.012
    ),
    "Litt3200": DeviceProfile(
        NARROWBAND_RATE, {"PCM_16": 1.0}, "sc", 700.0, 4, (250.0, 1.5), 0.002, 4.0, 0.004
    ),
    "LittC2SE": DeviceProfile(
        WIDEBAND_RATE, {"PCM_24": 1.0}, "mc", 700.0, 1, (200.0, 1.6), 0.06, 8.0, 0.004
    ),
    "Meditron": DeviceProfile(
        *(WIDEBAND_RATE, {"PCM_24": 0.8, "PCM_16": 0.15, "PCM_32": 0.05}, "sc", 1600.0, 2),
        *((1200.0, 2.5), 0.035, 8.0, 0.004),
    ),
}
#: One profile for every device where the device must not be heard; within all devices' bands.
NEUTRAL = DeviceProfile(
    WIDEBAND_RATE, {"PCM_16": 1.0}, "sc", 2000.0, 1, (400.0, 1.3), 0.06, 8.0, 0.006
)


@dataclass(frozen=True)
class Traits:
    """What a patient's breathing sounds like, in all of the patient's recordings.

    Attributes:
        cycle_seconds: median cycle length, s.
        corner: Hz above which the breath's power falls.
        inspiration: share of the cycle.
        expiration_level: rms of expiration, inspiration = 1.
        heart_rate: beats per minute; `heart_level`: peak of the beats, breath rms = 1.
        coarseness: probability that a cycle's crackles are coarse.
        wheeze_pitch: Hz, median of the patient's wheezes.
    """

    cycle_seconds: float
    corner: float
    inspiration: float
    expiration_level: float
    heart_rate: float
    heart_level: float
    coarseness: float
    wheeze_pitch: float


def draw_traits(rng: np.random.Generator, child: bool) -> Traits:
    """Traits of one patient; children breathe faster and brighter, their hearts beat faster."""
    return Traits(
        cycle_seconds=(2.0 if child else 2.6) * np.exp(0.22 * rng.standard_normal()),
        corner=(320.0 if child else 260.0) * np.exp(0.2 * rng.standard_normal()),
        inspiration=rng.uniform(0.36, 0.46),
        expiration_level=rng.uniform(0.35, 0.7),
        heart_rate=rng.normal(105 if child else 78, 10),
        heart_level=rng.uniform(0.5, 3.0),
        coarseness=rng.uniform(0.2, 0.8),
        wheeze_pitch=np.exp(rng.uniform(np.log(180), np.log(600))),
    )


def crackle(two_cycles: float, initial: float, rate: float) -> np.ndarray:
    """One crackle with peak 1: phase 4 pi (t / 2CD)^p, exponentially damped.

    p makes the first half-wave last IDW and the first two waves 2CD, so the oscillation starts
    sharply and widens, as measured crackles do (Murphy et al. 1977).

    Args:
        two_cycles: 2CD, s.
        initial: IDW, s, less than a quarter of 2CD.
        rate: Hz.
    """
    t = np.arange(1, int(1.5 * two_cycles * rate) + 1) / rate
    power = np.log(0.25) / np.log(initial / two_cycles)
    wave = np.sin(4 * np.pi * (t / two_cycles) ** power) * np.exp(-2.5 * t / two_cycles)
    return wave / np.abs(wave).max()


def wheeze(duration: float, pitch: float, rate: float, rng: np.random.Generator) -> np.ndarray:
    """One wheeze with rms about 1: a tone that glides and wavers, with up to three partials.

    Args:
        duration: s.
        pitch: Hz, at the middle.
        rate: Hz; partials above 0.45 rate are left out.
    """
    t = np.arange(int(duration * rate)) / rate
    glide = rng.uniform(-0.25, 0.25) * (t / duration - 0.5)  # at most an eighth up or down
    waver = rng.uniform(0.0, 0.02) * np.sin(2 * np.pi * rng.uniform(2, 5) * t)
    phase = 2 * np.pi * np.cumsum(pitch * (1 + glide + waver)) / rate
    tone = np.zeros_like(t)
    for partial in range(1, 1 + rng.integers(1, 4)):
        if partial * pitch * 1.2 < 0.45 * rate:
            level = 10 ** (-rng.uniform(6, 14) * (partial - 1) / 20)
            tone += level * np.sin(partial * phase + rng.uniform(0, 2 * np.pi))
    return np.sqrt(2) * tone * signal.windows.tukey(len(t), 0.3)


def _shaped_noise(n: int, rate: float, gain, rng: np.random.Generator) -> np.ndarray:
    """[n] Gaussian noise with rms 1 and amplitude spectrum gain(Hz)."""
    size = fft.next_fast_len(n, real=True)
    spectrum = fft.rfft(rng.standard_normal(size, dtype=np.float32))
    spectrum *= gain(fft.rfftfreq(size, 1 / rate)).astype(np.float32)
    noise = fft.irfft(spectrum, size)[:n]
    return noise / np.sqrt(np.mean(noise**2))


def _breath_gain(corner: float):
    """Amplitude response of the lung and chest wall: 12 dB per octave above `corner` Hz."""
    return lambda f: (f / (f + 60)) ** 2 / (1 + (f / corner) ** 2)


def _phases(start: float, end: float, traits: Traits) -> tuple[float, float, float, float]:
    """Begin and end (s) of inspiration and expiration; a short pause ends the cycle."""
    length = end - start
    turn = start + traits.inspiration * length
    return start, turn, turn + 0.04 * length, start + 0.92 * length


def _add(target: np.ndarray, sound: np.ndarray, at: int) -> None:
    """Add `sound` to `target` from sample `at`, cut at the target's end."""
    stop = min(len(target), at + len(sound))
    target[at:stop] += sound[: stop - at]


def _add_crackles(
    target: np.ndarray, begin: float, end: float, rate: float, traits: Traits, rng
) -> None:
    """A train of one kind: fine ones late in inspiration, coarse ones early and in expiration."""
    inspiration, turn, expiration, stop = _phases(begin, end, traits)
    coarse = rng.random() < traits.coarseness
    level = 10.0 * np.exp(0.35 * rng.standard_normal())
    for _ in range(rng.integers(5, 13)):
        if coarse:
            two_cycles = rng.uniform(9e-3, 15e-3)
            late = rng.random() < 0.4
            at = rng.uniform(expiration, stop) if late else rng.uniform(inspiration, turn)
        else:
            two_cycles = rng.uniform(4e-3, 6.5e-3)
            at = rng.uniform(inspiration + 0.4 * (turn - inspiration), turn)
        sound = crackle(two_cycles, two_cycles * rng.uniform(0.12, 0.16), rate)
        peak = level * np.exp(0.4 * rng.standard_normal()) * rng.choice((-1, 1))
        # The crackle must end inside its own cycle, however short that is.
        latest = int(end * rate) - len(sound)
        _add(target, peak * sound, max(int(begin * rate), min(int(at * rate), latest)))


def _add_wheezes(
    target: np.ndarray, begin: float, end: float, rate: float, traits: Traits, rng
) -> None:
    """One wheeze in expiration (sometimes in inspiration, too), now and then of two voices."""
    inspiration, turn, expiration, stop = _phases(begin, end, traits)
    spans = [(expiration, stop), (inspiration, turn)][: 2 if rng.random() < 0.3 else 1]
    level = 1.1 * np.exp(0.35 * rng.standard_normal())
    for first, last in spans:
        duration = min(max(0.25, rng.uniform(0.4, 0.95) * (last - first)), 0.9 * (end - begin))
        at = min(rng.uniform(first, max(first, last - duration)), end - duration)
        voices = 2 if rng.random() < 0.25 else 1
        for _ in range(voices):
            pitch = np.clip(traits.wheeze_pitch * np.exp(0.2 * rng.standard_normal()), 110, 900)
            tone = wheeze(duration, pitch, rate, rng) / np.sqrt(voices)
            _add(target, level * tone, int(at * rate))


def _add_heart(target: np.ndarray, rate: float, traits: Traits, rng) -> None:
    """Two damped low thuds per beat, mostly below the lowest mel band."""
    t = np.arange(int(0.1 * rate)) / rate
    period = 60 / traits.heart_rate
    at = rng.uniform(0, period)
    while at + 0.5 < len(target) / rate:
        for delay, pitch, level in ((0.0, 55.0, 1.0), (0.35 * period, 75.0, 0.6)):
            thud = np.sin(2 * np.pi * pitch * t) * np.exp(-t / 0.02)
            _add(target, traits.heart_level * level * thud, int((at + delay) * rate))
        at += period * np.exp(0.05 * rng.standard_normal())


def _add_rubs(target: np.ndarray, rate: float, rng) -> None:
    """Rubbing of the chest piece, one in five seconds or so: longer and duller than a crackle."""
    for _ in range(rng.poisson(len(target) / rate / 5)):
        n = int(rng.uniform(0.03, 0.12) * rate)
        rub = _shaped_noise(n, rate, _breath_gain(300.0), rng) * signal.windows.hann(n)
        _add(target, rng.uniform(0.8, 2.5) * rub, rng.integers(0, max(1, len(target) - n)))


def chest_sound(
    bounds: np.ndarray,
    sounds: np.ndarray,
    seconds: float,
    rate: int,
    traits: Traits,
    event_level: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """The sound at the chest wall, before any device.

    Args:
        bounds: [n + 1] s; cycle i lies between bounds[i] and bounds[i + 1].
        sounds: [n, 2] bool; crackles and wheezes to be heard in each cycle.
        seconds: length of the whole.
        rate: Hz.
        event_level: factor on the amplitude of crackles and wheezes.

    Returns:
        [seconds * rate] float32, inspiration's rms about 1.
    """
    n = round(seconds * rate)
    phase = np.zeros((2, n), np.float32)  # envelopes of inspiration and expiration
    events = np.zeros(n, np.float32)
    for begin, end, (has_crackles, has_wheezes) in zip(
        bounds[:-1], bounds[1:], sounds, strict=True
    ):
        inspiration, turn, expiration, stop = _phases(begin, end, traits)
        depth = np.exp(0.2 * rng.standard_normal())  # breaths differ
        for row, (first, last, peak) in enumerate(
            ((inspiration, turn, 1.3), (expiration, stop, 1.3 * traits.expiration_level))
        ):
            a, b = int(first * rate), min(int(last * rate), n)
            x = np.linspace(0, 1, max(0, b - a))
            # Inspiration swells and fades; expiration fades from its beginning on.
            shape = np.sin(np.pi * x) if row == 0 else np.sin(np.pi * x**0.6)
            phase[row, a:b] = depth * peak * np.sqrt(shape.clip(0))
        if has_crackles:
            _add_crackles(events, begin, end, rate, traits, rng)
        if has_wheezes:
            _add_wheezes(events, begin, end, rate, traits, rng)
    events *= event_level
    _add_heart(events, rate, traits, rng)
    _add_rubs(events, rate, rng)
    for row, corner in enumerate((traits.corner, 0.75 * traits.corner)):
        events += phase[row] * _shaped_noise(n, rate, _breath_gain(corner), rng)
    return events


def render(
    bounds: np.ndarray,
    sounds: np.ndarray,
    seconds: float,
    profile: DeviceProfile,
    traits: Traits,
    event_level: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """One recording as the device writes it: response, own noise, gain, sampling rate.

    Arguments as in `chest_sound`.

    Returns:
        [seconds * profile.rate] float32 in -1..1, clipped at full scale.
    """
    rate = _CHEST_RATES[profile.rate]
    chest = chest_sound(bounds, sounds, seconds, rate, traits, event_level, rng)
    gain = float(np.exp(0.4 * rng.standard_normal()))
    n = len(chest)
    size = fft.next_fast_len(n, real=True)
    f = fft.rfftfreq(size, 1 / rate)
    centre, peak = profile.resonance
    response = 1 + (peak - 1) * np.exp(-0.5 * ((f - centre) / (0.2 * centre)) ** 2)
    response /= (1 + (f / profile.roll_off) ** 2) ** (profile.order / 2)
    heard = fft.irfft(fft.rfft(chest, size) * response.astype(np.float32), size)[:n]
    heard += profile.rumble * _shaped_noise(n, rate, lambda f: 1 / (1 + (f / 40) ** 2), rng)
    heard = signal.resample_poly(heard, *((3, 1) if rate < profile.rate else (1, 3)))
    heard += profile.noise_white * rng.standard_normal(len(heard), dtype=np.float32)
    return (profile.level * gain * heard).clip(-1.0, 1.0 - 2.0**-15).astype(np.float32)
