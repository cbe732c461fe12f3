"""One module per training method: its settings, its class and `METHOD`."""
