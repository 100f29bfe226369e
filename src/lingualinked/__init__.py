"""lingualinked: a causal LM cut into layer ranges that run in worker processes, giving the tokens of the uncut model.

Resolves its public names on first use (PEP 562); importing it loads neither torch nor zmq nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lingualinked.cluster.cluster import Cluster
    from lingualinked.device import Device
    from lingualinked.errors import (
        ArgumentError,
        CheckpointError,
        ClosedError,
        DeviceMemoryError,
        InfeasiblePlanError,
        KVCapacityError,
        LingualinkedError,
        PeerUnknownError,
        ProtocolError,
        StepTimeoutError,
        UncuttableModelError,
        UnsupportedOperationError,
        WorkerDiedError,
        WorkerError,
    )
    from lingualinked.planning.plan import Plan, PlannedStage
    from lingualinked.sample import sample_model
    from lingualinked.sharded.model import ShardedModel
    from lingualinked.telemetry.snapshot import StageSnapshot, Telemetry, WorkerSnapshot

__version__ = "0.1.0"

_HOMES = {
    "ArgumentError": "errors",
    "CheckpointError": "errors",
    "ClosedError": "errors",
    "Cluster": "cluster.cluster",
    "Device": "device",
    "DeviceMemoryError": "errors",
    "InfeasiblePlanError": "errors",
    "KVCapacityError": "errors",
    "LingualinkedError": "errors",
    "PeerUnknownError": "errors",
    "Plan": "planning.plan",
    "PlannedStage": "planning.plan",
    "ProtocolError": "errors",
    "ShardedModel": "sharded.model",
    "StageSnapshot": "telemetry.snapshot",
    "StepTimeoutError": "errors",
    "Telemetry": "telemetry.snapshot",
    "UncuttableModelError": "errors",
    "UnsupportedOperationError": "errors",
    "WorkerDiedError": "errors",
    "WorkerError": "errors",
    "WorkerSnapshot": "telemetry.snapshot",
    "sample_model": "sample",
}

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "ClosedError",
    "Cluster",
    "Device",
    "DeviceMemoryError",
    "InfeasiblePlanError",
    "KVCapacityError",
    "LingualinkedError",
    "PeerUnknownError",
    "Plan",
    "PlannedStage",
    "ProtocolError",
    "ShardedModel",
    "StageSnapshot",
    "StepTimeoutError",
    "Telemetry",
    "UncuttableModelError",
    "UnsupportedOperationError",
    "WorkerDiedError",
    "WorkerError",
    "WorkerSnapshot",
    "sample_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
