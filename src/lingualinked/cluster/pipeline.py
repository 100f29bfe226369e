"""One model placed on a cluster: load its stages, open sessions, unload.

Knows the plan and the messages; neither tokens nor what transformers asks of a model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from lingualinked.cluster.cluster import Cluster
from lingualinked.cluster.kv.kv_budget import KVBudget
from lingualinked.cluster.measuring.invariance_check import check_invariance
from lingualinked.cluster.messaging.engine import Engine
from lingualinked.cluster.messaging.io_thread import end_with_interpreter
from lingualinked.cluster.messaging.pending import results_of
from lingualinked.cluster.packed.packed_steps import PackedSteps
from lingualinked.cluster.plans.controller import Controller
from lingualinked.cluster.plans.migration import Migrator
from lingualinked.cluster.plans.route import Route, Routes
from lingualinked.cluster.sessions.any_session import AnySession
from lingualinked.cluster.sessions.row_sessions import RowSessions
from lingualinked.cluster.sessions.session import Session
from lingualinked.cluster.sessions.split_session import SplitSession
from lingualinked.cluster.weights.remote_adapters import RemoteAdapters
from lingualinked.cluster.weights.remote_weights import RemoteWeights
from lingualinked.cluster.weights.stage_loading import request_stages
from lingualinked.cluster.weights.tensor_edits import TensorEdits
from lingualinked.cluster.workers.observer import Observer
from lingualinked.control.events import DeviceJoined, DeviceReleased, RebalanceAsked
from lingualinked.control.policy import RebalancePolicy
from lingualinked.errors import ClosedError, LingualinkedError, UnsupportedOperationError
from lingualinked.interrupts import uninterrupted
from lingualinked.model.cutting.parts import build_meta, parts_of
from lingualinked.model.cutting.tasks import GENERATION, task_of_class
from lingualinked.model.packed.qualifying import why_not_packed
from lingualinked.model.spec import ModelSpec
from lingualinked.model.stages.rotary import RopeHistory
from lingualinked.planning.passage.holdings import Holdings
from lingualinked.planning.plan import Plan
from lingualinked.planning.plan_checks import check_memory
from lingualinked.profile import Profile
from lingualinked.telemetry.decisions import Decision
from lingualinked.telemetry.recorder import Recorder
from lingualinked.telemetry.snapshot import Telemetry
from lingualinked.workload import Objective, Workload

if TYPE_CHECKING:
    from lingualinked.control.correction import Correction
    from lingualinked.model.cutting.model_parts import ModelParts
    from lingualinked.protocol.messages import StageLoaded
    from lingualinked.telemetry.samples import StepSample

_LAST_REPORT_S = 1.0
_LATEST_STEPS = 512
_models = itertools.count(1)
_sessions = itertools.count(1)  # of all models: answers to steps are told by session and step alone


class Pipeline:
    """The stages of one model on the workers of a cluster, which it keeps alive.

    All sessions together may hold ``max_kv_tokens`` rows x tokens of KV; ``None``: no limit of its own.
    """

    def __init__(
        self,
        cluster: Cluster,
        spec: ModelSpec,
        plan: Plan,
        *,
        objective: Objective = "throughput",
        max_kv_tokens: int | None,
        timeout_s: float,
    ) -> None:
        self.cluster = cluster
        self.timeout_s = timeout_s
        self._engine: Engine = cluster._engine  # noqa: SLF001 - within the room
        self.spec = spec
        self._objective = objective  # of moves
        self._model = next(_models)
        self.kv_budget = KVBudget(max_kv_tokens)
        self._ropes = RopeHistory(spec)
        self._max_kv_tokens = max_kv_tokens
        self._vocabulary = _vocabulary(spec)
        self._routes = Routes(Route(1, plan))
        self._recorder = Recorder()
        cluster._recorders.add(self._recorder)  # noqa: SLF001 - within the room
        self._correction: Correction | None = None
        self._admitting = threading.Lock()  # from measuring a device until it is in the profile
        self.edits = TensorEdits(self._engine, self._model, self._routes, timeout_s)
        self.adapters = RemoteAdapters(self._engine, self._model, self._routes, timeout_s)
        self._migrator = Migrator(
            self._engine,
            self._model,
            spec,
            self._routes,
            self._recorder,
            self.edits,
            self.adapters,
            timeout_s,
            max_kv_tokens,
        )
        self.weights = RemoteWeights(self._engine, self._model, self._routes, timeout_s)
        self._controller = Controller(self._engine, self._routes, self._migrator.run, self._recorder)
        self._observer = Observer(
            self._engine,
            self._model,
            self._routes,
            self._recorder,
            cluster._endpoints,  # noqa: SLF001 - within the room
        )
        self.packed_steps = PackedSteps(
            self._engine,
            self._model,
            self._routes,
            self.edits,
            self._controller.record_step,
            timeout_s,
            self._vocabulary,
            functools.partial(_why_not_packed, spec),
            is_invariant=spec.batch_invariant,
        )
        self._finalizer = weakref.finalize(self, _free, self._engine, self._model, self._controller, self._observer)
        self._finalizer.atexit = False

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self._routes.current.plan

    @property
    def independent_rows(self) -> int:
        """Rows from which on a batch's rows do not depend on each other (`ShardedModel.independent_rows`)."""
        has_shared = self.adapters.numbers or self._ropes.reach.depends_on_length
        return 0 if has_shared else self._routes.current.independent_rows

    @property
    def num_sessions_in_use(self) -> int:
        """Sessions of which steps are in flight."""
        return self._migrator.num_in_use()

    @property
    def corrected_plan(self) -> Plan:
        """The plan in force; where it was made from a doubtful profile, with what its steps have shown since."""
        plan = self.plan
        if plan.profile is None or not plan.profile.doubt:
            return plan
        from lingualinked.control.correction import Correction  # imports NumPy

        correction = self._correction
        if correction is None or correction.measured is not plan.profile:
            correction = self._correction = Correction(plan.profile)
        return dataclasses.replace(plan, profile=correction.observe(*self._recorder.steps_since(correction.num_steps)))

    def load(self, on_progress: Callable[[str, int], None]) -> None:
        """Load every stage, all workers at once; the first that fails ends the wait for the others.

        ``on_progress`` is told a device's name and the bytes that it has loaded so far, on the cluster's I/O thread.
        """
        check_memory(self.plan, self.cluster.devices)
        if self.spec.batch_invariant:
            self.packed_steps.check_supported()
        for name in self.plan.devices:
            self._engine.wait_for_worker(name, self.timeout_s)
        route = self._routes.current
        answers = results_of(
            request_stages(
                self._engine,
                self._model,
                self.spec,
                route,
                self.timeout_s,
                max_kv_tokens=self._max_kv_tokens,
                on_progress=on_progress,
            )
        )
        loaded = [cast("StageLoaded", each) for each in answers]
        if self.spec.batch_invariant:
            check_invariance(self._routes, route, loaded, self._engine.environments())
        self._routes.begin(route.with_rounding((each.rounding for each in loaded), self._engine.environments()))

    def open_session(self, max_cache_len: int = 0, microbatch: int | None = None) -> Session:
        """Open a session; its KV appears in the stages with its first step.

        Its KV cache holds ``max_cache_len`` tokens per row from the start; 0: it grows. Telemetry says which ``microbatch`` it is.
        """
        session = Session(
            self._engine,
            self._model,
            next(_sessions),
            self._routes,
            self.kv_budget,
            self._ropes,
            self.edits,
            functools.partial(_record_step, self._controller, microbatch),
            self._migrator.record_move,
            self.timeout_s,
            self._vocabulary,
            self.spec,
            max_cache_len,
        )
        self._migrator.add_session(session)
        return session

    def open_batch(self, sizes: Sequence[int] = (), max_cache_len: int = 0) -> AnySession:
        """Open a session of one batch, whose microbatches have so many rows each; without sizes, there is one."""
        if self.spec.batch_invariant:
            if max_cache_len:
                raise UnsupportedOperationError(
                    "a static KV cache with batch_invariant=True: attention reads its whole length, which depends on the batch; use a "
                    "dynamic one (leave cache_implementation out)"
                )
            return RowSessions(self.packed_steps, self.open_session, self.kv_budget, max(1, len(sizes)))
        return self.open_split_session(sizes, max_cache_len) if len(sizes) > 1 else self.open_session(max_cache_len)

    def open_split_session(self, sizes: Sequence[int], max_cache_len: int = 0) -> SplitSession:
        """Open a session of microbatches of so many rows each, which follow each other through the stages."""
        opener = weakref.WeakMethod(self.open_session)  # so that a session does not keep the model loaded

        def open_microbatch(microbatch: int | None) -> Session:
            open_session = opener()
            if open_session is None:
                raise ClosedError("the model of this session is closed: load it again with from_pretrained")
            return open_session(max_cache_len, microbatch)

        return SplitSession(sizes, self.independent_rows, open_microbatch, self.kv_budget)

    def open_session_like(self, session: AnySession) -> AnySession:
        """Open a session with as much room, split as another is."""
        if isinstance(session, RowSessions):
            return self.open_batch((0,) * session.num_microbatches)
        if isinstance(session, SplitSession):
            return self.open_split_session(session.sizes, session.max_cache_len)
        return self.open_session(session.max_cache_len)

    @property
    def profile(self) -> Profile | None:
        """The profile that decisions use; ``None`` if nothing has been measured."""
        balancer = self._controller.balancer
        return self.plan.profile if balancer is None or balancer.profile is None else balancer.profile

    def latest_steps(self) -> list[StepSample]:
        """Return the latest steps of all sessions, oldest first."""
        return self._recorder.latest_steps(_LATEST_STEPS)

    @property
    def is_rebalancing_enabled(self) -> bool:
        """Whether it has a profile by which it can find better plans (`enable_rebalancing`)."""
        balancer = self._controller.balancer
        return balancer is not None and balancer.profile is not None

    def enable_rebalancing(
        self, profile: Profile, workload: Workload, policy: RebalancePolicy, *, is_automatic: bool
    ) -> None:
        """Find better plans by a profile from now on, in a thread if automatic; does nothing if that is enabled already.

        The workload is used if the plan in force has none.
        """
        from lingualinked.control.balancer import Balancer  # imports scipy

        workload = self.plan.workload or workload
        balancer = Balancer(profile, policy, self._objective, workload, is_automatic=is_automatic)
        self._controller.set_balancer(balancer)
        if is_automatic:
            self._controller.start(policy.sample_interval_s)

    def rebalance(self, plan: Plan | None, parts: ModelParts, *, dry_run: bool = False) -> Decision:
        """Move to another plan while sessions go on; if that raises, the old plan goes on.

        Without a plan, it moves to the best one, if it is worth it, which needs a profile (`enable_rebalancing`).
        """
        self._check_between_steps()
        if plan is not None:
            check_memory(plan, self.cluster.devices)
        holdings = None
        if plan is not None and not self.is_rebalancing_enabled:
            from lingualinked.control.balancer import Balancer  # stands on the solver, which a start may do without

            self._controller.set_balancer(Balancer(None, RebalancePolicy(), self._objective, is_automatic=False))
            holdings = Holdings.of_devices(parts.weights, self.cluster.devices, parts.transmission)
        return self._controller.handle_wish(
            lambda now: RebalanceAsked(time_s=now, plan=plan, dry_run=dry_run, holdings=holdings)
        )

    def release(self, device: str) -> Decision:
        """Move all layers off a device, and place none there again."""
        self._check_between_steps()
        return self._controller.handle_wish(lambda now: DeviceReleased(time_s=now, device=device))

    def admit(self, device: str, measure: Callable[[], Profile]) -> Decision:
        """Use a device of the cluster from now on, if that pays; ``measure`` returns a profile that has it too."""
        self._check_between_steps()
        self._engine.wait_for_worker(device, self.timeout_s)
        with self._admitting:
            profile = measure()
            return self._controller.handle_wish(lambda now: DeviceJoined(time_s=now, device=device, profile=profile))

    def _check_between_steps(self) -> None:
        """Check that it is open, and that this thread is not in a hook of one of its steps, for which layers would wait."""
        self.check_open()
        if self._migrator.is_stepped_by(threading.get_ident()):
            raise UnsupportedOperationError(
                "layers can't move inside a hook, whose step would have to end first: call this after the model has returned"
            )

    @property
    def ended_devices(self) -> frozenset[str]:
        """Devices of the cluster whose workers have ended."""
        return self._engine.ended_devices()

    def check_open(self) -> None:
        """Raise ClosedError if the model has been unloaded or its cluster closed, or what `Engine.check_owner` raises."""
        self._engine.check_owner()
        if self.closed:
            end_with_interpreter()
            raise ClosedError("the model is closed: make a new one with ShardedModel.from_pretrained")

    def telemetry(self) -> Telemetry:
        """Ask the workers what they have done for this model, and add what is remembered of its steps.

        Once the model has been unloaded, or its cluster closed, that is what was known last.
        """
        self._engine.check_owner()
        if not self.closed:
            self._observer.inspect(self.timeout_s)
        return self._observer.telemetry()

    @property
    def closed(self) -> bool:
        """Whether the model has been unloaded, or its cluster closed."""
        return not self._finalizer.alive or self.cluster.closed

    def unload(self) -> None:
        """Free the model's stages and sessions on every worker; later messages for it are refused there."""
        try:
            if not self.closed:
                with contextlib.suppress(LingualinkedError):  # for its telemetry, which stays readable
                    self._observer.inspect(min(self.timeout_s, _LAST_REPORT_S))
        finally:
            self._finalizer()
        self._controller.join()


def _record_step(controller: Controller, microbatch: int | None, sample: StepSample) -> None:
    controller.record_step(sample if microbatch is None else dataclasses.replace(sample, microbatch=microbatch))


def _vocabulary(spec: ModelSpec) -> int | None:
    """Return how many logits each token has; None if that is not known, or the model does not generate."""
    if task_of_class(spec.class_name) != GENERATION:
        return None
    config = json.loads(spec.config_json)
    if spec.stack == "encoder":  # whose output are hidden states
        return int(config["d_model"])
    size = config.get("decoder_vocab_size") or {**config, **config.get("text_config", {})}.get("vocab_size")
    return size if isinstance(size, int) else None


def _why_not_packed(spec: ModelSpec) -> str:
    meta = build_meta(spec)
    return why_not_packed(meta, parts_of(spec, meta))


@uninterrupted
def _free(engine: Engine, model: int, controller: Controller, observer: Observer) -> None:
    observer.stop()
    controller.stop()
    engine.unload_model(model)
