"""Seconds that a card would take for counted launches: the longer of arithmetic and memory, launch by launch.

A model, not a measurement, and good to a quarter at best. The rates are the data sheets' peaks times what large
products and copies usually reach of them; a pass is no faster than its launches can be enqueued.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.predicted.counted import Counted, Launch

# Of the peaks: what large matrix products, products in fp32, fused attention and copies reach.
PRODUCTS, FP32_PRODUCTS, ATTENTION, MEMORY = 0.71, 0.75, 0.45, 0.81
# Seconds that a kernel takes at least, and that the host takes to enqueue an op of PyTorch, and a Triton kernel.
SHORTEST, ENQUEUED, TRITON_ENQUEUED = 2e-6, 8e-6, 30e-6
# Seconds that a Cholesky factorisation of a small block takes for each row: they depend on each other.
FACTORED = 1e-6
# Seconds that one step of a single program takes at least, and bytes a second that it reads from the card's cache.
STEP, ONE_PROGRAM = 5e-6, 60e9
# Bytes a second from files that are mapped into the host's memory, and read already, to the card.
STREAMED = 12e9
# The epilogue of `linear_importance`, for each element of a gradient: its instructions after the last product (as
# compiled), and what part of them runs beside the products of the other block of the same multiprocessor.
EPILOGUE_INSTRUCTIONS, OVERLAP = 13.0, 0.5


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet.

    name: as PyTorch gives it. half, fp32: floating-point operations a second, dense. memory: bytes a second.
    instructions: that all multiprocessors issue to threads in a second.
    """

    name: str
    half: float
    fp32: float
    memory: float
    instructions: float


# 132 multiprocessors issue four instructions a clock, each to 32 threads, at 1.755 GHz.
_ISSUED = 132 * 4 * 32 * 1.755e9
CARDS = (
    Card("NVIDIA H100 80GB HBM3", half=989e12, fp32=67e12, memory=3.35e12, instructions=_ISSUED),
    Card("NVIDIA H200", half=989e12, fp32=67e12, memory=4.8e12, instructions=_ISSUED),
)


def launch_seconds(launch: Launch, card: Card) -> float:
    """Seconds of one kernel; products in fp64 are as fast as in fp32."""
    if launch.name == "cholesky":
        return max(FACTORED * (3 * launch.flops) ** (1 / 3), SHORTEST)
    if launch.steps:
        return launch.steps * STEP + launch.bytes / ONE_PROGRAM
    if launch.name.startswith("attention"):
        arithmetic = launch.flops / (ATTENTION * card.half)
    elif launch.dtype in (torch.bfloat16, torch.float16):
        arithmetic = launch.flops / (PRODUCTS * card.half)
    else:
        arithmetic = launch.flops / (FP32_PRODUCTS * card.fp32)
    if launch.name == "triton linear_importance":
        # An element of each sample's gradient takes two operations a token.
        elements = launch.flops / (2 * launch.tokens)
        arithmetic += (1.0 - OVERLAP) * EPILOGUE_INSTRUCTIONS * elements / card.instructions
    return max(arithmetic, launch.bytes / (MEMORY * card.memory), SHORTEST)


def pass_seconds(counted: Counted, card: Card) -> float:
    """Seconds of all launches one after the other, or of enqueueing them where that takes longer."""
    return max(device_seconds(counted.launches, card), host_seconds(counted.launches))


def device_seconds(launches: Sequence[Launch], card: Card) -> float:
    """Seconds of the kernels."""
    return sum(launch_seconds(launch, card) for launch in launches)


def host_seconds(launches: Sequence[Launch]) -> float:
    """Seconds that Python takes to enqueue them."""
    return sum(TRITON_ENQUEUED if launch.name.startswith("triton") else ENQUEUED for launch in launches)
