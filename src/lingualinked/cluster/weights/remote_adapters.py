"""The adapters of one model as its stages have them, under the plan in force and the one that it moves to.

Knows routes, parts and messages; neither files nor peft.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
from collections.abc import Iterator, Mapping

import msgspec
from torch import Tensor

from lingualinked.cluster.messaging.engine import Engine
from lingualinked.cluster.messaging.pending import results_of
from lingualinked.cluster.plans.route import Route, Routes
from lingualinked.model.adapters.adapter_data import AdaptedModule, Adapter
from lingualinked.model.cutting.model_parts import ModelParts
from lingualinked.protocol.adapting import AddAdapter, RemoveAdapter

_MESSAGE_TENSORS = 512
_MESSAGE_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class _Held:
    """An adapter that the stages have, and its tensors by the path of their module."""

    adapter: Adapter
    tensors: Mapping[str, tuple[Tensor, ...]]
    parts: ModelParts


class RemoteAdapters:
    """The adapters of one model's stages; may be used by several threads."""

    def __init__(self, engine: Engine, model: int, routes: Routes, timeout_s: float) -> None:
        self._engine = engine
        self._model = model
        self._routes = routes
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._target: Route | None = None  # of a migration, once its stages have the adapters

    @property
    def numbers(self) -> dict[str, int]:
        """Return which content the stages have, by the names of adapters."""
        return {name: held.adapter.number for name, held in self._held.items()}

    def put(self, parts: ModelParts, adapter: Adapter, tensors: Mapping[str, tuple[Tensor, ...]]) -> None:
        """Put an adapter into all stages, in place of one of this name; return once they have it."""
        held = _Held(adapter, tensors, parts)
        with self._lock:
            results_of([future for route in self._served() for future in self._send(held, route)])
            self._held[adapter.name] = held

    def remove(self, name: str) -> None:
        """Remove an adapter from all stages."""
        with self._lock:
            results_of(
                [
                    self._engine.request(
                        device,
                        RemoveAdapter(
                            request=self._engine.next_request(),
                            model=self._model,
                            plan_version=route.version,
                            stage=index,
                            name=name,
                        ),
                        f"removing adapter {name!r}",
                        self._timeout_s,
                    )
                    for route in self._served()
                    for index, device in enumerate(route.stage_devices)
                ]
            )
            self._held.pop(name, None)

    def copy_to(self, target: Route) -> None:
        """Put all adapters into the stages of another route too, from now until `end_move`."""
        with self._lock:
            results_of([future for held in self._held.values() for future in self._send(held, target)])
            self._target = target

    def end_move(self) -> None:
        """Serve the stages of the route in force alone."""
        with self._lock:
            self._target = None

    def _served(self) -> list[Route]:
        return [route for route in (self._routes.current, self._target) if route is not None]

    def _send(self, held: _Held, route: Route) -> Iterator[concurrent.futures.Future[object]]:
        """Send each stage what it holds of an adapter, in several messages if need be."""
        name = held.adapter.name
        for index, stage in enumerate(route.plan.stages):
            own = [each for each in held.adapter.modules if held.parts.holds(each.path, stage.start, stage.end)]
            for modules in _split(own, held.tensors):
                message = AddAdapter(
                    request=self._engine.next_request(),
                    model=self._model,
                    plan_version=route.version,
                    stage=index,
                    adapter=msgspec.structs.replace(held.adapter, modules=tuple(modules)),
                )
                tensors = tuple(tensor for each in modules for tensor in held.tensors[each.path])
                yield self._engine.request(
                    stage.device, message, f"loading adapter {name!r}", self._timeout_s, tensors=tensors
                )


def _split(modules: list[AdaptedModule], tensors: Mapping[str, tuple[Tensor, ...]]) -> Iterator[list[AdaptedModule]]:
    """Split modules into parts that one message holds."""
    part: list[AdaptedModule] = []
    num_tensors = num_bytes = 0
    for module in modules:
        size = sum(tensor.nbytes for tensor in tensors[module.path])
        if part and (num_tensors + len(module.tensors) > _MESSAGE_TENSORS or num_bytes + size > _MESSAGE_BYTES):
            yield part
            part, num_tensors, num_bytes = [], 0, 0
        part.append(module)
        num_tensors, num_bytes = num_tensors + len(module.tensors), num_bytes + size
    if part:
        yield part
