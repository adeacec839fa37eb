"""Shared by the tests of the importance ops: tensors, their values in 80-bit floating point, and guarded outputs."""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from gradprune.ops.vectors import ImportanceVectors, Side

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROW_SUMS, COLUMN_SUMS = ["row_abs", "row_square"], ["column_abs", "column_square"]
SUMS = [*ROW_SUMS, *COLUMN_SUMS]
CANARY = 12345.0


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def exact(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy().astype(np.longdouble)


def tensors(vectors: ImportanceVectors) -> list[Tensor]:
    """The sums that were asked for, and the packed statistics."""
    sums = [getattr(vectors, name) for name in SUMS]
    return [*(vector for vector in sums if vector is not None), vectors.statistics.pack()]


def equal_bits(a: ImportanceVectors, b: ImportanceVectors) -> bool:
    """Whether both results have the same bits, so that NaN equals NaN."""
    return [t.numpy().tobytes() for t in tensors(a)] == [t.numpy().tobytes() for t in tensors(b)]


def one_side(vectors: ImportanceVectors, side: Side) -> ImportanceVectors:
    """`vectors` of both sides without the sums that `side` does not ask for."""
    dropped = {"rows": ["columns"], "columns": ["rows"], "both": []}[side]
    return dataclasses.replace(vectors, **dict.fromkeys(dropped))


class GuardedOutputs:
    """Output buffers for a weight [O, I], filled with NaN and surrounded by canaries."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.sizes = [rows] * 2 + [columns] * 2 + [5]
        self.buffers = [torch.full((size + 32,), CANARY, dtype=dtype) for size in self.sizes]
        for buffer, size in zip(self.buffers, self.sizes, strict=True):
            buffer[16 : 16 + size] = float("nan")
        self.addresses = [buffer[16:].data_ptr() for buffer in self.buffers]

    def assert_written(self, expected: ImportanceVectors) -> None:
        """Check that everything between the canaries is `expected`, and that the canaries are unchanged."""
        for tensor, buffer, size in zip(tensors(expected), self.buffers, self.sizes, strict=True):
            assert torch.equal(buffer[16 : 16 + size], tensor)
            assert (buffer[:16] == CANARY).all()
            assert (buffer[16 + size :] == CANARY).all()
