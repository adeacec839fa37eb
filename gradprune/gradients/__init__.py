"""Gradient statistics per decoder layer."""
