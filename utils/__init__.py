"""Configuration, tracking, training, evaluation and figures."""
