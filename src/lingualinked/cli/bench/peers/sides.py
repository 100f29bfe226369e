"""The other programs among the sides that a measurement compares.

Knows which of them were asked for; not how they run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lingualinked.cli.bench.models import BenchModels

Kind = Literal["decode", "prefill", "throughput"]
"""Tokens per second after the prompt, of the prompt, and of whole answers."""


def peer_sides(
    models: BenchModels, kind: Kind, rows: int, prompt_tokens: int, new_tokens: int
) -> dict[str, Callable[[], float]]:
    """Return the sides of other programs, among those that were asked for."""
    sides: dict[str, Callable[[], float]] = {}
    if "accelerate" in models.options.against:
        from lingualinked.cli.bench.peers.disk_offload import disk_offload_side

        sides["accelerate"] = disk_offload_side(models, kind, rows, prompt_tokens, new_tokens)
    if "llama.cpp" in models.options.against:
        sides["llama.cpp"] = lambda: models.llama_cpp.tokens_per_s(kind, rows, prompt_tokens, new_tokens)
    return sides
