"""One module per training method (docs/adding_a_method.md)."""
