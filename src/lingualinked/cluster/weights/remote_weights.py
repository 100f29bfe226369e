"""Reads the parameters and buffers of a model from the workers that hold them under the plan in force.

Knows routes, parts and the message; neither what the tensors are for nor where they are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import cast

import torch
from torch import Tensor

from lingualinked.cluster.messaging.engine import Engine
from lingualinked.cluster.messaging.pending import result_of
from lingualinked.cluster.plans.route import Route, Routes
from lingualinked.errors import UnsupportedOperationError, WorkerDiedError, WorkerError
from lingualinked.interrupts import interruptible
from lingualinked.model.cutting.model_parts import ModelParts
from lingualinked.protocol.reading import ReadTensor

_NUM_AHEAD = 4
"""Parts that are asked for at once: a step of the same worker waits for no more than these."""


class RemoteWeights:
    """The parameters and buffers of one model's stages; may be used by several threads."""

    def __init__(self, engine: Engine, model: int, routes: Routes, timeout_s: float) -> None:
        self._engine = engine
        self._model = model
        self._routes = routes
        self._timeout_s = timeout_s

    @interruptible
    def read(self, parts: ModelParts, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Read a tensor by its name in the whole model (of tied parameters, the source), into new CPU memory.

        Raises UnsupportedOperationError for layers of a model whose first forward pass changes their weights: stages have
        done that when they are loaded, and a checkpoint of such weights would be changed twice.
        """
        if parts.changes_weights and parts.layer_of(name) is not None:
            raise UnsupportedOperationError(
                f"{name} can't be read: the model's first forward pass has changed its layers' weights; read them from the "
                "checkpoint"
            )
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
        flat = tensor.view(-1)
        if not flat.numel():
            return tensor
        # 1) the first part says how large parts are
        size = self._put_part(flat, 0, self._read_part(name, 0, parts), name, parts)
        # 2) some of the others are on their way while one is read; under whichever plan, they have the same bits
        starts = range(size, flat.numel(), size)
        asked = deque(self._request_part(name, first, parts) for first in starts[:_NUM_AHEAD])
        for index, first in enumerate(starts):
            part = self._receive_part(asked.popleft())
            if part is None:  # it was asked for where it is no longer
                part = self._read_part(name, first, parts)
            asked.extend(self._request_part(name, later, parts) for later in starts[index + _NUM_AHEAD :][:1])
            self._put_part(flat, first, part, name, parts)
        return tensor

    def _put_part(self, flat: Tensor, first: int, part: Tensor, name: str, parts: ModelParts) -> int:
        """Check a part and put it in its place; return its size."""
        if part.dtype != flat.dtype or part.ndim != 1 or not 0 < part.numel() <= flat.numel() - first:
            raise WorkerError(
                self._routes.current.stage_devices[_stage_of(name, self._routes.current, parts)],
                f"sent {list(part.shape)} {part.dtype} for {name} from element {first} on, which has {flat.numel()} of {flat.dtype}",
            )
        flat[first : first + part.numel()] = part
        return part.numel()

    def _read_part(self, name: str, first: int, parts: ModelParts) -> Tensor:
        """Ask the worker that holds a tensor; if layers have moved meanwhile, ask again at the new place."""
        while True:
            route = self._routes.current
            stage = _stage_of(name, route, parts)
            try:
                part = self._receive_part(self._request_part(name, first, parts), raises=True)
            except WorkerDiedError:
                if self._routes.current is route:
                    raise
                continue
            if part is not None:
                return part
            if self._routes.current is route:
                raise WorkerError(
                    route.stage_devices[stage],
                    f"does not host stage {stage}, which holds {name} under the plan in force",
                )

    def _request_part(self, name: str, first: int, parts: ModelParts) -> list[Future[object]]:
        """Ask for a part where it is under the plan in force; return the answer's future, in a list (`result_of`)."""
        route = self._routes.current
        stage = _stage_of(name, route, parts)
        message = ReadTensor(
            request=self._engine.next_request(),
            model=self._model,
            plan_version=route.version,
            stage=stage,
            name=name,
            first=first,
        )
        return [self._engine.request(route.stage_devices[stage], message, f"reading {name}", self._timeout_s)]

    def _receive_part(self, asked: list[Future[object]], *, raises: bool = False) -> Tensor | None:
        """Wait for a part; return None if it is not where it was asked for."""
        try:
            tensors = cast("tuple[Tensor, ...]", result_of(asked.pop()))
        except WorkerDiedError:
            if raises:
                raise
            return None
        return tensors[0] if tensors else None


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
