"""Calibration and evaluation text: from files to windows of token ids."""
