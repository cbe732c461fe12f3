"""Programs that measure; each prints a table and a last line of JSON."""
