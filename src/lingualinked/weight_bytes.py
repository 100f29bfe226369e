"""Bytes of a model's weights, by where they are needed.

Knows numbers only.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WeightBytes:
    """Bytes of a model's weights, by where they are needed."""

    layers: tuple[int, ...]
    prologue: int  # that only the first stage needs
    epilogue: int  # that only the last stage needs; a tied embedding counts in both
    tied: int = 0  # counted in both, which a stage with both ends holds once
    everywhere: int = 0  # that every stage holds

    def of_span(self, start: int, end: int) -> int:
        """Return the bytes of the stage that holds layers ``[start, end)``."""
        ends = self.of_ends(has_first=start == 0, has_last=end == len(self.layers))
        return sum(self.layers[start:end]) + ends + self.everywhere

    def of_ends(self, *, has_first: bool, has_last: bool) -> int:
        """Return the bytes of prologue and epilogue in a stage; tied weights count once."""
        return self.prologue * has_first + self.epilogue * has_last - self.tied * (has_first and has_last)
