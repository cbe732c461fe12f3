"""Score, intervals, calibration, subgroups, predictions: leaf mathematics."""
