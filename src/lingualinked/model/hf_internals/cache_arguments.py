"""Under which name a class of transformers takes and returns what it keeps of a text, and of which kind that is.

Knows signatures and what ``generate`` says of classes; no KV.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import GenerationMixin
from transformers.generation.utils import ALL_CACHE_NAMES


def cache_argument(cls: Any) -> str | None:
    """Return the argument of a class's ``forward`` that takes what it keeps of a text; None if it keeps nothing."""
    known = inspect.signature(cls.forward).parameters
    return next((name for name in ALL_CACHE_NAMES if name in known), None)


def masks_past(cls: Any) -> bool:
    """Return whether a class's mask is of the tokens before a step too; state-space models alone get none behind the prompt."""
    return cache_argument(cls) in ("past_key_values", None)


def keeps_cache(cls: Any) -> bool:
    """Return whether a class, which may not generate, keeps transformers' ``Cache``, and no object of its own."""
    return cache_argument(cls) is not None and supports_cache(cls)


def supports_cache(cls: Any) -> bool:
    """Return whether what a class keeps is transformers' ``Cache``, if it keeps anything."""
    return bool(GenerationMixin._supports_default_dynamic_cache.__func__(cls))  # type: ignore[attr-defined, misc]
