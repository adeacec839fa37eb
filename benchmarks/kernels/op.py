"""The parts of an op's benchmark: its cases, their inputs, the providers, and the amount of work in a case."""

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

    label: the model and the weight that the shape is from.
    shapes: the tensors' shapes; for ops on one weight, its shape [O, I].
    samples, tokens: number of samples and of each one's tokens; 0 for ops without samples.
    compiled: whether torch.compile is measured too, which costs seconds per case.
    """

    label: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    samples: int = 0
    tokens: int = 0
    compiled: bool = False

    @property
    def elements(self) -> int:
        """The number of elements of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return DTYPES[self.dtype].itemsize

    @property
    def text(self) -> str:
        """The shape as it is written in results."""
        if len(self.shapes) > 1:
            return f"{len(self.shapes)} tensors, {self.elements} elements"
        tokens = f", {self.samples}x{self.tokens} tokens" if self.tokens else ""
        return "x".join(map(str, self.shapes[0])) + tokens

    def random(self, shape: tuple[int, ...], seed: int, device: str) -> Tensor:
        """A normally distributed tensor of the case's element type."""
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=device).to(DTYPES[self.dtype])


@dataclass(frozen=True)
class Op:
    """One op's benchmark.

    cases: called with the device and the size ("full", "quick" or "toy"); returns the cases to measure.
    inputs: called with a case, a number and a device; returns a set of inputs, the same for the same number.
    providers: called with a case and a device; returns the floor, PyTorch's ways, and every backend of ours that runs
        on the device.
    moved_bytes: the least bytes that a case must read and write.
    input_bytes: the bytes of one set of inputs.
    flops: the floating-point operations of a case; None for ops that memory bounds.
    """

    name: str
    cases: Callable[[str, str], list[Case]]
    inputs: Callable[[Case, int, str], tuple[Any, ...]]
    providers: Callable[[Case, str], list[Provider]]
    moved_bytes: Callable[[Case], int]
    input_bytes: Callable[[Case], int]
    flops: Callable[[Case], int] | None = None
