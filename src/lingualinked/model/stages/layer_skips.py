"""Which layers of a model are skipped in a step.

Knows layers by their indices; imports no torch.
"""

from __future__ import annotations

from typing import NamedTuple


class LayerSkips(NamedTuple):
    """The layers that are skipped, by their indices in the whole model, in order.

    Those ``removed`` are missing in the list of layers, so that later ones move up; in place of those ``bypassed`` stands
    a module that returns its input.
    """

    removed: tuple[int, ...] = ()
    bypassed: tuple[int, ...] = ()

    @property
    def indices(self) -> tuple[int, ...]:
        """Return all layers that are skipped."""
        return self.removed + self.bypassed

    def num_before(self, index: int) -> int:
        """Return how many layers before this index are not removed."""
        return index - sum(each < index for each in self.removed)


NO_SKIPS = LayerSkips()
