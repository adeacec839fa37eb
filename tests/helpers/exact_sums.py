"""What the tests of the importance ops share: tensors, their values in 80-bit floating point, and guarded outputs."""

from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from gradprune.ops.vectors import ImportanceVectors

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = [field.name for field in fields(ImportanceVectors)]
CANARY = 12345.0


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def exact(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy().astype(np.longdouble)


def equal_bits(a: ImportanceVectors, b: ImportanceVectors) -> bool:
    """NaN equals NaN."""
    return all(getattr(a, n).numpy().tobytes() == getattr(b, n).numpy().tobytes() for n in NAMES)


class GuardedOutputs:
    """Outputs for a weight [O, I] full of NaN, between canaries."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.sizes = [rows] * 3 + [columns] * 3 + [5]
        self.buffers = [torch.full((size + 32,), CANARY, dtype=dtype) for size in self.sizes]
        for buffer, size in zip(self.buffers, self.sizes, strict=True):
            buffer[16 : 16 + size] = float("nan")
        self.addresses = [buffer[16:].data_ptr() for buffer in self.buffers]

    def assert_written(self, expected: ImportanceVectors) -> None:
        """Everything between the canaries is `expected`, and the canaries live."""
        for name, buffer, size in zip(NAMES, self.buffers, self.sizes, strict=True):
            assert torch.equal(buffer[16 : 16 + size], getattr(expected, name))
            assert (buffer[:16] == CANARY).all()
            assert (buffer[16 + size :] == CANARY).all()
