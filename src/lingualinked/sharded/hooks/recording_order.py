"""Which hooks run before transformers records what a module returns, and which behind.

Knows paths and numbers of hooks; neither modules nor what is recorded.
"""

from __future__ import annotations

from collections.abc import Iterable

from lingualinked.errors import UnsupportedOperationError


class RecordingOrder:
    """The order of a model's hooks: transformers registers its own, which record, in the first call that asks for outputs."""

    def __init__(self, recorded: frozenset[str]) -> None:
        self.has_recorded = False
        self._recorded = recorded
        self._ahead: set[int] = set()

    def add(self, number: int, *, is_first: bool) -> None:
        """Note the place of a hook that is registered now, before all others or behind them."""
        if is_first or not self.has_recorded:
            self._ahead.add(number)

    def are_behind(self, path: str, numbers: Iterable[int]) -> bool:
        """Return whether hooks of a module run once it is recorded what the module returns.

        Raise UnsupportedOperationError if some do, and others before.
        """
        if not self.has_recorded or path not in self._recorded:
            return False
        behind = {number not in self._ahead for number in numbers}
        if len(behind) > 1:
            raise UnsupportedOperationError(
                f"hooks of {path} of a sharded model were registered before the first call that returned hidden states, "
                "attentions or router logits, and others after it, so that these would be recorded between them: register "
                "all before it, or all after it"
            )
        return True in behind
