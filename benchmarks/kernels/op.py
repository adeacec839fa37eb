"""What an op's benchmark consists of: cases, inputs, providers, and the work a case is."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Provider

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True)
class Case:
    """One shape and element type.

    label: of which model's which weight. shapes: of the tensors; of one weight [O, I] where the op takes one.
    samples, tokens: for ops that have any. compiled: whether torch.compile takes part, which costs seconds a case.
    """

    label: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    samples: int = 0
    tokens: int = 0
    compiled: bool = False

    @property
    def elements(self) -> int:
        """Of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return DTYPES[self.dtype].itemsize

    @property
    def text(self) -> str:
        """The shape as results have it."""
        if len(self.shapes) > 1:
            return f"{len(self.shapes)} tensors, {self.elements} elements"
        tokens = f", {self.samples}x{self.tokens} tokens" if self.tokens else ""
        return "x".join(map(str, self.shapes[0])) + tokens

    def random(self, shape: tuple[int, ...], seed: int, device: str) -> Tensor:
        """Normally distributed, of the case's element type."""
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=device).to(DTYPES[self.dtype])


@dataclass(frozen=True)
class Op:
    """One op's benchmark.

    cases: from (device, "full", "quick" or "toy") to what is measured.
    inputs: from a case, a number and a device to a set of inputs, the same for the same number.
    providers: from a case and a device to who does it: the floor, PyTorch, and every backend of ours that runs there.
    moved_bytes: that a case must move at least. flops: its floating-point operations, for ops bound by them.
    input_bytes: of one set of inputs.
    """

    name: str
    cases: Callable[[str, str], list[Case]]
    inputs: Callable[[Case, int, str], tuple[Any, ...]]
    providers: Callable[[Case, str], list[Provider]]
    moved_bytes: Callable[[Case], int]
    input_bytes: Callable[[Case], int]
    flops: Callable[[Case], int] | None = None
