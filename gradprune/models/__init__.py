"""Models as blocks: what is prunable in them."""

from gradprune.models.blocks import Block, PrunableModel
from gradprune.models.describe import accepted_kinds, describe
from gradprune.models.kinds import KINDS, BlockKey, Kind

__all__ = [
    "KINDS",
    "Block",
    "BlockKey",
    "Kind",
    "PrunableModel",
    "accepted_kinds",
    "describe",
]
