from __future__ import annotations

import subprocess
import sys

import pytest

import lingualinked.transport as room


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import lingualinked.transport", {"torch", "zmq", "msgspec", "transformers"}),
        ("from lingualinked.transport import KeyPair, Mailbox", {"torch", "transformers"}),
    ],
)
def test_imports_load_no_more_than_they_need(statement: str, unwanted: set[str]) -> None:
    script = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert not unwanted & set(done.stdout.split())


def test_every_public_name_is_there() -> None:
    assert room.__all__ == sorted(room.__all__, key=lambda name: (name[0].islower(), name))
    for name in room.__all__:
        assert getattr(room, name).__name__ == name
        assert name in dir(room)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = room.Nothing
