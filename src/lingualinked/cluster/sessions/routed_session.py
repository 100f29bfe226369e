"""How a session changes from one route to another, with its KV, between two of its steps.

Knows routes and copies of KV; neither steps nor what else a session has.
"""

from __future__ import annotations

import abc
import concurrent.futures
import time
from collections.abc import Callable
from typing import cast

from lingualinked.cluster.kv.kv_requests import KVRequests
from lingualinked.cluster.messaging.engine import Engine
from lingualinked.cluster.messaging.pending import results_of
from lingualinked.cluster.plans.route import Route, Routes
from lingualinked.cluster.sessions.session_place import SessionPlace
from lingualinked.cluster.sessions.session_use import SessionUse
from lingualinked.cluster.steps.captured import StepInstruments
from lingualinked.errors import LingualinkedError
from lingualinked.protocol.moving import KVCopied, MoveSession
from lingualinked.protocol.steps import EndSession

_MAX_WAIT_S = 0.1


class RoutedSession(abc.ABC):
    """The part of a session that changes its route; `record_move` is told the seconds that it waited, and the bytes of KV."""

    def __init__(
        self,
        engine: Engine,
        model: int,
        number: int,
        routes: Routes,
        record_move: Callable[[float, int], None],
        timeout_s: float,
    ) -> None:
        self._engine = engine
        self._model = model
        self._number = number
        self._routes = routes
        self._place = SessionPlace(routes.target)
        self._moved_from: Route | None = None  # until all workers have been told
        self._record_move = record_move
        self._requests = KVRequests(engine, model, number, timeout_s)
        self._next_step = 0
        self._holds_kv = False
        self._instruments: StepInstruments | None = None  # as the stages know them
        self._broken_by = ""
        self._unsaid: list[LingualinkedError] = []  # what broke it between two steps, until a step raises it
        self._use: SessionUse

    @property
    @abc.abstractmethod
    def ended(self) -> bool:
        """Whether the session has been ended."""

    @abc.abstractmethod
    def end(self) -> None:
        """Free the session's KV in every stage; steps that this thread has in flight are lost."""

    @abc.abstractmethod
    def _end_run(self) -> None:
        """Let a run in progress end soon, for what waits until the session rests."""

    def runs_on(self, route: Route) -> bool:
        """Whether it runs on a route, or has ended."""
        return self.ended or self._place.route is route

    def copy_kv_ahead(self, target: Route) -> list[concurrent.futures.Future[object]]:
        """Copy its KV to the stages of another route while it goes on; return the futures of the answers."""
        return [] if self.ended or not self._holds_kv else self._copy_kv(target, is_final=False)

    def switch_route(self) -> None:
        """Switch to the target route after the step in progress; stay if that fails, or the step lasts.

        Whoever asks asks again: a step in progress may wait for a hook that waits for the migration, until it is late, which
        ends the session.
        """
        self._end_run()
        if self._use.wait_for_rest(_MAX_WAIT_S):
            with self._use.for_change():
                self._switch_route()

    def _switch_route(self) -> None:
        source, target = self._place.route, self._routes.target
        if source is target or self.ended:
            return
        if self._holds_kv:
            # 1) a final copy sends what has changed of its KV
            began_s = time.monotonic()
            try:
                answers = results_of(self._copy_kv(target, is_final=True))
            except LingualinkedError as error:
                if self.ended:  # while its KV was being copied: that is no failure of the migration
                    return
                if not self._routes.reject_target(target, error.with_traceback(None)):
                    self._unsaid.append(error)
                    self._broken_by = f" with {type(error).__name__}, on its way back from a migration that failed"
                    self.end()
                return
            # 2) tell the workers: the next step runs in the new stages
            self._moved_from = source
            self._place.route = target
            self._instruments = None
            self._announce_switch()
            num_bytes = sum(cast("KVCopied", answer).num_bytes for answer in answers)
            self._record_move(time.monotonic() - began_s, num_bytes)
        self._place.route = target
        # 3) it may have been ended meanwhile, in the stages that it has left
        if self.ended:
            for index, device in enumerate(target.stage_devices):
                end = EndSession(model=self._model, plan_version=target.version, stage=index, session=self._number)
                self._engine.send_command(device, end)

    def _announce_switch(self) -> None:
        """Tell workers that the session has switched; the next step does it if an interrupt prevented it."""
        if self._moved_from is not None:
            route = self._place.route
            for device in dict.fromkeys((*self._moved_from.stage_devices, *route.stage_devices)):
                move = MoveSession(model=self._model, session=self._number, plan_version=route.version)
                self._engine.send_command(device, move)
            self._moved_from = None

    def _copy_kv(self, target: Route, *, is_final: bool) -> list[concurrent.futures.Future[object]]:
        return self._requests.copy_kv(self._place.route, target, self._next_step, is_final=is_final)
