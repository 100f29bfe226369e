"""lingualinked: a causal LM cut into layer ranges that run in worker processes, giving the tokens of the uncut model.

Resolves its public names on first use (PEP 562); importing it loads neither torch nor zmq nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lingualinked.cluster.cluster import Cluster
    from lingualinked.control.policy import RebalancePolicy
    from lingualinked.device import Device, Link
    from lingualinked.errors import (
        ArgumentError,
        CheckpointError,
        ClosedError,
        DeviceMemoryError,
        InfeasiblePlanError,
        KVCapacityError,
        LingualinkedError,
        OverloadWarning,
        PeerUnknownError,
        ProtocolError,
        ResourceError,
        StepTimeoutError,
        UncuttableModelError,
        UnsupportedOperationError,
        WorkerDiedError,
        WorkerError,
    )
    from lingualinked.planning.comparison import Comparison
    from lingualinked.planning.estimate import Figures
    from lingualinked.planning.explanation import Explanation
    from lingualinked.planning.plan import Plan, PlannedStage, Solved
    from lingualinked.planning.planner import baseline, solve
    from lingualinked.planning.prediction import Prediction
    from lingualinked.planning.simulation.result import Simulation
    from lingualinked.planning.simulation.simulate import simulate
    from lingualinked.profile import DeviceProfile, LinkProfile, ModelProfile, ModuleTimes, Profile, StepTime
    from lingualinked.sample import sample_model
    from lingualinked.sharded.model import ShardedModel
    from lingualinked.sharded.profiling import estimate_profile, profile_model
    from lingualinked.telemetry.decisions import Decision, Migration, Move
    from lingualinked.telemetry.endpoint import MetricsEndpoint
    from lingualinked.telemetry.history import Counters, DeviceCounters, History, StepCounters
    from lingualinked.telemetry.reports import StageSnapshot, WorkerSnapshot
    from lingualinked.telemetry.samples import DeviceSample, StageTiming, StepSample
    from lingualinked.telemetry.snapshot import Telemetry
    from lingualinked.workload import Workload

__version__ = "0.1.0"

_HOMES = {
    "ArgumentError": "errors",
    "CheckpointError": "errors",
    "ClosedError": "errors",
    "Cluster": "cluster.cluster",
    "Comparison": "planning.comparison",
    "Counters": "telemetry.history",
    "Decision": "telemetry.decisions",
    "Device": "device",
    "DeviceCounters": "telemetry.history",
    "DeviceMemoryError": "errors",
    "DeviceProfile": "profile",
    "DeviceSample": "telemetry.samples",
    "Explanation": "planning.explanation",
    "Figures": "planning.estimate",
    "History": "telemetry.history",
    "InfeasiblePlanError": "errors",
    "KVCapacityError": "errors",
    "LingualinkedError": "errors",
    "Link": "device",
    "LinkProfile": "profile",
    "MetricsEndpoint": "telemetry.endpoint",
    "Migration": "telemetry.decisions",
    "ModelProfile": "profile",
    "ModuleTimes": "profile",
    "Move": "telemetry.decisions",
    "OverloadWarning": "errors",
    "PeerUnknownError": "errors",
    "Plan": "planning.plan",
    "PlannedStage": "planning.plan",
    "Prediction": "planning.prediction",
    "Profile": "profile",
    "ProtocolError": "errors",
    "RebalancePolicy": "control.policy",
    "ResourceError": "errors",
    "ShardedModel": "sharded.model",
    "Simulation": "planning.simulation.result",
    "Solved": "planning.plan",
    "StageSnapshot": "telemetry.reports",
    "StageTiming": "telemetry.samples",
    "StepCounters": "telemetry.history",
    "StepSample": "telemetry.samples",
    "StepTime": "profile",
    "StepTimeoutError": "errors",
    "Telemetry": "telemetry.snapshot",
    "UncuttableModelError": "errors",
    "UnsupportedOperationError": "errors",
    "WorkerDiedError": "errors",
    "WorkerError": "errors",
    "WorkerSnapshot": "telemetry.reports",
    "Workload": "workload",
    "baseline": "planning.planner",
    "estimate_profile": "sharded.profiling",
    "profile_model": "sharded.profiling",
    "sample_model": "sample",
    "simulate": "planning.simulation.simulate",
    "solve": "planning.planner",
}

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "ClosedError",
    "Cluster",
    "Comparison",
    "Counters",
    "Decision",
    "Device",
    "DeviceCounters",
    "DeviceMemoryError",
    "DeviceProfile",
    "DeviceSample",
    "Explanation",
    "Figures",
    "History",
    "InfeasiblePlanError",
    "KVCapacityError",
    "LingualinkedError",
    "Link",
    "LinkProfile",
    "MetricsEndpoint",
    "Migration",
    "ModelProfile",
    "ModuleTimes",
    "Move",
    "OverloadWarning",
    "PeerUnknownError",
    "Plan",
    "PlannedStage",
    "Prediction",
    "Profile",
    "ProtocolError",
    "RebalancePolicy",
    "ResourceError",
    "ShardedModel",
    "Simulation",
    "Solved",
    "StageSnapshot",
    "StageTiming",
    "StepCounters",
    "StepSample",
    "StepTime",
    "StepTimeoutError",
    "Telemetry",
    "UncuttableModelError",
    "UnsupportedOperationError",
    "WorkerDiedError",
    "WorkerError",
    "WorkerSnapshot",
    "Workload",
    "baseline",
    "estimate_profile",
    "profile_model",
    "sample_model",
    "simulate",
    "solve",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
