"""The head of a model card: the YAML that `README.md` of a checkpoint begins with."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

CARD = "README.md"
TAG = "gradprune"
"""The tag by which a checkpoint of gradprune's is known."""


def card_head(folder: Path) -> dict[str, Any]:
    """What the head says; empty where there is no card, or none that can be read."""
    try:
        head = metadata_load(folder / CARD)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return head or {}
