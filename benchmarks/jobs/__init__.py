"""Time and memory of whole jobs."""
