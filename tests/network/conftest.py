"""Hosts in network namespaces for each test; skipped, with the reason, where there can't be any.

Tests that take long are marked ``lengthy``: ``LINGUALINKED_NETWORK=all`` runs them all, any other text draws one of them, but
none that compares durations.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from network import namespaces
from network.hosts import Network
from network.lab import Lab
from network.uncut import Uncut, save_random_llama

_ASKED = os.environ.get("LINGUALINKED_NETWORK", "")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out lengthy tests that are not asked for."""
    lengthy = [item for item in items if item.get_closest_marker("lengthy") is not None]
    if _ASKED == "all" or not lengthy:
        return
    # On a machine that does much else, durations can't be compared.
    to_draw = sorted(
        item.nodeid for item in lengthy if not item.get_closest_marker("lengthy").kwargs.get("compares_durations")
    )
    drawn = random.Random(_ASKED).choice(to_draw) if _ASKED else None
    left_out = [item for item in lengthy if item.nodeid != drawn]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def make_network() -> Network:
    """Return a new network, or skip the test."""
    reason = namespaces.why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    return Network()


@pytest.fixture
def network(nothing_left_behind: None) -> Iterator[Network]:
    """A switch without hosts; everything is removed after the test."""
    with make_network() as made:
        yield made


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in bfloat16 of 8 layers, 3 MB in all."""
    return save_random_llama(tmp_path_factory.mktemp("checkpoint"), hidden_size=128, intermediate_size=384)


@pytest.fixture(scope="session")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of 6.3 MB for each layer: large beside everything else that crosses a wire."""
    return save_random_llama(tmp_path_factory.mktemp("checkpoint"), hidden_size=512, intermediate_size=1376)


@pytest.fixture(scope="session")
def uncut(checkpoint: Path) -> Uncut:
    """What the small model says uncut."""
    return Uncut(checkpoint)


@pytest.fixture(scope="session")
def uncut_large(large_checkpoint: Path) -> Uncut:
    """What the large model says uncut."""
    return Uncut(large_checkpoint)


@pytest.fixture(scope="module")
def started_lab(nothing_outlives_the_session: None, checkpoint: Path) -> Iterator[Lab]:
    """A caller and two daemons, for all tests of a file."""
    with make_network() as made:
        yield Lab(made, checkpoint)


@pytest.fixture
def lab(started_lab: Lab) -> Iterator[Lab]:
    """The same, with nothing open before the test and nothing left after it."""
    yield started_lab
    started_lab.close()
