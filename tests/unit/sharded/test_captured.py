"""What was captured is a mapping of tensors, bounded, that says which devices made them and which of those are not trusted."""

from __future__ import annotations

import pytest
import torch

from lingualinked.cluster.steps.captured import CapturedValue
from lingualinked.errors import ArgumentError
from lingualinked.sharded.instruments.captured import Captured


def value(device: str, *shape: int) -> CapturedValue:
    return CapturedValue(0, torch.ones(shape), device, session=1)


def test_devices_that_are_not_trusted_are_marked() -> None:
    captured = Captured(["a", "b"], 2**20)
    captured.add("a", value("home", 2, 3), is_trusted=True)
    captured.add("b", value("cloud", 2, 3), is_trusted=False)
    captured.add("b", value("home", 2, 1), is_trusted=True)
    assert captured.devices == {"a": ("home",), "b": ("cloud", "home")}
    assert captured.untrusted == {"b"}
    assert "untrusted: b" in repr(captured)
    assert captured["b"].cat().shape == (2, 4)
    assert captured["b"].sessions == (1, 1)
    assert len(captured["b"][:1]) == 1
    captured.clear()
    assert captured.untrusted == set()
    assert (captured.num_bytes, list(captured["b"])) == (0, [])


def test_what_is_held_is_bounded() -> None:
    captured = Captured(["a"], 100)
    captured.check_room(100)
    captured.add("a", value("home", 1, 20), is_trusted=True)
    with pytest.raises(ArgumentError, match=r"holds 80 B, and this step would add 21 B.*max_bytes=100 B"):
        captured.check_room(21)


def test_tensors_of_several_calls_are_not_joined() -> None:
    captured = Captured(["a"], 100)
    captured.add("a", value("home", 1, 2), is_trusted=True)
    captured.add("a", value("home", 2, 2), is_trusted=True)
    with pytest.raises(ArgumentError, match=r"\[\[1, 2\], \[2, 2\]\]"):
        captured["a"].cat()
