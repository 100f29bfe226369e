"""What the tests of other libraries share: the comparison of what one script returns of both models.

Knows neither the libraries nor what they do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import lingualinked as ll

Compare = Callable[[Callable[[Any], Any]], None]


def flat(value: Any) -> list[Any]:
    """List the tensors and plain values in a structure."""
    if isinstance(value, Tensor):
        return [value.detach()]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [each for item in value for each in flat(item)]
    return [value]


def make_compare(sharded: ll.ShardedModel, unsharded: PreTrainedModel) -> Compare:
    """Return a function that compares what a script returns of both models, bit for bit."""

    def compare_results(script: Callable[[Any], Any]) -> None:
        ours, theirs = (flat(script(model)) for model in (sharded, unsharded))
        assert len(ours) == len(theirs) > 0
        for our, their in zip(ours, theirs, strict=True):
            assert torch.equal(our, their) if isinstance(their, Tensor) else our == their and type(our) is type(their)

    return compare_results


@pytest.fixture
def compare(sharded: ll.ShardedModel, unsharded: PreTrainedModel) -> Compare:
    return make_compare(sharded, unsharded)
