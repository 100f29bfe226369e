"""Hosts in network namespaces for each test; skipped, with the reason, where there can't be any."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from network import namespaces
from network.hosts import Network


@pytest.fixture
def network(nothing_left_behind: None) -> Iterator[Network]:
    """A switch without hosts; everything is removed after the test."""
    reason = namespaces.why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    with Network() as made:
        yield made
