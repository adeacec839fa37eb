"""`GroupMasks`: which groups each block keeps."""

from collections.abc import Iterable

from torch import Tensor

from gradprune.models.kinds import BlockKey
from gradprune.models.tensors import BlockTensors


class GroupMasks(BlockTensors):
    """A bool mask [groups] for each existing block, True where the group is kept."""

    @classmethod
    def of_layers(cls, **kinds: Iterable[Tensor]) -> "GroupMasks":
        """Build from one mask per decoder layer for each kind, e.g. `of_layers(attention=heads, mlp=channels)`.

        A mask of length 0 stands for a block that does not exist.

        Raises:
            ValueError: the kinds differ in their number of layers.
        """
        masks = {kind: list(of_kind) for kind, of_kind in kinds.items()}
        counts = {kind: len(of_kind) for kind, of_kind in masks.items()}
        if len(set(counts.values())) != 1:
            raise ValueError(f"masks: each kind needs one mask per decoder layer, but their numbers are {counts}")
        kept = {
            BlockKey(layer, kind): mask
            for kind, of_kind in masks.items()
            for layer, mask in enumerate(of_kind)
            if len(mask)
        }
        return cls(kept, max(counts.values()))
