"""``lingualinked bench decode``: tokens per second after the prompt, of one stream and of batches.

Knows models and clocks; alternates all sides in one run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import lingualinked as ll
from lingualinked.cli.bench.measurement import Measurement, take_turns
from lingualinked.cli.bench.models import BenchModels, one_at_a_time
from lingualinked.cli.bench.peers.sides import peer_sides
from lingualinked.cli.bench.timing import call_tokens_per_s, decode_tokens_per_s, generate, torch_threads
from lingualinked.cli.repeats import Repeats, ratios
from lingualinked.model.exact.linear_speed import measure_memory
from lingualinked.quantities import count_text


def measure_decode(
    models: BenchModels, rows: Sequence[int], context: int, new_tokens: int, num_beams: int
) -> list[Measurement]:
    """Measure decoding of batches of so many rows, each against the sides that were asked for."""
    return [_measure_rows(models, num_rows, context, new_tokens, num_beams) for num_rows in rows]


def _measure_rows(models: BenchModels, num_rows: int, context: int, new_tokens: int, num_beams: int) -> Measurement:
    ids, against = models.draw_ids(num_rows, context), models.options.against
    beams: dict[str, Any] = {"num_beams": num_beams} if num_beams > 1 else {}
    time_call = call_tokens_per_s if beams else decode_tokens_per_s  # beams are not streamed

    def measure(model: Any, **arguments: Any) -> float:
        return time_call(model, ids, new_tokens, **beams, **arguments)

    # 1) the sides
    sides: dict[str, Callable[[], float]] = {"sharded": lambda: measure(models.sharded), **models.uncut_sides(measure)}
    if "one-step" in against:
        sides["one-step"] = lambda: measure(models.sharded, **one_at_a_time())
    if "lingualinked" in against:
        sides["lingualinked"] = lambda: call_tokens_per_s(models.paper_way, ids, new_tokens, use_cache=False, **beams)
    sides |= peer_sides(models, "decode", num_rows, context, new_tokens)
    # 2) whether the tokens are equal
    notes = []
    if any(mode.startswith("uncut") for mode in against):
        notes.append(_compare_tokens(models, ids, new_tokens, beams))
    # 3) times
    values = take_turns(sides, models.options.repeats)
    if num_rows == 1 and not beams:
        notes.append(_share_of_memory(models, values["sharded"]))
    shape = f"{context:,} + {new_tokens:,} tokens"
    return Measurement(
        what=f"decode, {count_text(num_rows, 'row')}{f' of {num_beams} beams' if beams else ''} of {shape}",
        unit="tokens/s",
        values=values,
        predicted=None if beams else _predict(models.sharded.plan, context, new_tokens, num_rows),
        at_least={"llama.cpp": 1.0, "lingualinked": 10.0, **({"uncut-2": 1.5} if num_rows == 16 else {})},
        notes=tuple(notes),
    )


def _predict(plan: ll.Plan, context: int, new_tokens: int, num_rows: int) -> float | None:
    if plan.profile is None:
        return None
    workload = ll.Workload(prompt_tokens=context, new_tokens=new_tokens, batch_size=num_rows)
    return num_rows / plan.predict(workload).step_s


def _compare_tokens(models: BenchModels, ids: torch.Tensor, new_tokens: int, beams: dict[str, Any]) -> str:
    """Say whether the tokens are the uncut model's with as many threads as the workers have."""
    threads = models.cluster.devices[0].threads or 1
    with torch_threads(threads):
        expected = generate(models.uncut, ids, new_tokens, **beams)
    is_equal = torch.equal(generate(models.sharded, ids, new_tokens, **beams), expected)
    verdict = "equal" if is_equal else "NOT equal"
    return f"Tokens of {count_text(len(ids), 'row')} are {verdict} to the uncut model's with {count_text(threads, 'thread')}."


def _share_of_memory(models: BenchModels, speeds: Sequence[float]) -> str:
    """Say how fast weights are read while one stream is decoded, beside the speed at which one thread reads memory."""
    layers = [each for each in models.sharded.modules() if isinstance(each, torch.nn.Linear)]
    num_bytes = sum(each.weight.nbytes for each in layers)
    reading = Repeats([num_bytes * speed / 1e9 for speed in speeds])
    memory = Repeats([measure_memory() / 1e9 for _ in speeds])
    return (
        f"One stream reads weights at {reading.text(1)} GB/s; one thread reads memory at {memory.text(1)} GB/s: "
        f"a share of {ratios(reading, memory).median:.2f}."
    )
