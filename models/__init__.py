"""The Audio Spectrogram Transformer and its metadata conditioners."""
