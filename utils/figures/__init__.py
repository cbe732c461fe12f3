"""One module per figure family, one style."""
