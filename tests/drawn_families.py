"""Draws by a text, such as a commit, which architectures the tests go through that go through all of them.

Of the tests that go through all model types of transformers, a fifth of these is drawn; of those that go through all models
of another kind (with states, with pictures, with an encoder), a few.

The usual ones are always among them: each stands for a kind of attention, positions, ends or layers.
"""

from __future__ import annotations

import collections
import random
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import pytest

import encoder_decoders
from architectures import draw_types
from families import FAMILIES
from pictures import PICTURE_FAMILIES
from state_models import STATES

USUAL = frozenset({"bloom", "falcon-7b", "gemma2", "gpt2", "llama", "llama-dynamic", "mixtral", "opt-350m"})
NUM_DRAWN = 6
NUM_OF_KIND = 3
OTHER_KINDS: tuple[Collection[str], ...] = (STATES, PICTURE_FAMILIES, encoder_decoders.FAMILIES)
_ALL, _ALL_OF_KIND = 12, 8  # a test with so many goes through all of them, but for those that say nothing new


def drawn(text: str) -> frozenset[str]:
    """Return the architectures that a text draws, and the usual ones."""
    return USUAL.union(random.Random(text).sample(sorted(FAMILIES.keys() - USUAL), NUM_DRAWN))


def drawn_of_kind(text: str, kind: Collection[str]) -> frozenset[str]:
    """Return the few models of another kind that a text draws."""
    return frozenset(random.Random(text).sample(sorted(kind), NUM_OF_KIND))


def not_drawn(items: Iterable[pytest.Item], text: str) -> set[pytest.Item]:
    """Return the tests of architectures that are not drawn, where a test goes through all of them."""
    items = list(items)
    chosen_types = draw_types(text)
    of_types = {item: item.callspec.params.get("every_type") for item in items if hasattr(item, "callspec")}
    left_out = {item for item, each in of_types.items() if each is not None and each not in chosen_types}
    left_out |= _not_among(items, FAMILIES, _ALL, drawn(text))
    for kind in OTHER_KINDS:
        left_out |= _not_among(items, kind, _ALL_OF_KIND, drawn_of_kind(text, kind))
    return left_out


def _not_among(
    items: Iterable[pytest.Item], kind: Collection[str], num_all: int, chosen: Collection[str]
) -> set[pytest.Item]:
    """Return the tests of models of one kind that are not chosen, where a test goes through all of the kind."""
    by_test: dict[str, dict[pytest.Item, str]] = collections.defaultdict(dict)
    for item in items:
        name = next((each for each in _names(item) if each in kind), None)
        if name is not None:
            by_test[item.nodeid.partition("[")[0]][item] = name
    return {
        item
        for names in by_test.values()
        if len(set(names.values())) >= num_all
        for item, name in names.items()
        if name not in chosen
    }


def family_of(item: Any) -> str | None:
    """Return the architecture that a test's parameters name."""
    return next((name for name in _names(item) if name in FAMILIES), None)


def _names(item: Any) -> Iterator[str]:
    """Yield the strings among a test's parameters."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    for value in values:
        yield from (each for each in (value if isinstance(value, tuple) else (value,)) if isinstance(each, str))
