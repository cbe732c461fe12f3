"""Metrics, uncertainty, calibration, reports and ablations."""
