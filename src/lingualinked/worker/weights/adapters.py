"""Puts adapters into this worker's stages, and removes them, as the caller asks.

Knows stages and messages; not what adapters compute.
"""

from __future__ import annotations

from torch import Tensor

from lingualinked.protocol.adapting import AddAdapter, RemoveAdapter
from lingualinked.worker.stages.hosted_stages import HostedStages, StageKey


def change_adapters(stages: HostedStages, message: AddAdapter | RemoveAdapter, tensors: tuple[Tensor, ...]) -> None:
    """Change the adapters of a stage; raise ProtocolError if it is not hosted here, ArgumentError if they don't fit it."""
    adapters = stages.get_stage(StageKey(message.model, message.plan_version, message.stage)).stage.adapters
    if isinstance(message, AddAdapter):
        adapters.add(message.adapter, tensors)
    else:
        adapters.remove(message.name)
