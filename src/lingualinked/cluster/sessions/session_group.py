"""A session that consists of others, each with some of its rows, and answers for them.

Knows what is equal in all of them; neither how rows are shared out nor steps.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

from lingualinked.cluster.sessions.stepped_session import SteppedSession

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lingualinked.cluster.kv.kv_age import KVAge
    from lingualinked.cluster.sessions.session import Session
    from lingualinked.telemetry.samples import StepSample


class SessionGroup(SteppedSession):
    """Sessions that a handle uses as one `Session`."""

    @property
    @abc.abstractmethod
    def members(self) -> Sequence[Session]:
        """The sessions of its rows, in the rows' order."""

    @property
    def max_cache_len(self) -> int:
        """Tokens per row for which there is room from the first step on; 0: it grows."""
        return self.members[0].max_cache_len

    @property
    def kv_age(self) -> KVAge:
        """Whether its KV was made before the model was changed."""
        return self.members[0].kv_age

    @property
    def last_step(self) -> StepSample | None:
        """Timings of the last step of the last one."""
        return self.members[-1].last_step

    @property
    def ended(self) -> bool:
        """Whether the session has been ended."""
        return any(each.ended for each in self.members)

    def record_past(self, on: bool) -> None:
        """Make sliding layers keep what a later crop may need, or stop keeping it."""
        for each in self.members:
            each.record_past(on)

    def reserve(self, num_tokens: int) -> None:
        """Reserve room for so many tokens per row in all, and for no more, where the KV grows."""
        for each in self.members:
            each.reserve(num_tokens)

    def end(self) -> None:
        """Free the session's KV in every stage."""
        for each in self.members:
            each.end()
