"""Measurements of gradprune and its peers. `python -m benchmarks.run` measures, `python -m benchmarks.report` shows."""
