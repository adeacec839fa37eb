"""Models as blocks: what is prunable, per architecture."""

from gradprune.models.architecture import ARCHITECTURES, Architecture
from gradprune.models.blocks import Block, PrunableModel, describe, supported_architectures
from gradprune.models.kinds import KINDS, BlockKey, Kind

__all__ = [
    "ARCHITECTURES",
    "KINDS",
    "Architecture",
    "Block",
    "BlockKey",
    "Kind",
    "PrunableModel",
    "describe",
    "supported_architectures",
]
