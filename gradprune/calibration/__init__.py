"""Calibration windows to evidence: one backward pass per batch, and the statistics kept from it."""
