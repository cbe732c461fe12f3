"""Studies whose tables are published in docs/."""
