"""What is planned for: how long prompts and answers are, and how many run at once.

Knows numbers only.
"""

from __future__ import annotations

import dataclasses

from lingualinked.errors import ArgumentError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a pipeline is to do, over and over.

    Parameters
    ----------
    prompt_tokens : int
        Tokens of a prompt.
    new_tokens : int
        Tokens that are generated after it.
    batch_size : int
        Rows of a session: prompts that one ``generate`` call runs together.
    num_sessions : int
        Sessions in flight at the same time.

    Raises
    ------
    ArgumentError
        If a number is no positive integer; the message names the field.
    """

    prompt_tokens: int = 128
    new_tokens: int = 128
    batch_size: int = 1
    num_sessions: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ArgumentError(f"{field.name}={value!r} of a workload must be a positive integer")

    @property
    def num_tokens(self) -> int:
        """Tokens of one row at its end: prompt and answer."""
        return self.prompt_tokens + self.new_tokens

    @property
    def mean_context(self) -> float:
        """Tokens that a decode step finds in the KV cache, on average over an answer."""
        return self.prompt_tokens + max(0, self.new_tokens - 2) / 2

    @property
    def num_rows(self) -> int:
        """Rows whose KV is held at the same time."""
        return self.batch_size * self.num_sessions
