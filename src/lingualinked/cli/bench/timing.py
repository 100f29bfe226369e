"""Times calls of a model, sharded or not.

Knows `generate` and clocks; not what is compared.
"""

from __future__ import annotations

import time
from typing import Any

import torch


def decode_tokens_per_s(model: Any, ids: torch.Tensor, new_tokens: int, **arguments: Any) -> float:
    """Return tokens per second of all rows without the prefill: the clock starts when the first token is out."""
    clock = _Clock()
    generate(model, ids, new_tokens, streamer=clock, **arguments)
    return len(ids) * (new_tokens - 1) / (clock.times[-1] - clock.times[1])


def call_tokens_per_s(model: Any, ids: torch.Tensor, new_tokens: int, **arguments: Any) -> float:
    """Return new tokens per second of all rows, over the whole call."""
    return len(ids) * new_tokens / call_s(model, ids, new_tokens, **arguments)


def call_s(model: Any, ids: torch.Tensor, new_tokens: int, **arguments: Any) -> float:
    """Return the seconds of a whole call of `generate`."""
    began_s = time.perf_counter()
    generate(model, ids, new_tokens, **arguments)
    return time.perf_counter() - began_s


def generate(model: Any, ids: torch.Tensor, new_tokens: int, **arguments: Any) -> torch.Tensor:
    """Generate exactly so many tokens, past any end of text; greedily unless the arguments say otherwise."""
    options = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        **arguments,
    }
    tokens: torch.Tensor = model.generate(ids, max_new_tokens=new_tokens, **options)
    return tokens


class _Clock:
    """A streamer that notes when tokens come: the prompt first, then one by one."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002 - the time is all that counts
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""
