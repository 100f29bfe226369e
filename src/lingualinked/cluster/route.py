"""Which plan a model's sessions run under, and the one that they are to change to.

Knows plans and their versions; neither messages nor what a session holds.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from typing import TYPE_CHECKING

from lingualinked.device import CALLER
from lingualinked.errors import LingualinkedError
from lingualinked.model.spec import ModelSpec
from lingualinked.planning.plan import Plan
from lingualinked.protocol.messages import Holder, LoadStage
from lingualinked.protocol.moving import AnnounceMove, StagePlace
from lingualinked.telemetry.decisions import Span

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import Callable, Iterator

    from lingualinked.cluster.engine import Engine
    from lingualinked.cluster.session import Session


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Route:
    """A plan whose stages workers host, and the version under which they know it.

    Parameters
    ----------
    version : int
        Its epoch: no two plans of a model have the same.
    plan : Plan
        Which device hosts which layers.
    """

    version: int
    plan: Plan

    @property
    def devices(self) -> tuple[str, ...]:
        """Devices of all stages, in pipeline order."""
        return tuple(stage.device for stage in self.plan.stages)

    @property
    def spans(self) -> tuple[Span, ...]:
        """Device, start and end of each stage."""
        return tuple((stage.device, stage.start, stage.end) for stage in self.plan.stages)


class Routes:
    """The route in force, the one that sessions are to change to, and the sessions; used by many threads.

    Whoever moves them holds ``migrating`` meanwhile.

    Parameters
    ----------
    first : Route
        In force to begin with.
    """

    def __init__(self, first: Route) -> None:
        self.current = first
        self.target = first
        self.error: LingualinkedError | None = None
        self.migrating = threading.Lock()
        self.longest_stall_s = 0.0
        self.num_moved = self.moved_bytes = 0
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._lock = threading.RLock()  # a session may be collected, and leave, in the middle of anything

    def enter(self, session: Session) -> None:
        """Count a session among those that change along."""
        with self._lock:
            self._sessions.add(session)

    def sessions(self) -> list[Session]:
        """Give all sessions that there are."""
        with self._lock:
            return list(self._sessions)

    def prepare(self) -> None:
        """Take note that a migration begins: nothing of the one before counts any more."""
        with self._lock:
            self.error = None
            self.longest_stall_s = 0.0
            self.num_moved = self.moved_bytes = 0

    def begin(self, target: Route) -> None:
        """Have sessions change to another route, each between two of its steps."""
        with self._lock:
            self.target = target

    def reject(self, target: Route, error: LingualinkedError) -> bool:
        """Have sessions change back, since one of them could not change; say whether there is a way back."""
        with self._lock:
            if self.target is target and target is not self.current:
                self.target, self.error = self.current, error
            return target is not self.current

    def note(self, stall_s: float, num_bytes: int) -> None:
        """Take note that a session has changed, how long it waited for that, and how much KV was sent at last."""
        with self._lock:
            self.longest_stall_s = max(self.longest_stall_s, stall_s)
            self.num_moved += 1
            self.moved_bytes += num_bytes

    def settle(self) -> None:
        """Take the route that all sessions have changed to as the one in force."""
        with self._lock:
            self.current = self.target


def request_stages(
    engine: Engine,
    model: int,
    spec: ModelSpec,
    route: Route,
    timeout_s: float,
    *,
    max_kv_tokens: int | None,
    on_progress: Callable[[str, int], None] | None = None,
    held: Route | None = None,
) -> list[concurrent.futures.Future[object]]:
    """Ask workers to load the stages of a route.

    Parameters
    ----------
    engine : Engine
        Sends the requests.
    model : int
        Number of the model.
    spec : ModelSpec
        What to load.
    route : Route
        Where.
    timeout_s : float
        Seconds that a worker may be silent.
    max_kv_tokens : int or None
        Rows x tokens of KV that all sessions together may hold; ``None``: no limit of its own.
    on_progress : callable or None
        Told a device's name and the bytes that it has loaded so far, on the I/O thread.
    held : Route or None
        Whose stages hold the weights already, for workers that can't read them from files.

    Returns
    -------
    list of Future
        Of each stage's `StageLoaded`.
    """
    helpers = () if held is None else held.devices
    ends = (CALLER, *route.devices, CALLER)
    futures = []
    for index, stage in enumerate(route.plan.stages):

        def build(number: int, index: int = index) -> LoadStage:
            planned = route.plan.stages[index]
            return LoadStage(
                request=number,
                model=model,
                plan_version=route.version,
                stage=index,
                spec=spec,
                start=planned.start,
                end=planned.end,
                previous_name=ends[index],
                next_name=ends[index + 2],
                max_kv_tokens=max_kv_tokens,
                holders=() if held is None else tuple(_holders(engine, model, held, planned.device)),
            )

        def progress(num_bytes: int, device: str = stage.device) -> None:
            if on_progress is not None:
                on_progress(device, num_bytes)

        what = f"loading layers [{stage.start}, {stage.end})"
        futures.append(engine.request(stage.device, build, what, timeout_s, progress, helpers))
    return futures


def announce_move(
    engine: Engine, model: int, source: Route, target: Route, timeout_s: float
) -> list[concurrent.futures.Future[object]]:
    """Tell workers that a model may move between two routes, there or back, until they are told which plan to keep.

    Parameters
    ----------
    engine : Engine
        Sends the requests.
    model : int
        Number of the model.
    source, target : Route
        Between which it moves.
    timeout_s : float
        Seconds that a worker may be silent.

    Returns
    -------
    list of Future
        Of each worker's answer; of those that have ended none.
    """
    stages = tuple(
        StagePlace(name=stage.device, plan_version=route.version, start=stage.start, end=stage.end)
        for route in (source, target)
        for stage in route.plan.stages
    )

    def request(device: str) -> concurrent.futures.Future[object]:
        borrowers = tuple(name for name in target.devices if engine.lends(device, name))

        def build(number: int) -> AnnounceMove:
            return AnnounceMove(request=number, model=model, stages=stages, borrowers=borrowers)

        return engine.request(device, build, "the announcement of a move", timeout_s)

    devices = dict.fromkeys((*source.devices, *target.devices))
    return [request(device) for device in devices if device not in engine.ended_devices()]


def _holders(engine: Engine, model: int, route: Route, borrower: str) -> Iterator[Holder]:
    for index, stage in enumerate(route.plan.stages):
        yield Holder(
            name=stage.device,
            model=model,
            plan_version=route.version,
            stage=index,
            start=stage.start,
            end=stage.end,
            lends=engine.lends(stage.device, borrower),
        )
