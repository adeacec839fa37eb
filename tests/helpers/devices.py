"""Which device the Triton kernels' tests run on, and the mark that `make gpu` selects them by."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""On the CPU the kernels run in Triton's interpreter."""

TRITON_TESTS = [pytest.mark.gpu] if DEVICE == "cuda" else []
"""A test module's `pytestmark`: with a GPU its tests are GPU tests, and without one they still run."""
