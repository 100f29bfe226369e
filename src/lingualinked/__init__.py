"""lingualinked: a causal LM cut into layer ranges that run in worker processes, giving the tokens of the uncut model.

Resolves its public names on first use (PEP 562); importing it loads neither torch nor zmq nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lingualinked import registry as _registry

if TYPE_CHECKING:
    from lingualinked.cluster.cluster import Cluster as Cluster
    from lingualinked.control.policy import RebalancePolicy as RebalancePolicy
    from lingualinked.device import Device as Device, Link as Link
    from lingualinked.device_specs import DeviceSpecs as DeviceSpecs
    from lingualinked.environment import Environment as Environment
    from lingualinked.errors import (
        ArgumentError as ArgumentError,
        CheckpointError as CheckpointError,
        ClosedError as ClosedError,
        DaemonError as DaemonError,
        DeviceMemoryError as DeviceMemoryError,
        InfeasiblePlanError as InfeasiblePlanError,
        KVCapacityError as KVCapacityError,
        LingualinkedError as LingualinkedError,
        OverloadWarning as OverloadWarning,
        PeerUnknownError as PeerUnknownError,
        ProtocolError as ProtocolError,
        ResourceError as ResourceError,
        StaleKVWarning as StaleKVWarning,
        StepTimeoutError as StepTimeoutError,
        UncuttableModelError as UncuttableModelError,
        UnreachableError as UnreachableError,
        UnsupportedOperationError as UnsupportedOperationError,
        WorkerDiedError as WorkerDiedError,
        WorkerError as WorkerError,
    )
    from lingualinked.interventions import (
        Ablate as Ablate,
        Add as Add,
        Clamp as Clamp,
        Project as Project,
        Replace as Replace,
        Scale as Scale,
    )
    from lingualinked.link_profile import LinkProfile as LinkProfile
    from lingualinked.module_times import ModuleTimes as ModuleTimes, StepTime as StepTime
    from lingualinked.planning.comparison import Comparison as Comparison
    from lingualinked.planning.explanation import Explanation as Explanation
    from lingualinked.planning.plan import Plan as Plan
    from lingualinked.planning.planned_stage import PlannedStage as PlannedStage
    from lingualinked.planning.planner import baseline as baseline, solve as solve
    from lingualinked.planning.prediction import Prediction as Prediction
    from lingualinked.planning.prefill_prediction import PrefillPrediction as PrefillPrediction
    from lingualinked.planning.simulation.result import Simulation as Simulation
    from lingualinked.planning.simulation.simulate import simulate as simulate
    from lingualinked.planning.solved import Solved as Solved
    from lingualinked.profile import (
        DeviceProfile as DeviceProfile,
        ModelProfile as ModelProfile,
        Profile as Profile,
    )
    from lingualinked.sample import sample_model as sample_model
    from lingualinked.sharded.hooks.narrow_hooks import hook as hook
    from lingualinked.sharded.model import ShardedModel as ShardedModel
    from lingualinked.sharded.profiles.model_profiles import (
        estimate_profile as estimate_profile,
        profile_model as profile_model,
    )
    from lingualinked.sharded.weights.weight_edits import WeightEdit as WeightEdit, edit as edit
    from lingualinked.telemetry.decisions import Decision as Decision, Migration as Migration, Move as Move
    from lingualinked.telemetry.endpoint import MetricsEndpoint as MetricsEndpoint
    from lingualinked.telemetry.history import (
        Counters as Counters,
        DeviceCounters as DeviceCounters,
        History as History,
        StepCounters as StepCounters,
    )
    from lingualinked.telemetry.reports import StageSnapshot as StageSnapshot, WorkerSnapshot as WorkerSnapshot
    from lingualinked.telemetry.samples import (
        DeviceSample as DeviceSample,
        StageTiming as StageTiming,
        StepSample as StepSample,
    )
    from lingualinked.telemetry.snapshot import Telemetry as Telemetry
    from lingualinked.workload import Workload as Workload

__version__ = "0.1.0"

_NAMES = {
    "cluster.cluster": "Cluster",
    "control.policy": "RebalancePolicy",
    "device": "Device Link",
    "device_specs": "DeviceSpecs",
    "environment": "Environment",
    "errors": "ArgumentError CheckpointError ClosedError DaemonError DeviceMemoryError InfeasiblePlanError KVCapacityError "
    "LingualinkedError OverloadWarning PeerUnknownError ProtocolError ResourceError StaleKVWarning StepTimeoutError UncuttableModelError "
    "UnreachableError UnsupportedOperationError WorkerDiedError WorkerError",
    "interventions": "Ablate Add Clamp Project Replace Scale",
    "module_times": "ModuleTimes StepTime",
    "planning.comparison": "Comparison",
    "planning.explanation": "Explanation",
    "planning.plan": "Plan",
    "planning.planned_stage": "PlannedStage",
    "planning.planner": "baseline solve",
    "planning.prediction": "Prediction",
    "planning.prefill_prediction": "PrefillPrediction",
    "planning.simulation.result": "Simulation",
    "planning.simulation.simulate": "simulate",
    "planning.solved": "Solved",
    "link_profile": "LinkProfile",
    "profile": "DeviceProfile ModelProfile Profile",
    "sample": "sample_model",
    "sharded.model": "ShardedModel",
    "sharded.profiles.model_profiles": "estimate_profile profile_model",
    "sharded.hooks.narrow_hooks": "hook",
    "sharded.weights.weight_edits": "WeightEdit edit",
    "telemetry.decisions": "Decision Migration Move",
    "telemetry.endpoint": "MetricsEndpoint",
    "telemetry.history": "Counters DeviceCounters History StepCounters",
    "telemetry.reports": "StageSnapshot WorkerSnapshot",
    "telemetry.samples": "DeviceSample StageTiming StepSample",
    "telemetry.snapshot": "Telemetry",
    "workload": "Workload",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOMES)  # noqa: PLE0605 - a list of names, each also imported above as itself for type checkers

for _shown in (_registry.tables_of, _registry.figure_of, _registry.frame_of):
    _shown.load_with(lambda: importlib.import_module("lingualinked.display.registered"))
_registry.explanation_of.load_with(lambda: importlib.import_module("lingualinked.planning.explaining"))


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
