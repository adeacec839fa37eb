"""`BlockTensors`: one tensor over the groups of each block."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from gradprune.models.blocks import Block
from gradprune.models.kinds import BlockKey


class BlockTensors:
    """A tensor [groups] for each existing block, all of one dtype and on the CPU.

    tensors[block] or tensors[key] is a block's tensor. To read layer by layer: `tensors.attention`, `tensors.mlp`.
    """

    def __init__(self, tensors: Mapping[BlockKey, Tensor], layers: int) -> None:
        """tensors: by block. layers: decoder layers of the model."""
        self._tensors = dict(tensors)
        self.layers = layers

    def __getitem__(self, block: Block | BlockKey) -> Tensor:
        """[groups], the block's tensor."""
        return self._tensors[_key(block)]

    def __contains__(self, block: Block | BlockKey) -> bool:
        """Whether the block exists."""
        return _key(block) in self._tensors

    def __iter__(self) -> Iterator[BlockKey]:
        """The existing blocks."""
        return iter(self._tensors)

    @property
    def attention(self) -> list[Tensor]:
        """Per decoder layer, [n_kv_groups]; of length 0 where there is no attention block."""
        return self._of_kind("attention")

    @property
    def mlp(self) -> list[Tensor]:
        """Per decoder layer, [n_channels]; of length 0 where there is no MLP block."""
        return self._of_kind("mlp")

    def _of_kind(self, kind: str) -> list[Tensor]:
        dtype = next((tensor.dtype for tensor in self._tensors.values()), torch.float32)
        missing = torch.empty(0, dtype=dtype)
        return [self._tensors.get(BlockKey(layer, kind), missing) for layer in range(self.layers)]


def _key(block: Block | BlockKey) -> BlockKey:
    return block.key if isinstance(block, Block) else block
