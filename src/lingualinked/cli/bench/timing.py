"""Times calls of a model, sharded or not.

Knows `generate` and clocks; not what is compared.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Literal

import torch

Kind = Literal["decode", "prefill", "throughput"]
"""Tokens per second after the prompt, of the prompt, and of whole answers."""


def tokens_per_s(kind: Kind, model: Any, ids: torch.Tensor, new_tokens: int) -> float:
    """Return tokens per second of one kind."""
    if kind == "prefill":
        return ids.numel() / call_s(model, ids, 1)
    return (decode_tokens_per_s if kind == "decode" else call_tokens_per_s)(model, ids, new_tokens)


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


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Compute with so many threads of torch in this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Clock:
    """A streamer that notes when tokens come: the prompt first, then one by one."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002 - the time is all that counts
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""
