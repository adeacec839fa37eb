"""What is prunable, per architecture."""

from gradprune.models.architecture import ARCHITECTURES, Architecture
from gradprune.models.blocks import Block, Kind, PrunableModel, describe, supported_architectures

__all__ = ["ARCHITECTURES", "Architecture", "Block", "Kind", "PrunableModel", "describe", "supported_architectures"]
