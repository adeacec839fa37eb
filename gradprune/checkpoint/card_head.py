"""The head of a model card: the YAML metadata at the beginning of a checkpoint's `README.md`."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

CARD = "README.md"
TAG = "gradprune"
"""The tag that marks a checkpoint as written by gradprune."""


def card_head(folder: Path) -> dict[str, Any]:
    """Read the metadata of a folder's model card; empty if there is no card or it cannot be read."""
    try:
        head = metadata_load(folder / CARD)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return head or {}
