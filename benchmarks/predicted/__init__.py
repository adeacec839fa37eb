"""Predictions of the time and memory that a GPU would take, from counts that need no GPU."""
