"""The sums of all blocks whose steps are committed together, in a few tensors: on a GPU each tensor is a launch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradprune.calibration.accumulator import BlockAccumulator, BlockSums


@dataclass(frozen=True)
class Mark:
    """A point in a ledger's history: its sums, and each block's number of tokens and of steps."""

    sums: Tensor
    blocks: list[tuple[int, int]]


class Ledger:
    """What several blocks on one device accumulate; a step's contributions stay pending until they are committed.

    accumulators: the blocks'.
    """

    # Steps change the sums outside inference mode, in which tensors that were made inside cannot be changed.
    @torch.inference_mode(False)
    def __init__(self, accumulators: Sequence[BlockAccumulator], device: torch.device) -> None:
        """Start at zero; the accumulators get their parts of this ledger."""
        self.accumulators = accumulators
        sizes = [entry.sizes for entry in accumulators]
        # What is to be squared comes first, of all blocks.
        self._norms = sum(norms for norms, _ in sizes)
        self._sums, self._pending = torch.zeros(
            2, self._norms + sum(rest for _, rest in sizes), dtype=torch.float64, device=device
        ).unbind()
        parts = zip(*(self._parts(whole, sizes) for whole in (self._sums, self._pending)), strict=True)
        for entry, (sums, pending) in zip(accumulators, parts, strict=True):
            entry.open(_views(entry, *sums), _views(entry, *pending))

    def _parts(self, whole: Tensor, sizes: Sequence[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        """For each block, its norms and the rest."""
        norms = whole[: self._norms].split([size for size, _ in sizes])
        return list(zip(norms, whole[self._norms :].split([size for _, size in sizes]), strict=True))

    @torch.no_grad()
    def finish(self, factor: float) -> None:
        """The step's backward pass is over, and its gradients are `factor` times too large, a power of two."""
        self._pending[: self._norms].square_()
        for entry in self.accumulators:
            entry.finish(factor)

    @torch.no_grad()
    def commit(self, scales: Sequence[float] | None = None) -> None:
        """Add the pending contributions, as if the gradients of layer l had been multiplied by scales[l]."""
        for entry in self.accumulators:
            entry.commit(1.0 if scales is None else scales[entry.block.layer])
        self._sums += self._pending
        self.discard()

    @torch.no_grad()
    def discard(self) -> None:
        """Drop the pending contributions of the current step."""
        self._pending.zero_()
        for entry in self.accumulators:
            entry.discard()

    def mark(self) -> Mark:
        """What is committed so far, to go back to."""
        return Mark(self._sums.clone(), [(entry.tokens, len(entry.records)) for entry in self.accumulators])

    @torch.no_grad()
    def back_to(self, mark: Mark) -> None:
        """Undo what was committed since `mark` was taken, and drop what is pending."""
        self._sums.copy_(mark.sums)
        for entry, (tokens, steps) in zip(self.accumulators, mark.blocks, strict=True):
            entry.tokens = tokens
            del entry.records[steps:]
        self.discard()


def _views(entry: BlockAccumulator, norms: Tensor, rest: Tensor) -> BlockSums:
    return BlockSums(entry.block, norms, rest, entry.more_sums)
