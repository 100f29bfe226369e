"""Reads which classes of transformers a checkpoint names, so that workers import them while they start.

Knows config.json alone; imports neither torch nor transformers.
"""

from __future__ import annotations

import json
from pathlib import Path


def named_classes(folder: Path) -> tuple[str, ...]:
    """Return the classes named by a local checkpoint, for workers to import early; empty if it can't be read."""
    try:
        architectures = json.loads((folder / "config.json").read_text()).get("architectures")
    except (OSError, ValueError, AttributeError):
        return ()
    return tuple(name for name in architectures or () if isinstance(name, str))
