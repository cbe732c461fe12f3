"""One module per variant."""
