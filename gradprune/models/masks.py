"""`GroupMasks`: which groups each block keeps."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class GroupMasks:
    """One bool tensor a decoder layer on the CPU, True where the group is kept.

    attention: per layer [n_kv_groups]. mlp: per layer [n_channels]. Of length 0 where the block does not exist.
    """

    attention: tuple[Tensor, ...]
    mlp: tuple[Tensor, ...]
