"""Evaluates accuracy, calibration and abstention on labeled rows, without Ray."""
