"""fp32 matrix products whose factors are rounded first, for estimates whose own error is larger than the rounding's.

CPUs with AMX or AVX512-BF16 multiply bfloat16 several times as fast as fp32, and so do GPUs with TF32; the sums stay in
fp32. On a machine without such units nothing is rounded, and products of other types never are.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@contextmanager
def rounded_products() -> Iterator[None]:
    """Context manager in which the factors of fp32 matrix products are rounded, except in attention.

    PyTorch's fused attention on a CPU multiplies small tiles; rounding their factors makes it several times as slow.
    """
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _products("highest")(attention)
    try:
        with _products("medium"):
            yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention


def products() -> str | None:
    """PyTorch's name for the precision of fp32 matrix products; None if a program has set it by device."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def set_products(precision: str | None) -> None:
    """Set the precision of fp32 matrix products, for example to a result of `products`; None changes nothing."""
    if precision is not None:
        torch.set_float32_matmul_precision(precision)


@contextmanager
def _products(precision: str) -> Iterator[None]:
    before = products()
    set_products(before and precision)
    try:
        yield
    finally:
        set_products(before)
