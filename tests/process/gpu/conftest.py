"""What needs an accelerator: run by ``pytest --accelerator`` alone (with ``cpu``, to see that the tests themselves run)."""

from __future__ import annotations

import pytest

import accelerators


@pytest.fixture(scope="session", autouse=True)
def needs_accelerator() -> None:
    if not accelerators.is_asked_for:
        pytest.skip("for pytest --accelerator cuda")
