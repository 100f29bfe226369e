"""One position in the pipeline of a plan.

Knows names and numbers only.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """One position in the pipeline: a span of layers on one device.

    Parameters
    ----------
    device : str
        Name of the device.
    start, end : int
        The half-open layer range ``[start, end)``.
    weight_bytes : int
        Bytes of the weights that the stage holds, embeddings and head included; 0 if not known.
    """

    device: str
    start: int
    end: int
    weight_bytes: int = 0

    @property
    def num_layers(self) -> int:
        """Number of layers of the span."""
        return self.end - self.start
