"""What the caller is told of a worker, and of a stage once it is loaded.

Knows stages, this process and spare memory; not how stages are loaded.
"""

from __future__ import annotations

import os

import torch

from lingualinked.model.packed.invariance import probe_invariance
from lingualinked.model.spec import ModelSpec
from lingualinked.model.stages.stage import Stage
from lingualinked.protocol.messages import StageLoaded
from lingualinked.rounding import Rounding
from lingualinked.telemetry.reports import WorkerSnapshot
from lingualinked.worker.process.limits import resident_bytes, spare_bytes

# A worker with less to spare does not try how torch rounds: the kernels that this compiles stay in memory.
_PROBE_BYTES = 256 << 20


def describe_worker(device: str, idle_resident_bytes: int, num_refused: int) -> WorkerSnapshot:
    """Return what a report says of this process, the worker of a device."""
    return WorkerSnapshot(
        device=device,
        pid=os.getpid(),
        threads=torch.get_num_threads(),
        resident_bytes=resident_bytes(),
        idle_resident_bytes=idle_resident_bytes,
        num_refused=num_refused,
    )


def describe_loaded(request: int, stage: Stage, accelerator: str, spec: ModelSpec) -> StageLoaded:
    """Return the answer to a request to load a stage."""
    has_room = spare_bytes(accelerator) >= _PROBE_BYTES
    return StageLoaded(
        request=request,
        weight_bytes=stage.weight_bytes,
        num_bytes_read=stage.num_bytes_read,
        rounding=stage.rounding if has_room else Rounding("", 0),
        invariance=probe_invariance(stage) if spec.batch_invariant else None,
    )
