"""fp32 matrix products whose factors are rounded first, for estimates whose own error is larger.

CPUs with AMX or AVX512-BF16 multiply bfloat16 several times as fast as fp32, and GPUs TF32; sums stay in fp32. Where a
machine has no such units nothing is rounded, and other types are never touched.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@contextmanager
def rounded_products() -> Iterator[None]:
    """Inside, factors of fp32 matrix products are rounded, but for those of attention.

    PyTorch's fused attention on a CPU multiplies small tiles, and becomes several times as slow by rounding them.
    """
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _products("highest")(attention)
    try:
        with _products("medium"):
            yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention


def products() -> str | None:
    """How products of fp32 factors are computed, one of PyTorch's names; None where a program set it by device."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def set_products(precision: str | None) -> None:
    """As they were, by `products`, or otherwise; None changes nothing."""
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
