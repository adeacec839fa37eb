"""Benchmarks of the kernels against PyTorch and against the limits of the hardware."""
