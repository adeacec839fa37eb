"""Models seen as blocks of prunable groups."""

from gradprune.models.blocks import Block, LinearBlock, PrunableModel
from gradprune.models.describe import accepted_kinds, describe, whole_view
from gradprune.models.kinds import KINDS, BlockKey, Kind, shown_kinds

__all__ = [
    "KINDS",
    "Block",
    "BlockKey",
    "Kind",
    "LinearBlock",
    "PrunableModel",
    "accepted_kinds",
    "describe",
    "shown_kinds",
    "whole_view",
]
