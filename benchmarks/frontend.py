"""Log-mel front end against torchaudio's call, clip by clip: speed and error.

    python -m benchmarks.frontend [--device cpu|cuda] [--batch 16] [--threads 2] [--rounds 20]

Both turn the same padded 10 s clips into log-mel frames at the paper's settings, in turn on the
same machine; `forward_clips_per_s` is the whole front end (padding, log-mel, normalisation,
stretching). `error_ratio` is the largest, over all signals, of our largest error over
torchaudio's, both against torchaudio in float64. Real recordings are taken from ICBHI_ROOT or
../shared/icbhi where there are any, noise-like synthetic ones otherwise.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor
from torchaudio.compliance.kaldi import fbank

from benchmarks.harness import interleave, print_result, spread
from benchmarks.recordings import clips_for_benchmark, paper_frontend
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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    for name, default in (("batch", 16), ("threads", 2), ("rounds", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    clips, source = clips_for_benchmark(args.batch)
    clips = clips.to(args.device)
    length = torch.full((args.batch,), clips.shape[1], device=args.device)
    frontend = paper_frontend().to(args.device)
    times = interleave(
        {
            "ours": lambda: frontend.log_mel(clips),
            "torchaudio": lambda: [torchaudio_log_mel(clip) for clip in clips],
            "forward": lambda: frontend(clips, length),
        },
        rounds=args.rounds,
    )
    ours, theirs = times["ours"], times["torchaudio"]
    ratio = ours.faster(theirs)
    print_result(
        {
            **{key: getattr(args, key) for key in ("device", "threads", "batch")},
            "clips": source,
            "clips_per_s": args.batch / ours.clock.median,
            "forward_clips_per_s": args.batch / times["forward"].clock.median,
            "torchaudio_clips_per_s": args.batch / theirs.clock.median,
            "cpu_ms_per_clip": 1000 * ours.processor.median / args.batch,
            "torchaudio_cpu_ms_per_clip": 1000 * theirs.processor.median / args.batch,
            "ratio": ratio.median,
            "ratio_spread": spread(ratio),
            # both exact (silence) counts as 1
            "error_ratio": max(
                1.0 if mine == other else mine / max(other, 1e-12)
                for mine, other, _ in errors(frontend, clips, args.device)
            ),
        }
    )


if __name__ == "__main__":
    main()
