"""Reads the parameters and buffers of a model from the workers that hold them under the plan in force.

Knows routes, parts and the message; neither what the tensors are for nor where they are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from lingualinked.cluster.engine import Engine
from lingualinked.cluster.pending import result_of
from lingualinked.cluster.route import Route, Routes
from lingualinked.errors import WorkerDiedError, WorkerError
from lingualinked.interrupts import interruptible
from lingualinked.model.parts import ModelParts
from lingualinked.protocol.reading import ReadTensor


class RemoteWeights:
    """The parameters and buffers of one model's stages; may be used by several threads."""

    def __init__(self, engine: Engine, model: int, routes: Routes, timeout_s: float) -> None:
        self._engine = engine
        self._model = model
        self._routes = routes
        self._timeout_s = timeout_s

    @interruptible
    def read(self, parts: ModelParts, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Read a tensor by its name in the whole model (of tied parameters, the source), into new CPU memory."""
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
        flat, first = tensor.view(-1), 0
        while first < flat.numel():
            # A part read under one plan and the next one under another have the same bits.
            part = self._read_part(name, first, parts)
            if part.dtype != dtype or part.ndim != 1 or not 0 < part.numel() <= flat.numel() - first:
                raise WorkerError(
                    self._routes.current.stage_devices[_stage_of(name, self._routes.current, parts)],
                    f"sent {list(part.shape)} {part.dtype} for {name} from element {first} on, which has {flat.numel()} of {dtype}",
                )
            flat[first : first + part.numel()] = part
            first += part.numel()
        return tensor

    def _read_part(self, name: str, first: int, parts: ModelParts) -> Tensor:
        """Ask the worker that holds a tensor; if layers have moved meanwhile, ask again at the new place."""
        while True:
            route = self._routes.current
            stage = _stage_of(name, route, parts)
            device = route.stage_devices[stage]
            message = ReadTensor(
                request=self._engine.next_request(),
                model=self._model,
                plan_version=route.version,
                stage=stage,
                name=name,
                first=first,
            )
            try:
                answer = result_of(self._engine.request(device, message, f"reading {name}", self._timeout_s))
            except WorkerDiedError:
                if self._routes.current is route:
                    raise
                continue
            tensors = cast("tuple[Tensor, ...]", answer)
            if tensors:
                return tensors[0]
            if self._routes.current is route:
                raise WorkerError(device, f"does not host stage {stage}, which holds {name} under the plan in force")


def _stage_of(name: str, route: Route, parts: ModelParts) -> int:
    return stages_of(name, route, parts)[0]


def stages_of(name: str, route: Route, parts: ModelParts) -> Sequence[int]:
    """Return which stages hold a tensor under its name: all of them hold one that is neither in layers nor in modules with weights."""
    num_stages, layer = len(route.plan.stages), parts.layer_of(name)
    if layer is not None:
        return [index for index, stage in enumerate(route.plan.stages) if stage.start <= layer < stage.end]
    for paths, stage in ((parts.epilogue, num_stages - 1), (parts.prologue, 0)):
        if any(name.startswith(f"{path}.") for path in paths):
            return [stage]
    return range(num_stages)
