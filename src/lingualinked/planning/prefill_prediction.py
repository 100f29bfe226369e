"""What a prompt in chunks, which follow each other through the stages, is predicted to take; and in which chunks it takes least.

Knows what steps cost as functions; neither profiles nor plans.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

from lingualinked.module_times import ModuleTimes
from lingualinked.quantities import count_text, seconds_text
from lingualinked.shown import Printed

StepCost = Callable[[int, int], float]
"""Seconds of a step of so many new tokens per row behind so many others."""

Halt = tuple[Sequence[float], float]
"""Seconds for which each chunk of a prompt keeps a device or a link busy, and those on its way to the next."""

_NUMBERS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128)
_GRANULE = 32  # tokens: matrix products and attention take them in blocks of this size, or of a multiple
_LEAST_GAIN = 1.02  # times as fast as the whole prompt at once
_FAR = 1024  # tokens of context at which it is read how times grow


@dataclasses.dataclass(frozen=True, slots=True)
class StageCost:
    """What a stage and the hop to it cost.

    ``transfer_s`` are the seconds in which so many tokens keep the link to the stage busy.
    """

    compute_s: StepCost
    latency_s: float = 0.0
    transfer_s: Callable[[int], float] = lambda _: 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPrediction(Printed):
    """A prompt in chunks, with nothing else in flight.

    Parameters
    ----------
    prompt_tokens : int
        Tokens of the prompt, per row.
    prefill_chunk_size : int
        Tokens of a chunk, per row; the last one may have fewer.
    first_token_s : float
        Seconds from the prompt to its first token.
    whole_s : float
        The same for the whole prompt at once.
    """

    prompt_tokens: int
    prefill_chunk_size: int
    first_token_s: float
    whole_s: float

    def __str__(self) -> str:
        prompt = f"a prompt of {count_text(self.prompt_tokens, 'token')}"
        num_chunks = -(-self.prompt_tokens // self.prefill_chunk_size)
        if num_chunks == 1:
            return f"{prompt} at once: first token after {seconds_text(self.first_token_s)}"
        return (
            f"{prompt} in {count_text(num_chunks, 'chunk')} of up to "
            f"{self.prefill_chunk_size:,}: first token after {seconds_text(self.first_token_s)}, at once after "
            f"{seconds_text(self.whole_s)}"
        )


def cost_of(parts: Sequence[tuple[ModuleTimes, int]], rows: int) -> StepCost:
    """Return what a step of so many rows costs in parts of a model, each as often as it says."""

    @functools.cache
    def line(tokens: int) -> tuple[float, float]:
        here, far = (sum(count * times.seconds(rows, tokens, each) for times, count in parts) for each in (0, _FAR))
        return here, (far - here) / _FAR

    def seconds(tokens: int, context: int) -> float:
        start_s, slope = line(tokens)
        return start_s + slope * context

    return seconds


def predict_first_token_s(stages: Iterable[StageCost], after_s: float, prompt_tokens: int, chunk_size: int) -> float:
    """Return the seconds from a prompt to its first token, in chunks of a size.

    Each stage and each link takes one chunk after the other, as soon as the one before is done and the chunk is there.
    ``after_s`` is what follows the last layer, of the last chunk alone.
    """
    chunks = list(_chunks(prompt_tokens, chunk_size))
    halts: list[Halt] = []
    for stage in stages:
        halts.append(([stage.transfer_s(tokens) for _, tokens in chunks], stage.latency_s))
        halts.append(([stage.compute_s(tokens, context) for context, tokens in chunks], 0.0))
    return pass_chunks(halts) + after_s


def pass_chunks(halts: Iterable[Halt]) -> float:
    """Return when the last chunk of a prompt has left the last halt.

    All chunks are there at first. Each halt takes one after the other, as soon as it is free and the chunk is there.
    """
    ready_s: list[float] = []
    for seconds, delay_s in halts:
        ready_s, free_s = ready_s or [0.0] * len(seconds), 0.0
        for index, busy_s in enumerate(seconds):
            free_s = max(free_s, ready_s[index]) + busy_s
            ready_s[index] = free_s + delay_s
    return ready_s[-1]


def predict_prefill(
    stages: Iterable[StageCost], after_s: float, prompt_tokens: int, chunk_size: int | None
) -> PrefillPrediction:
    """Predict a prompt in chunks of a size; None: of the size in which it takes least."""
    stages = list(stages)
    whole_s = predict_first_token_s(stages, after_s, prompt_tokens, prompt_tokens)
    sizes = _sizes(prompt_tokens) if chunk_size is None else {min(chunk_size, prompt_tokens)}
    by_size = {size: predict_first_token_s(stages, after_s, prompt_tokens, size) for size in sizes}
    size = min(by_size, key=by_size.__getitem__)
    if chunk_size is None and by_size[size] * _LEAST_GAIN > whole_s:
        size, by_size = prompt_tokens, {prompt_tokens: whole_s}
    return PrefillPrediction(
        prompt_tokens=prompt_tokens, prefill_chunk_size=size, first_token_s=by_size[size], whole_s=whole_s
    )


def _chunks(prompt_tokens: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield for each chunk how many tokens come before it, and how many it has."""
    for context in range(0, prompt_tokens, size):
        yield context, min(size, prompt_tokens - context)


def _sizes(prompt_tokens: int) -> set[int]:
    """Return the sizes to choose from: about equal chunks of a prompt."""
    sizes = {-(-prompt_tokens // number) for number in _NUMBERS}
    return {min(prompt_tokens, -(-size // _GRANULE) * _GRANULE) for size in sizes}
