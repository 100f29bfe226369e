"""The other programs among the sides that a measurement compares.

Knows which of them were asked for; not how they run.
"""

from __future__ import annotations

from collections.abc import Callable

from lingualinked.cli.bench.models import BenchModels
from lingualinked.cli.bench.timing import Kind, tokens_per_s, torch_threads
from lingualinked.processor import usable_cores


def peer_sides(
    models: BenchModels, kind: Kind, rows: int, prompt_tokens: int, new_tokens: int
) -> dict[str, Callable[[], float]]:
    """Return the sides of other programs, among those that were asked for."""
    sides: dict[str, Callable[[], float]] = {}
    if "accelerate" in models.options.against:
        ids = models.draw_ids(rows, prompt_tokens)

        def measure_offloaded() -> float:
            with torch_threads(usable_cores()):
                return tokens_per_s(kind, models.disk_offloaded, ids, new_tokens)

        sides["accelerate"] = measure_offloaded
    if "llama.cpp" in models.options.against:
        sides["llama.cpp"] = lambda: models.llama_cpp.tokens_per_s(kind, rows, prompt_tokens, new_tokens)
    return sides
