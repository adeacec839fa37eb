"""Triton kernels of gradprune: tensors in, tensors out. Nothing here imports the rest of the package."""
