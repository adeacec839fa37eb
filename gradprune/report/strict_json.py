"""Strict JSON, which has no NaN and no infinity."""

import json
from pathlib import Path
from typing import Any


def json_text(content: Any) -> str:
    """Format `content` as indented strict JSON; NaN and infinities, which JSON lacks, become strings."""
    return json.dumps(_finite(content), indent=2, allow_nan=False)


def write_json(path: Path, content: Any) -> None:
    """Write `content` to a file as strict JSON, see `json_text`."""
    path.write_text(json_text(content) + "\n", encoding="utf-8")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, float) and content - content != 0.0:
        return str(content)
    return content
