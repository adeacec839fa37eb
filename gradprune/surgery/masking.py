"""Masking: make a model compute what it would without some groups, without cutting it; exactly reversible.

Zeroing a group's columns of the output projection has the same effect as cutting the group.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

from torch import Tensor, nn

from gradprune.models import Block, PrunableModel
from gradprune.models.masks import GroupMasks
from gradprune.models.streams import Streams


def masks_by_block(view: PrunableModel, masks: GroupMasks) -> Iterator[tuple[Block, Tensor]]:
    """Every existing block, in order, with the groups it keeps: [groups] bool."""
    for block in view.blocks:
        yield block, masks[block]


@contextmanager
def masked(view: PrunableModel, masks: GroupMasks) -> Iterator[None]:
    """Inside the context the model, which is whole in memory, computes what the cut one would."""
    with ExitStack() as stack:
        for layer in range(len(view.layers)):
            stack.enter_context(masked_layer(view, masks, layer))
        yield


@contextmanager
def masked_layer(view: PrunableModel, masks: GroupMasks, layer: int) -> Iterator[None]:
    """Inside the context a decoder layer, whose weights are in memory, computes what the cut one would."""
    with ExitStack() as stack:
        for block in view.of_layer(layer):
            if not masks[block].all():
                stack.enter_context(block.masked(masks[block]))
        yield


def masked_outputs(
    streams: Streams,
    block: Block,
    kept: Tensor,
    before: Sequence[Tensor],
    written: Sequence[dict[nn.Module, Tensor]],
) -> list[Tensor]:
    """What a block, whose weights are in memory, writes with its pruned groups masked.

    Args:
        streams, before, written: the batches, the stream before the layer, and what modules before the block write.
        block, kept: the block, and what it keeps: [groups] bool.
    """
    with nullcontext() if kept.all() else block.masked(kept):
        return [streams.block_output(block, batch, stream, written[batch]) for batch, stream in enumerate(before)]


def mask_output(block: Block, kept: Tensor) -> None:
    """Zero what the pruned groups write; also the bias if no group is kept, as cutting drops the block."""
    if not kept.all():
        block.mask(kept)
