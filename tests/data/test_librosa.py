"""The mel filters against librosa, which shares no code with torchaudio or with ours.

librosa draws its triangles over Hz, Kaldi over mel, so the filters agree closely, not exactly.
"""

from __future__ import annotations

import librosa
import numpy as np
import torch

from data.frontend import mel_bank


def test_mel_filters_and_energies_agree_with_librosa():
    bins = 16000 / 1024 * torch.arange(512)
    ours = mel_bank(bins, 128, 100.0, 8000.0).numpy()
    theirs = librosa.filters.mel(
        sr=16000, n_fft=1024, n_mels=128, fmin=100, fmax=8000, htk=True, norm=None
    )
    np.testing.assert_allclose(ours, theirs, atol=0.003)
    noise = np.random.default_rng(0).standard_normal(80000).astype(np.float32)
    power = np.abs(librosa.stft(noise, n_fft=1024, win_length=640, hop_length=160)) ** 2
    np.testing.assert_allclose(np.log(ours @ power), np.log(theirs @ power), atol=0.01)  # nat
