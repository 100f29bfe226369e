"""What the caller is told of a stage once it is loaded.

Knows stages and spare memory; not how they are loaded.
"""

from __future__ import annotations

from lingualinked.model.stage import Stage
from lingualinked.protocol.messages import StageLoaded
from lingualinked.rounding import Rounding
from lingualinked.worker.limits import spare_bytes

# A worker with less to spare does not try how torch rounds: the kernels that this compiles stay in memory.
_PROBE_BYTES = 256 << 20


def describe_loaded(request: int, stage: Stage, accelerator: str) -> StageLoaded:
    """Return the answer to a request to load a stage."""
    has_room = spare_bytes(accelerator) >= _PROBE_BYTES
    return StageLoaded(
        request=request,
        weight_bytes=stage.weight_bytes,
        num_bytes_read=stage.num_bytes_read,
        rounding=stage.rounding if has_room else Rounding("", 0),
    )
