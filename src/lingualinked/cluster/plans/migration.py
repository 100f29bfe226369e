"""Moves a model from one plan to another while its sessions go on.

Knows routes, sessions and messages; neither why layers are moved nor what tokens are.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
import time
import weakref
from typing import cast

from lingualinked.cluster.measuring.invariance_check import check_invariance
from lingualinked.cluster.messaging.engine import Engine
from lingualinked.cluster.messaging.pending import results_of
from lingualinked.cluster.plans.route import Route, Routes
from lingualinked.cluster.sessions.session import Session
from lingualinked.cluster.weights.remote_adapters import RemoteAdapters
from lingualinked.cluster.weights.stage_loading import request_stages
from lingualinked.cluster.weights.tensor_edits import TensorEdits
from lingualinked.model.spec import ModelSpec
from lingualinked.planning.plan import Plan
from lingualinked.protocol.messages import StageLoaded
from lingualinked.protocol.moving import AnnounceMove, KeepPlan, StagePlace
from lingualinked.telemetry.decisions import Migration
from lingualinked.telemetry.recorder import Recorder


class Migrator:
    """Moves one model, one migration after the other.

    The workers load what they lack for the new plan beside their steps, sharing what they hold, and KV is copied ahead.
    Then every session switches between two of its steps, by itself: what has changed of its KV is sent, and its next step
    runs in the stages of the new plan. Stages of the old one are freed when no session is left there. Until then
    whatever fails leads back: sessions that have switched switch again, and the new stages are freed.
    """

    def __init__(
        self,
        engine: Engine,
        model: int,
        spec: ModelSpec,
        routes: Routes,
        recorder: Recorder,
        edits: TensorEdits,
        adapters: RemoteAdapters,
        timeout_s: float,
        max_kv_tokens: int | None,
    ) -> None:
        self._engine = engine
        self._model = model
        self._spec = spec
        self._routes = routes
        self._recorder = recorder
        self._edits = edits
        self._adapters = adapters
        self._timeout_s = timeout_s
        self._max_kv_tokens = max_kv_tokens
        self._versions = itertools.count(routes.current.version + 1)
        self._migrating = threading.Lock()
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._longest_stall_s = 0.0
        self._num_moved = self._moved_bytes = 0
        self._lock = threading.RLock()  # a session may be collected, and leave, in the middle of anything

    def add_session(self, session: Session) -> None:
        """Register a session, which will switch routes in every migration."""
        with self._lock:
            self._sessions.add(session)

    def is_stepped_by(self, thread: int) -> bool:
        """Return whether a thread, by its number, runs a step of some session."""
        return any(session.stepping_thread == thread for session in self._living_sessions())

    def num_in_use(self) -> int:
        """Return of how many sessions steps are in flight."""
        return sum(session._use.is_in_use for session in self._living_sessions())  # noqa: SLF001 - within the room

    def record_move(self, stall_s: float, num_bytes: int) -> None:
        """Count a session that has switched: the seconds it waited, and the bytes of its final copy of KV."""
        with self._lock:
            self._longest_stall_s = max(self._longest_stall_s, stall_s)
            self._num_moved += 1
            self._moved_bytes += num_bytes

    def run(self, plan: Plan, migrations: list[Migration]) -> None:
        """Move to a plan; if that raises, the old one is in force.

        What was moved is appended to the list of migrations, also where it failed.
        """
        with self._migrating:
            source, target = self._routes.current, Route(next(self._versions), plan)
            with self._lock:
                self._longest_stall_s = 0.0
                self._num_moved = self._moved_bytes = 0
            progress, error = _Progress(), ""
            try:
                self._move(source, target, progress)
            except BaseException as failure:
                error = str(failure) or type(failure).__name__
                raise
            finally:
                # 5) free the stages of the other route, whichever that is
                self._edits.end_move()
                self._adapters.end_move()
                for device in dict.fromkeys((*source.stage_devices, *target.stage_devices)):
                    self._engine.send_command(
                        device, KeepPlan(model=self._model, plan_version=self._routes.current.version)
                    )
                migration = Migration(
                    time_s=progress.began_s,
                    plan_version=target.version,
                    spans_before=source.plan.spans,
                    spans_after=target.plan.spans,
                    weight_bytes=progress.weight_bytes,
                    kv_bytes=progress.kv_bytes + self._moved_bytes,
                    load_s=progress.lap_s(0),
                    copy_s=progress.lap_s(1),
                    switch_s=progress.lap_s(2),
                    longest_stall_s=self._longest_stall_s,
                    num_sessions=self._num_moved,
                    error=error,
                )
                self._recorder.add_migration(migration)
                migrations.append(migration)

    def _move(self, source: Route, target: Route, progress: _Progress) -> None:
        # 1) tell every worker what may move
        for device in target.stage_devices:
            self._engine.wait_for_worker(device, self._timeout_s)
        results_of(self._announce(source, target))
        # 2) load what the new plan lacks, and edit it as the present stages are edited
        with self._edits.loading(target):
            loaded = results_of(
                request_stages(
                    self._engine,
                    self._model,
                    self._spec,
                    target,
                    self._timeout_s,
                    max_kv_tokens=self._max_kv_tokens,
                    held=source,
                )
            )
        answers = [cast("StageLoaded", each) for each in loaded]
        progress.weight_bytes = sum(answer.num_bytes_read for answer in answers)
        if self._spec.batch_invariant:
            check_invariance(self._routes, target, answers, self._engine.environments())
        target = target.with_rounding((answer.rounding for answer in answers), self._engine.environments())
        self._adapters.copy_to(target)
        progress.end_lap()
        # 3) copy KV ahead, while sessions go on
        progress.kv_bytes = self._copy_ahead(target)
        progress.end_lap()
        # 4) switch every session between two of its steps; one that can't leads all of them back
        self._routes.begin_switch(target)
        self._switch_sessions()
        progress.end_lap()
        if self._routes.error is not None:
            raise self._routes.pop_error()
        self._routes.adopt_target()

    def _announce(self, source: Route, target: Route) -> list[concurrent.futures.Future[object]]:
        """Announce to the workers what may move between two routes, until they are told which plan to keep."""
        stages = tuple(
            StagePlace(name=stage.device, plan_version=route.version, start=stage.start, end=stage.end)
            for route in (source, target)
            for stage in route.plan.stages
        )

        def request(device: str) -> concurrent.futures.Future[object]:
            borrowers = tuple(name for name in target.stage_devices if self._engine.may_lend(device, name))
            number = self._engine.next_request()
            message = AnnounceMove(request=number, model=self._model, stages=stages, borrowers=borrowers)
            return self._engine.request(device, message, "the announcement of a move", self._timeout_s)

        devices = dict.fromkeys((*source.stage_devices, *target.stage_devices))
        return [request(device) for device in devices if device not in self._engine.ended_devices()]

    def _living_sessions(self) -> list[Session]:
        with self._lock:
            return list(self._sessions)

    def _copy_ahead(self, target: Route) -> int:
        """Copy the KV of all sessions while they go on; return its bytes."""
        futures = [future for session in self._living_sessions() for future in session.copy_kv_ahead(target)]
        return sum(answer.num_bytes for answer in results_of(futures))  # type: ignore[attr-defined]

    def _switch_sessions(self) -> None:
        """Wait until every session is on the target route, or back; those that run switch by themselves."""
        while waiting := [each for each in self._living_sessions() if not each.runs_on(self._routes.target)]:
            for session in waiting:
                session.switch_route()


class _Progress:
    """What a migration has taken so far: bytes, and the seconds of its laps, 0 of those that were not run."""

    def __init__(self) -> None:
        self.weight_bytes = self.kv_bytes = 0
        self.began_s = time.monotonic()
        self._ends_s = [self.began_s]

    def end_lap(self) -> None:
        """Record that one thing is done, and the next begins."""
        self._ends_s.append(time.monotonic())

    def lap_s(self, index: int) -> float:
        """Return the seconds of a lap."""
        return self._ends_s[index + 1] - self._ends_s[index] if index + 1 < len(self._ends_s) else 0.0
