"""Masking: make an uncut model compute what it would without some groups; this can be undone exactly.

Zeroing a group's columns of the output projection has the same effect as cutting the group.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

from torch import Tensor, nn

from gradprune.models import Block, PrunableModel
from gradprune.models.masks import GroupMasks
from gradprune.models.streams import Streams


def masks_by_block(view: PrunableModel, masks: GroupMasks) -> Iterator[tuple[Block, Tensor]]:
    """Yield every existing block, in order, with its mask of kept groups, [groups] bool."""
    for block in view.blocks:
        yield block, masks[block]


@contextmanager
def masked(view: PrunableModel, masks: GroupMasks) -> Iterator[None]:
    """Context manager in which the model, which is whole in memory, computes what the cut model would."""
    with ExitStack() as stack:
        for layer in range(len(view.layers)):
            stack.enter_context(masked_layer(view, masks, layer))
        yield


@contextmanager
def masked_layer(view: PrunableModel, masks: GroupMasks, layer: int) -> Iterator[None]:
    """Context manager in which a decoder layer, whose weights are in memory, computes what the cut layer would."""
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
    """Return, per batch, what a block, whose weights are in memory, writes with its pruned groups masked.

    Args:
        streams: runs the layers on the batches.
        block: the block.
        kept: [groups] bool, the groups that it keeps.
        before: per batch, the residual stream before the layer.
        written: per batch, what the layer's earlier blocks write, by their modules.
    """
    with nullcontext() if kept.all() else block.masked(kept):
        return [streams.block_output(block, batch, stream, written[batch]) for batch, stream in enumerate(before)]


def mask_output(block: Block, kept: Tensor) -> None:
    """Zero what the pruned groups write, and the bias, too, if no group is kept: cutting then drops the block."""
    if not kept.all():
        block.mask(kept)
