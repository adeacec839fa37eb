"""`BlockTensors`: for each block, one tensor with a value per group."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from gradprune.models.blocks import Block
from gradprune.models.kinds import BlockKey


class BlockTensors:
    """A tensor [groups] for each existing block; all are on the CPU and of the same dtype.

    tensors[block] or tensors[key] is a block's tensor; `tensors.attention` and `tensors.mlp` are lists by layer.
    """

    def __init__(self, tensors: Mapping[BlockKey, Tensor], layers: int) -> None:
        """tensors: [groups] for each existing block. layers: the model's number of decoder layers."""
        self._tensors = dict(tensors)
        self.layers = layers

    def __getitem__(self, block: Block | BlockKey) -> Tensor:
        """The block's tensor, [groups]."""
        return self._tensors[_key(block)]

    def __contains__(self, block: Block | BlockKey) -> bool:
        """Whether the block exists."""
        return _key(block) in self._tensors

    def __iter__(self) -> Iterator[BlockKey]:
        """Iterate over the keys of the existing blocks."""
        return iter(self._tensors)

    @property
    def attention(self) -> list[Tensor]:
        """For each decoder layer, [n_kv_groups]; of length 0 if it has no attention block."""
        return self._of_kind("attention")

    @property
    def mlp(self) -> list[Tensor]:
        """For each decoder layer, [n_channels]; of length 0 if it has no MLP block."""
        return self._of_kind("mlp")

    def _of_kind(self, kind: str) -> list[Tensor]:
        dtype = next((tensor.dtype for tensor in self._tensors.values()), torch.float32)
        missing = torch.empty(0, dtype=dtype)
        return [self._tensors.get(BlockKey(layer, kind), missing) for layer in range(self.layers)]


def _key(block: Block | BlockKey) -> BlockKey:
    return block.key if isinstance(block, Block) else block
