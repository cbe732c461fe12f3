"""Log-mel front end against torchaudio's call, clip by clip: speed and error.

    python -m benchmarks.frontend [--device cpu|cuda] [--batch 16] [--threads 2] [--rounds 20]

Both turn the same padded 10 s clips into log-mel frames at the paper's settings, in turn on the
same machine; `forward_clips_per_s` is the whole front end (padding, log-mel, normalisation,
stretching). `error_ratio` is the largest, over all signals, of our largest error over
torchaudio's, both against torchaudio in float64. Real recordings are taken from ICBHI_ROOT or
../shared/icbhi where there are any, noise-like synthetic ones otherwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchaudio.compliance.kaldi import fbank

from benchmarks.data import clips_for_benchmark, paper_frontend
from benchmarks.harness import interleave, options, print_result, spread
from data.frontend import AudioFrontend


def torchaudio_log_mel(clip: Tensor) -> Tensor:
    """[S] -> [T, F] in the clip's own dtype, at the paper's settings."""
    frames = {"frame_length": 40.0, "frame_shift": 10.0, "window_type": "hanning"}
    bands = {"num_mel_bins": 128, "low_freq": 100.0, "high_freq": 8000.0}
    return fbank(clip.unsqueeze(0), sample_frequency=16000.0, **frames, **bands)


def signals(clips: Tensor) -> Tensor:
    """The clips, and noise, tones, clicks, a chirp, an offset and silence: [n, S]."""
    samples = clips.shape[1]
    noise = torch.randn(samples, generator=torch.Generator().manual_seed(0))
    time = torch.arange(samples, dtype=torch.float64) / 16000
    tones = [(0.5 * torch.sin(2 * math.pi * f * time)).float() for f in (50, 440, 1000, 3000, 7000)]
    tones += [torch.sign(tones[1]), 1e-5 * tones[3]]
    chirp = (0.5 * torch.sin(math.pi * 800 * time**2)).float()
    clicks = (torch.arange(samples) % 3001 == 0).float()
    noises = [0.1 * noise, 1e-4 * noise, 1e-6 * noise, 0.5 + 1e-3 * noise]
    made = [*noises, *tones, chirp, clicks, torch.zeros(samples)]
    return torch.cat([clips.cpu(), torch.stack(made)])


def errors(frontend: AudioFrontend, clips: Tensor, device: str) -> list[tuple[float, float, float]]:
    """(our largest error, torchaudio's, largest value) of each signal, against float64."""
    found = []
    for clip in signals(clips):
        exact = torchaudio_log_mel(clip.double())
        ours = frontend.log_mel(clip.unsqueeze(0).to(device))[0].cpu()
        theirs = torchaudio_log_mel(clip)
        values = (ours - exact, theirs - exact, exact)
        found.append(tuple(value.abs().max().item() for value in values))
    return found


def measure(device: str, batch: int, rounds: int) -> dict[str, float | str]:
    """Our log-mel, torchaudio's on the CPU and the whole front end, in turn."""
    on_cpu, source = clips_for_benchmark(batch)
    clips = on_cpu.to(device)
    length = torch.full((batch,), clips.shape[1], device=device)
    frontend = paper_frontend().to(device)
    calls = {
        "": lambda: frontend.log_mel(clips),
        "torchaudio_": lambda: [torchaudio_log_mel(clip) for clip in on_cpu],
        "forward_": lambda: frontend(clips, length),
    }
    times = interleave(calls, rounds=rounds)
    ratio = times[""].faster(times["torchaudio_"])
    # both exact (silence) counts as 1
    worst = max(
        1.0 if mine == other else mine / max(other, 1e-12)
        for mine, other, _ in errors(frontend, on_cpu, device)
    )
    return {
        "clips": source,
        **{f"{name}clips_per_s": batch / own.clock.median for name, own in times.items()},
        **{
            f"{name}cpu_ms_per_clip": 1000 * times[name].processor.median / batch
            for name in ("", "torchaudio_")
        },
        "ratio": ratio.median,
        "ratio_spread": spread(ratio),
        "error_ratio": worst,
    }


def main() -> None:
    """Measure and print."""
    args = options(__doc__, device="cpu", batch=16, threads=2, rounds=20)
    torch.set_num_threads(args.threads)
    found = measure(args.device, args.batch, args.rounds)
    print_result({key: value for key, value in vars(args).items() if key != "rounds"} | found)


if __name__ == "__main__":
    main()
