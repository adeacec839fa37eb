"""Ledgers: the sums of blocks that are committed together, in few tensors, because on a GPU each costs a launch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradprune.calibration.accumulator import BlockAccumulator, BlockSums


@dataclass(frozen=True)
class Mark:
    """A state to which a ledger can return: its sums, and each block's numbers of tokens and of steps."""

    sums: Tensor
    blocks: list[tuple[int, int]]


class Ledger:
    """The sums of several blocks on one device; a step's contributions stay pending until they are committed.

    accumulators: the accumulators of these blocks.
    """

    # Tensors created in inference mode cannot be changed outside it, where steps change the sums.
    @torch.inference_mode(False)
    def __init__(self, accumulators: Sequence[BlockAccumulator], device: torch.device) -> None:
        """Create sums that are zero, on `device`, and give each accumulator its part of them."""
        self.accumulators = accumulators
        sizes = [entry.sizes for entry in accumulators]
        # All blocks' norms come first, so that one operation squares them.
        self._norms = sum(norms for norms, _ in sizes)
        self._sums, self._pending = torch.zeros(
            2, self._norms + sum(rest for _, rest in sizes), dtype=torch.float64, device=device
        ).unbind()
        parts = zip(*(self._parts(whole, sizes) for whole in (self._sums, self._pending)), strict=True)
        for entry, (sums, pending) in zip(accumulators, parts, strict=True):
            entry.open(_views(entry, *sums), _views(entry, *pending))

    def _parts(self, whole: Tensor, sizes: Sequence[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        """Split one of the ledger's tensors by block, into each block's norms and the rest."""
        norms = whole[: self._norms].split([size for size, _ in sizes])
        return list(zip(norms, whole[self._norms :].split([size for _, size in sizes]), strict=True))

    @torch.no_grad()
    def finish(self, factor: float) -> None:
        """Complete the pending sums after a step's backward pass, whose gradients are `factor` times too large.

        factor: a power of two, by which the gradients are divided.
        """
        self._pending[: self._norms].square_()
        for entry in self.accumulators:
            entry.finish(factor)

    @torch.no_grad()
    def commit(self, scales: Sequence[float] | None = None) -> None:
        """Add the pending contributions, with layer l's gradients multiplied by scales[l]; None: not multiplied."""
        for entry in self.accumulators:
            entry.commit(1.0 if scales is None else scales[entry.block.layer])
        self._sums += self._pending
        self.discard()

    @torch.no_grad()
    def discard(self) -> None:
        """Drop the current step's pending contributions."""
        self._pending.zero_()
        for entry in self.accumulators:
            entry.discard()

    def mark(self) -> Mark:
        """Return a mark of what is committed so far, for `back_to`."""
        return Mark(self._sums.clone(), [(entry.tokens, len(entry.records)) for entry in self.accumulators])

    @torch.no_grad()
    def back_to(self, mark: Mark) -> None:
        """Undo everything committed since `mark` was taken, and drop what is pending."""
        self._sums.copy_(mark.sums)
        for entry, (tokens, steps) in zip(self.accumulators, mark.blocks, strict=True):
            entry.tokens = tokens
            del entry.records[steps:]
        self.discard()


def _views(entry: BlockAccumulator, norms: Tensor, rest: Tensor) -> BlockSums:
    return BlockSums(entry.block, norms, rest, entry.more_sums)
