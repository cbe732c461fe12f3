"""From files to the one cycle table: a module per corpus, listed in `data.corpora.registry`."""
