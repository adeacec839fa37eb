"""Kernels against PyTorch and against the machine."""
