"""Which devices and backends tests run on, and the mark that `make gpu` selects them by."""

import pytest
import torch

from gradprune.ops.dispatch import importance_ops_fault

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""On the CPU the kernels run in Triton's interpreter."""

TRITON_TESTS = [pytest.mark.gpu] if DEVICE == "cuda" else []
"""A test module's `pytestmark`: with a GPU its tests are GPU tests, and without one they still run."""


def require_backend(backend: str, device: str) -> None:
    """Skip the test if a backend cannot run on a device: C++ on a GPU, or Triton on a CPU without its interpreter."""
    fault = None if backend == "auto" else importance_ops_fault(backend, device)
    if fault is not None and (device != "cpu" or backend == "triton"):
        pytest.skip(f"{backend} is NOT tested on {device}: {fault}")
