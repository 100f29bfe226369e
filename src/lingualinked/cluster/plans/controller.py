"""Steers one pipeline: tells its balancer what happens, and executes what that decides.

Knows events, instructions and migrations; neither what a plan is worth nor what tokens are.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from lingualinked.cluster.messaging.engine import Engine
from lingualinked.cluster.messaging.pending import result_of, settle
from lingualinked.cluster.plans.route import Routes
from lingualinked.cluster.workers.inspection import attribute_report, request_report
from lingualinked.control.events import (
    DeviceLost,
    Event,
    Instruction,
    Migrate,
    MigrationDone,
    MigrationFailed,
)
from lingualinked.errors import ClosedError, LingualinkedError
from lingualinked.planning.plan import Plan
from lingualinked.processes.resources import start_thread
from lingualinked.telemetry.decisions import Decision, Migration
from lingualinked.telemetry.recorder import Recorder
from lingualinked.telemetry.samples import StepSample

if TYPE_CHECKING:
    from lingualinked.control.balancer import Balancer
    from lingualinked.protocol.messages import WorkerReport

logger = logging.getLogger("lingualinked.cluster")

_WAKE_EVERY = 4  # steps: the fewer, the sooner a change is seen, and the more it costs
_MOST_STEPS = 512  # that are looked back to where nobody looked before
_LONGEST_LOOK_S = 5.0  # that a worker may take to say how it is
_STOP_S = 5.0


class Controller:
    """One pipeline's controller, which holds neither pipeline nor model, so that its thread keeps none of them alive.

    ``migrate`` moves to a plan and appends what was moved to a list; it raises if the old plan goes on.
    """

    def __init__(
        self,
        engine: Engine,
        routes: Routes,
        migrate: Callable[[Plan, list[Migration]], None],
        recorder: Recorder,
    ) -> None:
        self._engine = engine
        self._routes = routes
        self._migrate = migrate
        self._recorder = recorder
        self.balancer: Balancer | None = None  # what decides; None until something had to be decided
        self._deciding = threading.Lock()  # held from an event until what it led to is done
        self._num_told = 0  # steps that the balancer has been told of
        self._lost: set[str] = set()
        self._thread: threading.Thread | None = None
        self._interval_s = 0.0
        self._wakes: queue.SimpleQueue[None] = (
            queue.SimpleQueue()
        )  # may be put to in the middle of a put, by a finalizer
        self._asked: dict[str, tuple[float, concurrent.futures.Future[object]]] = {}  # when, and what is to come
        self._is_stopped = False
        self._num_steps = 0

    def set_balancer(self, balancer: Balancer) -> None:
        """Let a balancer decide from now on, unless one with a profile does so already."""
        with self._deciding:
            if self.balancer is None or self.balancer.profile is None:
                self.balancer = balancer
                count, _ = self._recorder.steps_since(0)
                self._num_told = max(0, count - _MOST_STEPS)

    def start(self, interval_s: float) -> None:
        """Decide in a thread from now on, which looks at the devices every ``interval_s`` while steps run."""
        self._interval_s = interval_s
        thread = threading.Thread(target=self._run, name="lingualinked-control", daemon=True)
        start_thread(thread)
        self._thread = thread  # only now: what did not start can't be joined

    def stop(self) -> None:
        """Let the thread end once what it does is done; does not wait for it."""
        self._is_stopped = True
        self._wakes.put(None)

    def join(self) -> None:
        """Wait until the thread has ended."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_STOP_S)

    def record_step(self, sample: StepSample) -> None:
        """Record a step; called by every session."""
        self._recorder.add_step(sample)
        self._num_steps += 1  # may miss one of another thread: it says only when to look
        if self._thread is not None and self._num_steps % _WAKE_EVERY == 0:
            self._wakes.put(None)

    def handle_wish(self, make_event: Callable[[float], Event]) -> Decision:
        """Tell the balancer what the user wants, and execute what it decides; return what was decided and done.

        ``make_event`` gets the time in seconds, which is read when no migration runs.
        """
        # On a thread of its own: an interrupt of the caller's must not end a migration half way.
        return result_of(_in_thread(lambda: self._decide(make_event)))

    def _decide(self, make_event: Callable[[float], Event]) -> Decision:
        assert self.balancer is not None
        with self._deciding:
            self._catch_up()
            instruction = self.balancer.handle(make_event(time.monotonic()), self._routes.current.plan)
            assert instruction is not None
            return self._execute(instruction)

    def _run(self) -> None:
        try:
            look_s = time.monotonic()
            while not self._is_stopped:
                self._wakes.get()
                while not self._wakes.empty():
                    self._wakes.get()
                if self._is_stopped:
                    return
                if time.monotonic() >= look_s:
                    self._request_reports()
                    look_s = time.monotonic() + self._interval_s
                with self._deciding:
                    self._read_reports()
                    self._catch_up()
        except ClosedError as error:
            logger.debug("nothing is rebalanced any more: %s", error)
        except Exception:
            logger.exception("nothing is rebalanced any more")

    def _catch_up(self) -> None:
        """Tell the balancer of steps and lost devices since the last time, and execute what it decides."""
        assert self.balancer is not None
        for device in self._engine.ended_devices() - self._lost:
            self._lost.add(device)
            if self.balancer.profile is not None and device in self.balancer.profile.names:
                self._tell_balancer(DeviceLost(time_s=time.monotonic(), device=device))
        self._num_told, samples = self._recorder.steps_since(self._num_told)
        for sample in samples:
            self._tell_balancer(sample)

    def _request_reports(self) -> None:
        """Ask the devices how they are; one that is busy may answer later."""
        assert self.balancer is not None
        assert self.balancer.profile is not None, "without a profile nothing is decided automatically"
        names = set(self.balancer.profile.names) - self._engine.ended_devices() - self._asked.keys()
        for name in sorted(names):
            report = request_report(self._engine, name, _LONGEST_LOOK_S)
            self._asked[name] = time.monotonic(), report
            report.add_done_callback(lambda _: self._wakes.put(None))

    def _read_reports(self) -> None:
        """Tell the balancer what devices have answered."""
        for name, (time_s, report) in list(self._asked.items()):
            if not report.done():
                continue
            del self._asked[name]
            if report.exception() is None:  # else it has just ended, or was too busy
                device = attribute_report(cast("WorkerReport", report.result()), name, time_s).device
                self._recorder.add_device(device)
                self._tell_balancer(device)

    def _tell_balancer(self, event: Event) -> None:
        """Tell the balancer of an event, and execute what it decides; a failure is logged."""
        assert self.balancer is not None
        instruction = self.balancer.handle(event, self._routes.current.plan)
        if instruction is None:
            return
        try:
            self._execute(instruction)
        except ClosedError:
            raise
        except LingualinkedError as error:
            logger.warning("layers could not be moved, and the plan goes on as it is: %s", error)

    def _execute(self, instruction: Instruction) -> Decision:
        """Execute an instruction; return the decision with what was done. If that fails, the balancer is told."""
        decision = instruction.decision
        self._recorder.add_decision(decision)
        log = logger.info if decision.action == "move" else logger.debug
        log("%s", decision)
        if not isinstance(instruction, Migrate):
            return decision
        assert self.balancer is not None
        migrations: list[Migration] = []
        try:
            for plan in instruction.plans:
                self._migrate(plan, migrations)
        finally:
            last, now = migrations[-1], time.monotonic()
            event: Event = MigrationDone(time_s=now, migration=last) if last.succeeded else MigrationFailed(time_s=now)
            self.balancer.handle(event, self._routes.current.plan)
            done = dataclasses.replace(decision, migrations=tuple(migrations))
            self._recorder.complete_decision(decision, done)
        return done


def _in_thread(work: Callable[[], Decision]) -> concurrent.futures.Future[Decision]:
    outcome: concurrent.futures.Future[Decision] = concurrent.futures.Future()
    start_thread(threading.Thread(target=settle, args=(outcome, work), name="lingualinked-migration", daemon=True))
    return outcome
