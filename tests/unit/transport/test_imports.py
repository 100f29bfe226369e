from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import lingualinked.transport", {"torch", "zmq", "msgspec", "transformers"}),
        ("import lingualinked.transport.keys.keys, lingualinked.transport.mailbox", {"torch", "transformers"}),
    ],
)
def test_imports_load_no_more_than_they_need(statement: str, unwanted: set[str]) -> None:
    script = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert not unwanted & set(done.stdout.split())
