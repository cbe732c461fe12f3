"""Errors, files, locks and the command line: what everything else may use."""
