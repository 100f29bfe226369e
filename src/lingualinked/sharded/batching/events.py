"""What the scheduler of a continuous batch hears, what it asks for, and what it knows of a request.

Plain data; knows neither sessions nor how tokens are chosen.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much may run at once."""

    num_microbatches: int  # microbatches in flight
    max_tokens: int  # new tokens of a microbatch
    chunk_tokens: int  # of them, those of prompts; a shorter prompt is never cut
    max_requests: int  # of a microbatch
    min_shared: int  # tokens that a common beginning must exceed to be copied
    prompts_first: bool = False  # whether prompts take their place in a microbatch before single tokens do
    margin: float = 0.0  # share of the room that has to be free for another request, while others run


class Rooms(Protocol):
    """The KV of requests, each in a slot whose number the scheduler chooses; other users of the model share its room."""

    def fits(self, num_tokens: int) -> bool:
        """Whether there is so much room when nothing else is held."""

    def free_share(self) -> float:
        """Return which share of the room is free: 1 where it has no limit."""

    def reserve(self, slot: int, num_tokens: int) -> bool:
        """Let a slot, which may be new, hold so many tokens in all; whether there is room for them."""

    def free(self, slot: int) -> None:
        """Free a slot and its KV."""

    def keep(self, slot: int, num_tokens: int) -> None:
        """Keep the KV of a slot that is in use no longer until its room is needed."""

    def pin(self, slot: int) -> bool:
        """Keep a slot, which is kept, until `unpin`; whether it is still there."""

    def unpin(self, slot: int) -> None:
        """Allow a slot that is kept to be given up again."""

    def give_up(self) -> bool:
        """Free all slots that are kept; whether there were any."""

    def pop_given_up(self) -> list[int]:
        """Return the slots that were kept and have been freed since the last call."""


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One request: what it asks for, and how far it is."""

    key: str
    ids: list[int]  # of the prompt, then those chosen
    max_new: int | None  # tokens to choose, at most
    priority: int = 0  # higher ones are admitted first
    children: list[Request] = dataclasses.field(default_factory=list)  # which begin with this one's prompt

    arrival: int = 0
    num_overtaken: int = 0  # later requests that were admitted earlier
    num_chosen: int = 0
    slot: int = -1  # of its KV; -1: none
    num_reserved: int = 0  # tokens
    num_sent: int = 0  # tokens that stages hold, or are about to
    num_held: int = 0  # tokens that stages are known to hold
    num_flights: int = 0  # microbatches in flight that it is in
    num_borrowers: int = 0  # requests that its KV is copied to; it rests meanwhile
    rested_since: int = 0
    copies_from: tuple[int, int, Request | None] | None = None  # slot, tokens, and the request whose slot it is
    is_copying: bool = False
    is_over: bool = False  # nothing more is to run
    begins_anew: bool = False  # once nothing of it runs any more: its KV is gone

    @property
    def needed(self) -> int:
        """Tokens whose KV it will hold at the end; without a limit, those of its next step."""
        return len(self.ids) + (0 if self.max_new is None else max(0, self.max_new - self.num_chosen - 1))

    @property
    def left(self) -> int:
        """Tokens that can be sent now: none while its next token is being chosen; before a fork, all but the last."""
        end = len(self.ids) - 1 if self.children else len(self.ids)
        return 0 if self.copies_from or self.num_borrowers else max(0, end - self.num_sent)

    @property
    def decodes(self) -> bool:
        """Whether its prompt has been computed."""
        return self.num_chosen > 0 and self.num_sent >= len(self.ids) - 1


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """The next tokens of one request in a microbatch; the last ones of what is known need a choice."""

    key: str
    slot: int
    ids: tuple[int, ...]
    wants_choice: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """Run a microbatch; `Scheduler.end_step` hears of it."""

    number: int
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Copy:
    """Copy the first tokens of one slot's KV to another slot; `Scheduler.end_copy` hears of it."""

    key: str
    source: int
    target: int
    num_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Admitted:
    """A request has begun."""

    key: str


@dataclasses.dataclass(frozen=True, slots=True)
class Failed:
    """A request can't go on; an error of None: it needs more room than there is."""

    key: str
    error: Exception | None
    num_needed: int = 0  # tokens


Instruction = Run | Copy | Admitted | Failed


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one part of a microbatch."""

    token: int | None = None  # that was chosen
    is_last: bool = False  # whether the request ends with it
    error: Exception | None = None  # then its KV is gone
    lacks_memory: bool = False  # the error: others may have to end first
