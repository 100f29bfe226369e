"""The versions of this package, and of those that determine what it computes.

Knows what is installed; imports none of it.
"""

from __future__ import annotations

import importlib.metadata
import platform
from typing import NamedTuple


class Versions(NamedTuple):
    """Versions, as texts: another lingualinked has another protocol, and another torch or transformers may have other bits."""

    lingualinked: str
    torch: str
    transformers: str
    python: str


def installed_versions() -> Versions:
    """Return the versions that are installed here."""
    version = importlib.metadata.version
    return Versions(version("lingualinked"), version("torch"), version("transformers"), platform.python_version())
