"""The changes of one model that are in force: edits of its tensors, which workers are sent, and skipped layers, which steps name.

Knows routes, parts and the message; neither who edits nor why.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from lingualinked.cluster.messaging.engine import Engine
from lingualinked.cluster.messaging.pending import results_of
from lingualinked.cluster.plans.route import Route, Routes
from lingualinked.cluster.steps.step_gate import StepGate
from lingualinked.cluster.weights.remote_weights import stages_of
from lingualinked.model.cutting.model_parts import ModelParts
from lingualinked.model.stages.layer_skips import LayerSkips
from lingualinked.protocol.editing import ChangeKind, EditTensor, TensorChange


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Change:
    """One change of a tensor, with its tensors (`TensorChange`)."""

    number: int
    kind: ChangeKind
    tensors: tuple[Tensor, ...]
    first: int = 0
    is_statement: bool = False  # made by a statement that changed the tensor in place, or by several

    @property
    def message(self) -> TensorChange:
        """The change as stages are told of it."""
        return TensorChange(number=self.number, kind=self.kind, first=self.first)


Changes = tuple[Change, ...]


class TensorEdits:
    """The changes of one model's tensors that are in force; may be used by several threads."""

    def __init__(self, engine: Engine, model: int, routes: Routes, timeout_s: float) -> None:
        self.revision = 0  # how often the model has been changed
        self.gate = StepGate()
        self.skips = LayerSkips()
        self._engine = engine
        self._model = model
        self._routes = routes
        self._timeout_s = timeout_s
        self._numbers = itertools.count()
        self._lock = threading.RLock()  # held during a change, and while stages are loaded that need the changes
        self._target: Route | None = None  # to which layers move, once its stages are loaded
        self._in_force: dict[str, Changes] = {}
        self._parts: ModelParts | None = None
        self._aliases: Mapping[str, tuple[str, ...]] = {}

    def new_number(self) -> int:
        """Return a number for a change; each is given once."""
        return next(self._numbers)

    def in_force(self, name: str) -> Changes:
        """Return the changes of a tensor that are in force, in order."""
        return self._in_force.get(name, ())

    def list_changes(self) -> list[tuple[str, Change]]:
        """Return all changes in force, with the names of their tensors."""
        return [(name, change) for name, changes in self._in_force.items() for change in changes]

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """Change tensors in this context, in which no step runs and no stage is loaded."""
        while True:
            with self._lock:  # while stages are loaded, steps go on
                pass
            with self.gate.change(self._timeout_s):
                if self._lock.acquire(blocking=False):
                    try:
                        yield
                        return
                    finally:
                        self._lock.release()

    def replace(
        self, parts: ModelParts, changes: Mapping[str, Changes], aliases: Mapping[str, tuple[str, ...]]
    ) -> None:
        """Put changes in force in place of those of the same tensors; if that fails, those before are in force.

        ``aliases`` are all names of a tied parameter, by the one that it is changed by. Call it `between_steps`.
        """
        self._parts, self._aliases = parts, {**self._aliases, **aliases}
        before = {name: self.in_force(name) for name in changes}
        try:
            results_of(self._send(changes, before, self._devices))
        except BaseException:
            # Messages to a worker arrive in order: nobody has to wait for these.
            with contextlib.suppress(Exception):
                self._send(before, {}, self._devices)
            raise
        self._in_force = {name: each for name, each in {**self._in_force, **changes}.items() if each}
        self.revision += 1

    def skip(self, skips: LayerSkips) -> None:
        """Skip these layers, and no others, in all later steps. Call it `between_steps`."""
        self.skips = skips
        self.revision += 1

    @contextlib.contextmanager
    def loading(self, target: Route) -> Iterator[None]:
        """Load the stages of a route in this context; at its end, they get the changes in force and all later ones."""
        with self._lock:
            yield
            held = {name: self._devices(name) for name in self._in_force}
            self._target = target
            results_of(self._send(self._in_force, {}, lambda name: self._devices(name) - held[name]))

    def end_move(self) -> None:
        """Change only the stages of the route in force from now on."""
        with self._lock:
            self._target = None

    def _send(
        self,
        changes: Mapping[str, Changes],
        before: Mapping[str, Changes],
        devices_of: Callable[[str], set[str]],
    ) -> list[concurrent.futures.Future[object]]:
        futures = []
        for name, due in changes.items():
            new = [change for change in due if change not in before.get(name, ())]
            for device in sorted(devices_of(name)):
                message = EditTensor(
                    request=self._engine.next_request(),
                    model=self._model,
                    name=name,
                    numbers=tuple(change.number for change in due),
                    new=tuple(change.message for change in new),
                )
                tensors = tuple(tensor for change in new for tensor in change.tensors)
                futures.append(
                    self._engine.request(device, message, f"editing {name}", self._timeout_s, tensors=tensors)
                )
        return futures

    def _devices(self, name: str) -> set[str]:
        """Return the devices that hold a tensor, under the plan in force and under the one that layers move to."""
        assert self._parts is not None
        routes = [self._routes.current, *([] if self._target is None else [self._target])]
        names = self._aliases.get(name, (name,))
        return {
            route.stage_devices[stage]
            for route in routes
            for each in names
            for stage in stages_of(each, route, self._parts)
        }
