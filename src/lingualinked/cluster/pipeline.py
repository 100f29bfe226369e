"""One model placed on a cluster: load its stages, open sessions, unload.

Knows the plan and the messages; neither tokens nor what transformers asks of a model.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import threading
import weakref
from collections.abc import Callable

from lingualinked.cluster.cluster import Cluster
from lingualinked.cluster.engine import Engine
from lingualinked.cluster.inspection import inspect_model
from lingualinked.cluster.migration import Migrator
from lingualinked.cluster.pending import results_of
from lingualinked.cluster.route import Route, Routes, request_stages
from lingualinked.cluster.session import KVBudget, Session
from lingualinked.errors import ClosedError, LingualinkedError
from lingualinked.model.spec import ModelSpec
from lingualinked.planning.plan import Plan, check_memory
from lingualinked.telemetry.decisions import Migration
from lingualinked.telemetry.recorder import Recorder
from lingualinked.telemetry.snapshot import Telemetry

_models = itertools.count(1)
_sessions = itertools.count(1)  # of all models: answers to steps are told by session and step alone


class Pipeline:
    """The stages of one model on the workers of a cluster.

    Parameters
    ----------
    cluster : Cluster
        Whose workers hold it; the pipeline keeps the cluster alive.
    spec : ModelSpec
        What to load.
    plan : Plan
        Where.
    max_kv_tokens : int or None
        Rows x tokens of KV that all sessions together may hold; ``None``: no limit of its own.
    timeout_s : float
        Seconds that any one answer of a worker may take.
    """

    def __init__(
        self, cluster: Cluster, spec: ModelSpec, plan: Plan, *, max_kv_tokens: int | None, timeout_s: float
    ) -> None:
        self.cluster = cluster
        self.timeout_s = timeout_s
        self._engine: Engine = cluster._engine  # noqa: SLF001 - within the room
        self.spec = spec
        self._model = next(_models)
        self._budget = KVBudget(max_kv_tokens)
        self._routes = Routes(Route(1, plan))
        self._versions = itertools.count(2)
        self._recorder = Recorder()
        self._finalizer = weakref.finalize(self, self._engine.unload, self._model)
        self._finalizer.atexit = False

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self._routes.current.plan

    def load(self, on_progress: Callable[[str, int], None]) -> None:
        """Load every stage, all workers at once; the first that fails ends the wait for the others.

        Parameters
        ----------
        on_progress : callable
            Told a device's name and the bytes that it has loaded so far, on the cluster's I/O thread.

        Raises
        ------
        CheckpointError
            If a tensor that a stage needs is missing or damaged.
        InfeasiblePlanError
            If the weights of a stage pass its device's memory limit; nothing has been read then.
        DeviceMemoryError
            If a worker's memory does not suffice.
        WorkerError, WorkerDiedError, StepTimeoutError
            If a worker raised, ended, or did not answer.
        """
        check_memory(self.plan, self.cluster.devices)
        for name in self.plan.devices:
            self._engine.wait_for_worker(name, self.timeout_s)
        route = self._routes.current
        results_of(request_stages(self._engine, self._model, self.spec, route, self.timeout_s, on_progress))

    def open_session(self) -> Session:
        """Open a session; its KV appears in the stages with its first step."""
        number = next(_sessions)
        watch = self._recorder.add_step
        return Session(self._engine, self._model, number, self._routes, self._budget, watch, self.timeout_s)

    def migrate(self, plan: Plan) -> Migration:
        """Move to another plan while sessions go on; their tokens stay the same.

        Parameters
        ----------
        plan : Plan
            Of the same model, on devices of the cluster.

        Returns
        -------
        Migration
            What was moved, and how long it took.

        Raises
        ------
        ClosedError
            If the model has been unloaded, or its cluster closed.
        LingualinkedError
            If it could not be done; the old plan goes on.
        """
        if self.closed:
            raise ClosedError("the model is closed: make a new one with ShardedModel.from_pretrained")
        check_memory(plan, self.cluster.devices)
        for name in plan.devices:
            self._engine.wait_for_worker(name, self.timeout_s)
        migrator = Migrator(self._engine, self._model, self.spec, self._routes, self._recorder, self.timeout_s)
        # Not on the calling thread: an interrupt there must not end a migration half way.
        done: concurrent.futures.Future[LingualinkedError | Migration] = concurrent.futures.Future()
        arguments = (Route(next(self._versions), plan), done)
        threading.Thread(target=migrator.run, args=arguments, name="lingualinked-migration", daemon=True).start()
        outcome = done.result()
        if isinstance(outcome, LingualinkedError):
            raise outcome
        return outcome

    def telemetry(self) -> Telemetry:
        """Ask the workers what they have done for this model, and add what is remembered of its steps.

        Raises
        ------
        ClosedError
            If the model has been unloaded, or its cluster closed.
        """
        if self.closed:
            raise ClosedError("the model is closed: make a new one with ShardedModel.from_pretrained")
        route = self._routes.current
        now = inspect_model(self._engine, self._model, route.version, route.plan.devices, self.timeout_s)
        return dataclasses.replace(now, history=self._recorder.history())

    @property
    def closed(self) -> bool:
        """Whether the model has been unloaded, or its cluster closed."""
        return not self._finalizer.alive or self.cluster.closed

    def unload(self) -> None:
        """Free the model's stages and sessions on every worker; later messages for it are refused there."""
        self._finalizer()
