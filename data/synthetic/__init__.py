"""The synthetic corpus of `make train`: `python -m data.synthetic --output DIR`."""
