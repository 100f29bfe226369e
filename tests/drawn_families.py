"""Draws by a text, such as a commit, which architectures the tests go through that go through all of them.

Of the tests that go through all model types of transformers, a fifth of these is drawn.

The usual ones are always among them: each stands for a kind of attention, positions, ends or layers.
"""

from __future__ import annotations

import collections
import random
from collections.abc import Iterable
from typing import Any

import pytest

from architectures import draw_types
from families import FAMILIES

USUAL = frozenset({"bloom", "falcon-7b", "gemma2", "gpt2", "llama", "llama-dynamic", "mixtral", "opt-350m"})
NUM_DRAWN = 6
_ALL = 12  # a test with so many architectures goes through all of them, but for those that say nothing new


def drawn(text: str) -> frozenset[str]:
    """Return the architectures that a text draws, and the usual ones."""
    return USUAL.union(random.Random(text).sample(sorted(FAMILIES.keys() - USUAL), NUM_DRAWN))


def not_drawn(items: Iterable[pytest.Item], text: str) -> set[pytest.Item]:
    """Return the tests of architectures that are not drawn, where a test goes through all of them."""
    items = list(items)
    by_test: dict[str, dict[pytest.Item, str]] = collections.defaultdict(dict)
    for item in items:
        family = family_of(item)
        if family is not None:
            by_test[item.nodeid.partition("[")[0]][item] = family
    chosen, chosen_types = drawn(text), draw_types(text)
    of_types = {item: item.callspec.params.get("every_type") for item in items if hasattr(item, "callspec")}
    return {item for item, each in of_types.items() if each is not None and each not in chosen_types} | {
        item
        for families in by_test.values()
        if len(set(families.values())) >= _ALL
        for item, family in families.items()
        if family not in chosen
    }


def family_of(item: Any) -> str | None:
    """Return the architecture that a test's parameters name."""
    if not hasattr(item, "callspec"):
        return None
    values = item.callspec.params.values()
    names = [each for value in values for each in (value if isinstance(value, tuple) else (value,))]
    return next((name for name in names if isinstance(name, str) and name in FAMILIES), None)
