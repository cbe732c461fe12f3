"""One module per corpus: files to a cycle table."""
