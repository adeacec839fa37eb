"""Seconds that a card would take for counted launches: for each, the longer of its arithmetic and its memory traffic.

This is a roofline model, not a measurement, and at best accurate to a quarter. The rates are the peaks in the data
sheets times the share of them that large products and copies usually reach. A pass cannot be faster than the host
enqueues its launches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.predicted.counted import Counted, Launch

# The shares of the peak rates that large products in half precision and in fp32, fused attention and copies reach.
PRODUCTS, FP32_PRODUCTS, ATTENTION, MEMORY = 0.71, 0.75, 0.45, 0.81
# The least seconds of a kernel, and the host's seconds to enqueue an op of PyTorch and a Triton kernel.
SHORTEST, ENQUEUED, TRITON_ENQUEUED = 2e-6, 8e-6, 30e-6
# Seconds per row of the Cholesky factorisation of a small block, whose rows depend on each other.
FACTORED = 1e-6
# Seconds per step of a kernel with a single program, and the bytes per second that this reads from the L2 cache.
STEP, ONE_PROGRAM = 5e-6, 60e9
# Bytes per second copied to the card from files that are mapped into the host's memory and in the page cache.
STREAMED = 12e9
# The epilogue of `linear_importance`: its instructions per element of a gradient (counted in the compiled kernel), and
# the share of them that overlaps with products of the other block on the same multiprocessor.
EPILOGUE_INSTRUCTIONS, OVERLAP = 13.0, 0.5


@dataclass(frozen=True)
class Card:
    """The peak rates of a GPU, from its data sheet.

    name: as PyTorch reports it.
    half, fp32: floating-point operations per second, without sparsity.
    memory: bytes per second.
    instructions: instructions of threads per second, over all multiprocessors.
    """

    name: str
    half: float
    fp32: float
    memory: float
    instructions: float


# 132 multiprocessors issue four instructions per clock, each for the 32 threads of a warp, at 1.755 GHz.
_ISSUED = 132 * 4 * 32 * 1.755e9
CARDS = (
    Card("NVIDIA H100 80GB HBM3", half=989e12, fp32=67e12, memory=3.35e12, instructions=_ISSUED),
    Card("NVIDIA H200", half=989e12, fp32=67e12, memory=4.8e12, instructions=_ISSUED),
)


def launch_seconds(launch: Launch, card: Card) -> float:
    """Seconds of one kernel; products in fp64 count as those in fp32, whose peak is the same."""
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
        # Each element of a sample's gradient takes two operations per token.
        elements = launch.flops / (2 * launch.tokens)
        arithmetic += (1.0 - OVERLAP) * EPILOGUE_INSTRUCTIONS * elements / card.instructions
    return max(arithmetic, launch.bytes / (MEMORY * card.memory), SHORTEST)


def pass_seconds(counted: Counted, card: Card) -> float:
    """Seconds of all launches, one after the other, or of enqueueing them, whichever is longer."""
    return max(device_seconds(counted.launches, card), host_seconds(counted.launches))


def device_seconds(launches: Sequence[Launch], card: Card) -> float:
    """Seconds of the kernels, one after the other."""
    return sum(launch_seconds(launch, card) for launch in launches)


def host_seconds(launches: Sequence[Launch]) -> float:
    """Seconds that the host takes to enqueue the launches."""
    return sum(TRITON_ENQUEUED if launch.name.startswith("triton") else ENQUEUED for launch in launches)
