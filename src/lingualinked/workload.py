"""What a plan is made for: the lengths of prompts and answers, how many run at once, and the objective.

Knows numbers only.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from lingualinked.checks import MOST, is_count, is_integer
from lingualinked.errors import ArgumentError

Objective = Literal["throughput", "latency", "energy"]

_MOST_CHUNKS = 1024  # of a prompt


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The requests that a plan is made for: their shape, and how many are in flight.

    The solver plans for a pipeline that serves such requests continuously.

    Parameters
    ----------
    prompt_tokens : int
        Tokens of a prompt.
    new_tokens : int
        Tokens generated after it.
    batch_size : int
        Rows of a session: prompts that one ``generate`` call runs together.
    num_sessions : int
        Sessions in flight at the same time.
    num_microbatches : int or None
        Microbatches that a session's rows run as, which follow each other through the stages; ``None``: as many as are fastest,
        of the numbers that change no bit where rows run so (`DeviceProfile.rounding`).
    prefill_chunk_size : int, "auto" or None
        Tokens of a prompt's chunks, per row, which follow each other through the stages, as ``generate(prefill_chunk_size=)`` runs
        them; ``"auto"``: as many as are fastest; ``None``: the prompt is whole.
    trusted_layers : (int, int)
        Numbers of layers at the beginning and at the end of the model that stay on devices marked ``trusted``. Once any
        device is marked, the first and the last layer do so in any case.

    Raises
    ------
    ArgumentError
        If a value can't be used; the message names the field.
    """

    prompt_tokens: int = 128
    new_tokens: int = 128
    batch_size: int = 1
    num_sessions: int = 1
    num_microbatches: int | None = None
    prefill_chunk_size: int | Literal["auto"] | None = None
    trusted_layers: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "trusted_layers", _pair(self.trusted_layers))
        for name in ("prompt_tokens", "new_tokens", "batch_size", "num_sessions"):
            value = getattr(self, name)
            if not is_count(value):
                raise ArgumentError(f"{name}={value!r} of a workload must be a positive integer, at most {MOST}")

        if self.num_microbatches is not None and not (
            is_count(self.num_microbatches) and self.num_microbatches <= self.batch_size
        ):
            raise ArgumentError(
                f"num_microbatches={self.num_microbatches!r} of a workload must be an integer from 1 to batch_size={self.batch_size}"
            )

        if self.prefill_chunk_size not in (None, "auto") and not is_count(self.prefill_chunk_size):
            raise ArgumentError(
                f'prefill_chunk_size={self.prefill_chunk_size!r} of a workload must be a positive integer, "auto" or None'
            )

        if isinstance(size := self.prefill_chunk_size, int) and self.prompt_tokens > _MOST_CHUNKS * size:
            raise ArgumentError(
                f"prefill_chunk_size={size} of a workload cuts {self.prompt_tokens} prompt tokens into more than {_MOST_CHUNKS:,} "
                "chunks: give a larger one"
            )

    @property
    def chunks(self) -> tuple[tuple[int, int], ...]:
        """The chunks of a prompt: for each its tokens, and those before it; one where the size is not a number."""
        size = self.prefill_chunk_size if isinstance(self.prefill_chunk_size, int) else self.prompt_tokens
        starts = range(0, self.prompt_tokens, size)
        return tuple((min(size, self.prompt_tokens - start), start) for start in starts)

    @property
    def step_rows(self) -> int:
        """Rows of a step: of the largest microbatch."""
        return -(-self.batch_size // (self.num_microbatches or 1))

    @property
    def steps_in_flight(self) -> int:
        """Steps that are in flight at the same time: one of each microbatch of each session."""
        return self.num_sessions * (self.num_microbatches or 1)

    def by_microbatch(self) -> Workload:
        """Return the same requests with each microbatch as one of its own."""
        rows, in_flight = self.step_rows, self.steps_in_flight
        return dataclasses.replace(self, batch_size=rows, num_sessions=in_flight, num_microbatches=None)

    @property
    def num_tokens(self) -> int:
        """Tokens of one row when it is complete: prompt and answer."""
        return self.prompt_tokens + self.new_tokens

    @property
    def mean_context(self) -> float:
        """Tokens that a decode step finds in the KV cache, on average over an answer."""
        return self.prompt_tokens + max(0, self.new_tokens - 2) / 2

    @property
    def num_rows(self) -> int:
        """Rows whose KV is held at the same time."""
        return self.batch_size * self.num_sessions

    def check_trusted(self, *, any_trusted: bool) -> None:
        """Raise ArgumentError if `trusted_layers` is not zero although no device is trusted."""
        if any(self.trusted_layers) and not any_trusted:
            raise ArgumentError(
                f"trusted_layers={self.trusted_layers} of the workload has no effect because no device is trusted: "
                "mark trusted devices with Device(trusted=True)"
            )


def check_objective(objective: object) -> None:
    """Check that a value is the name of an objective."""
    if objective not in get_args(Objective):
        raise ArgumentError(f"objective={objective!r} must be one of {', '.join(map(repr, get_args(Objective)))}")


def _pair(value: object) -> tuple[int, int]:
    """Check a pair of counts; TOML and JSON files give lists."""
    if (
        isinstance(value, tuple | list)
        and len(value) == 2
        and all(is_integer(each, at_least=0) and each <= MOST for each in value)
    ):
        return value[0], value[1]
    raise ArgumentError(
        f"trusted_layers={value!r} of a workload must be a pair of layer counts, (first, last), each at least 0"
    )
