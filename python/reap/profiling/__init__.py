"""Runs a model over a calibration and sums up what each expert contributes."""
