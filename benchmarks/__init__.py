"""What is measured against what. `python -m benchmarks.run` measures, `python -m benchmarks.report` shows."""
