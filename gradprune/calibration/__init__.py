"""Calibration: turn windows of tokens into evidence, with one backward pass per batch and a few statistics kept."""
