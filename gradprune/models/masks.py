"""`GroupMasks`: which groups each block keeps."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from gradprune.models.blocks import Block
from gradprune.models.kinds import BlockKey


class GroupMasks:
    """A bool mask for each existing block, [groups] on the CPU, True where the group is kept.

    masks[block] or masks[key] is a block's mask. For reading by layer: `masks.attention`, `masks.mlp`.
    """

    def __init__(self, kept: Mapping[BlockKey, Tensor], layers: int) -> None:
        """kept: by block. layers: decoder layers of the model."""
        self._kept = dict(kept)
        self.layers = layers

    @classmethod
    def of_layers(cls, **kinds: Iterable[Tensor]) -> "GroupMasks":
        """From one mask per decoder layer for each kind, e.g. `of_layers(attention=heads, mlp=channels)`.

        A mask of length 0 stands for a block that does not exist.

        Raises:
            ValueError: the kinds differ in their number of layers.
        """
        masks = {kind: list(of_kind) for kind, of_kind in kinds.items()}
        counts = {kind: len(of_kind) for kind, of_kind in masks.items()}
        if len(set(counts.values())) != 1:
            raise ValueError(f"masks: one mask per decoder layer is needed for each kind, but there are {counts}")
        kept = {
            BlockKey(layer, kind): mask
            for kind, of_kind in masks.items()
            for layer, mask in enumerate(of_kind)
            if len(mask)
        }
        return cls(kept, max(counts.values()))

    def __getitem__(self, block: Block | BlockKey) -> Tensor:
        """[groups] bool, the groups that the block keeps."""
        return self._kept[block.key if isinstance(block, Block) else block]

    def __contains__(self, block: Block | BlockKey) -> bool:
        """Whether the block exists."""
        return (block.key if isinstance(block, Block) else block) in self._kept

    def __iter__(self) -> Iterator[BlockKey]:
        """The blocks that have a mask."""
        return iter(self._kept)

    @property
    def attention(self) -> list[Tensor]:
        """Per decoder layer, [n_kv_groups]; of length 0 where there is no attention block."""
        return per_layer(self._kept, "attention", self.layers, torch.bool)

    @property
    def mlp(self) -> list[Tensor]:
        """Per decoder layer, [n_channels]; of length 0 where there is no MLP block."""
        return per_layer(self._kept, "mlp", self.layers, torch.bool)


def per_layer(tensors: Mapping[BlockKey, Tensor], kind: str, layers: int, dtype: torch.dtype) -> list[Tensor]:
    """The tensor of each decoder layer's block of that kind; an empty one of `dtype` where there is no such block."""
    missing = torch.empty(0, dtype=dtype)
    return [tensors.get(BlockKey(layer, kind), missing) for layer in range(layers)]
