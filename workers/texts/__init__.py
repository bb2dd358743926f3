"""Calibration and evaluation text: from a dataset reference to windows of token ids."""
