"""ICBHI 2017: recordings, tables, splits, waveforms and the on-device audio path."""
