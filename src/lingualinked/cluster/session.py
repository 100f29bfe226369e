"""A session: one conversation whose KV lies in every stage.

Knows steps and edits of KV; neither generation modes nor what made the tokens.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import threading
import time
import weakref
from collections.abc import Callable
from typing import cast

from torch import Tensor

from lingualinked.cluster.captured import StepInstruments
from lingualinked.cluster.engine import Engine, end_with_interpreter
from lingualinked.cluster.kv_age import KVAge
from lingualinked.cluster.kv_budget import KVBudget
from lingualinked.cluster.kv_requests import KVRequests
from lingualinked.cluster.pending import results_of
from lingualinked.cluster.recorded import Recorded
from lingualinked.cluster.remote_graph import RemoteGraph
from lingualinked.cluster.route import Route, Routes
from lingualinked.cluster.session_place import SessionPlace, end_session
from lingualinked.cluster.session_use import SessionUse
from lingualinked.cluster.step_in_flight import MOST_TOKENS_AHEAD, StepInFlight, StepOptions
from lingualinked.cluster.tensor_edits import TensorEdits
from lingualinked.errors import ArgumentError, ClosedError, LingualinkedError
from lingualinked.model.context import StepContext
from lingualinked.model.instrument_data import Instruments
from lingualinked.model.rotary import RopeReach
from lingualinked.model.spec import ModelSpec
from lingualinked.model.tensor_strides import pack_tensor
from lingualinked.model.torch_settings import read_torch_settings
from lingualinked.protocol.moving import KVCopied, MoveSession
from lingualinked.protocol.steps import EndSession, KVEdit, KVEditKind, Step
from lingualinked.telemetry.samples import StepSample
from lingualinked.transport.hop_clock import clock_us

_MAX_WAIT_S = 0.1
_PLAIN = StepOptions()


class Session:
    """One conversation through all stages; used by one thread at a time.

    Its KV cache holds ``max_cache_len`` tokens per row from the first step on; 0: it grows. ``watch`` is told a `StepSample` of every step, and ``record_move``, at every change to another route, how many
    seconds the session waited, and the bytes of KV sent at last.
    """

    def __init__(
        self,
        engine: Engine,
        model: int,
        number: int,
        routes: Routes,
        budget: KVBudget,
        reach: RopeReach,
        edits: TensorEdits,
        watch: Callable[[StepSample], None],
        record_move: Callable[[float, int], None],
        timeout_s: float,
        vocabulary: int | None,
        spec: ModelSpec,
        max_cache_len: int = 0,
    ) -> None:
        self.max_cache_len = max_cache_len
        self.num_rows = 0
        self.num_tokens = 0
        self.kv_has_gradients = False  # whether tokens of its KV were computed in steps with gradients
        self.last_step: StepSample | None = None
        self.stepping_thread: int | None = None  # which runs the hooks of a step now
        self._engine = engine
        self._model = model
        self._number = number
        self._routes = routes
        self._place = SessionPlace(routes.target)
        self._moved_from: Route | None = None  # until all workers have been told
        self._budget = budget
        self._reach = reach
        self._changes = edits
        self.kv_age = KVAge(edits)
        self._watch = watch
        self._record_move = record_move
        self._timeout_s = timeout_s
        self._vocabulary = vocabulary
        self._spec = spec
        self._context = StepContext()
        self._edits: list[KVEdit] = []
        self._instruments: StepInstruments | None = None  # as the stages know them
        self._next_step = 0
        self._holds_kv = False
        self._requests = KVRequests(engine, model, number, timeout_s)
        self._flights: collections.deque[StepInFlight] = collections.deque()
        self._flying_thread = 0  # which has started them
        self._use = SessionUse(edits.gate)
        self._used = contextlib.ExitStack()  # its use by the steps in flight
        self._broken_by = ""
        self._unsaid: list[LingualinkedError] = []  # what broke it between two steps, until a step raises it
        self._finalizer = weakref.finalize(self, end_session, engine, model, number, self._place, budget)
        self._finalizer.atexit = False

    @property
    def ended(self) -> bool:
        """Whether the session has been ended."""
        return not self._finalizer.alive

    def step(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        logits_to_keep: int | Tensor,
        options: StepOptions = _PLAIN,
    ) -> tuple[Tensor, Recorded]:
        """Run one step through all stages; return its logits, ``[rows, kept tokens, vocabulary]``, and what was recorded.

        Inputs are token ids, int64 ``[rows, tokens]``, or embeddings, ``[rows, tokens, hidden]``; the mask is int64
        ``[rows, past + tokens]``, and positions are int64 ``[1 or rows, tokens]``. ``logits_to_keep`` is as in
        transformers: 0 for all positions, N for the last N, or indices.

        If the KV budget would be exceeded, the session goes on as it was; after every other error of a step it has
        ended. What broke it between two steps is raised by the next one itself, once. A step that wants no logits is not waited for:
        the next one raises what it would.
        """
        flight = self.start_step(inputs, attention_mask, position_ids, logits_to_keep, options)
        return flight.finish() if options.wants_logits else flight.no_logits

    def start_step(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        logits_to_keep: int | Tensor,
        options: StepOptions = _PLAIN,
    ) -> StepInFlight:
        """Send a step, as `step` does, to be finished later by the same thread.

        Several may be in flight, which the stages run in order, and which are finished in order; one with hooks only alone.
        Until all are finished, the session does not change to another route. If one fails, those behind it fail with it.
        Those that want no logits need not be finished: later ones do that.
        """
        if (
            self._flying_thread == threading.get_ident()
        ):  # make room, or let all end if it is to change to another route
            self.finish_silent_steps(MOST_TOKENS_AHEAD if self._place.route is self._routes.target else 0)
        is_first = not (self._flights and self._flying_thread == threading.get_ident())
        if not is_first and (self._flights[-1].options.hooks or options.hooks):
            raise ArgumentError("past_key_values is in use by a step with hooks: finish it before the next one starts")
        with contextlib.ExitStack() as undo:
            if is_first:
                undo.enter_context(self._use.for_steps())
                self._switch_route()
                self._flying_thread = threading.get_ident()
            flight = self._send_step(inputs, attention_mask, position_ids, logits_to_keep, options)
            self._flights.append(flight)
            if is_first:
                self._used = undo.pop_all()
        return flight

    def reorder(self, rows: Tensor) -> None:
        """Keep the KV rows ``rows`` (int64 ``[new rows]``); reaches the stages with the next step."""
        values = tuple(int(row) for row in rows.tolist())
        self._edits.append(KVEdit(kind=KVEditKind.REORDER, values=values))
        self._context.reorder(rows.cpu().long())
        self.num_rows = len(values)

    def crop(self, num_tokens: int) -> None:
        """Forget the last ``num_tokens`` tokens; 0 still drops what sliding layers kept for a crop."""
        self._edits.append(KVEdit(kind=KVEditKind.CROP, values=(num_tokens,)))
        self._context.crop(num_tokens)
        self.num_tokens -= num_tokens

    def copy_to(self, other: Session) -> None:
        """Make a session that has just been opened go on from here by itself, with a copy of the KV in every stage.

        If that fails, the other session has ended.
        """
        try:
            with self._use.alone(), self._use.for_change(), other._use.for_change():
                self._switch_route()
                self._check_open()
                self._announce_switch()
                other._place.route = self._place.route
                if self._holds_kv:
                    self._budget.hold_as_much(other._number, self._number)  # stages copy what edits are still to drop
                    results_of(self._requests.fork(self._place.route, self._next_step, other._number))
                    other._instruments = self._instruments
                other.num_rows, other.num_tokens = self.num_rows, self.num_tokens
                other.kv_has_gradients = self.kv_has_gradients
                other._context = StepContext(self._context.mask, self._context.num_tokens)
                other.kv_age.copy_from(self.kv_age)
                other._edits, other._next_step, other._holds_kv = [*self._edits], self._next_step, self._holds_kv
        except BaseException:
            other.end()
            raise

    def record_past(self, on: bool) -> None:
        """Make sliding layers keep what a later crop may need, or stop keeping it."""
        self._edits.append(KVEdit(kind=KVEditKind.RECORD, values=(int(on),)))

    def reserve(self, num_tokens: int) -> None:
        """Reserve room for so many tokens per row in all, and for no more, where the KV grows."""
        if not self.max_cache_len:
            self._edits.append(KVEdit(kind=KVEditKind.RESERVE, values=(num_tokens,)))

    def reserve_budget(self, num_tokens: int) -> bool:
        """Keep room in the KV budget for so many row-tokens, until it ends; return whether there is so much."""
        return self._budget.reserve(self._number, num_tokens)

    def end(self) -> None:
        """Free the session's KV in every stage; steps that this thread has in flight are lost."""
        self._finalizer()
        if self._flying_thread == threading.get_ident():
            self._flights.clear()
            self._used.close()

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

    def _check_open(self) -> None:
        if self.ended:
            if self._unsaid:
                raise self._unsaid.pop()
            raise ClosedError(f"this session has ended{self._broken_by}: start anew with past_key_values=None")

    def _send_step(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        logits_to_keep: int | Tensor,
        options: StepOptions,
    ) -> StepInFlight:
        self._check_open()
        self.kv_age.begin_step(holds_kv=self._holds_kv or bool(self._flights))
        self._announce_switch()
        # 1) count its KV, and encode what travels beside the inputs
        instruments, gradients = options.instruments, options.gradients
        num_rows, num_new = inputs.shape[:2]
        due = {} if instruments is None else instruments.due_captures(num_rows, num_new, self.num_tokens)
        if options.keeps_kv:
            num_tokens = self.num_tokens + num_new + options.num_tokens_ahead
            self._budget.hold(self._number, num_rows * (self.max_cache_len or num_tokens))
        code = self._context.encode(attention_mask, position_ids, num_new)
        keep = (logits_to_keep,) if isinstance(logits_to_keep, Tensor) else ()
        have_changed = instruments is not self._instruments
        sent = () if instruments is None or not have_changed else instruments.tensors
        num_positions = self.num_tokens + num_new if position_ids is None else int(position_ids.max()) + 1
        route = self._place.route
        packed, strides = pack_tensor(inputs)
        step = Step(
            model=self._model,
            plan_version=route.version,
            stage=0,
            session=self._number,
            number=self._next_step,
            keeps_kv=options.keeps_kv,
            layout=None,
            mask=code.mask,
            positions=code.positions,
            position_rows=code.position_rows,
            logits_to_keep=None if isinstance(logits_to_keep, Tensor) else logits_to_keep,
            edits=tuple(self._edits),
            rope_reach=self._reach.advance(num_positions),
            sent_us=clock_us(),
            timings=(),
            torch_settings=tuple(read_torch_settings().items()),
            records=options.records,
            hidden_state_indices=options.hidden_state_indices,
            max_cache_len=self.max_cache_len,
            hooks=() if options.hooks is None else options.hooks.points(),
            instruments=(instruments.given if instruments else Instruments((), 0)) if have_changed else None,
            captures=bool(due),
            adapters=options.adapters,
            requires_grad=(gradients.requires_grad,) if gradients is not None and gradients.may_flow else None,
            skips=self._changes.skips if self._changes.skips.indices else None,
            strides=strides,
            wants_logits=options.wants_logits,
        )
        self._edits.clear()
        self._instruments = instruments
        self._next_step += 1
        # 2) send it to the first stage
        flight = StepInFlight(step, route, inputs, logits_to_keep, self.num_tokens, options, due, self._finish_step)
        try:
            if gradients is not None and gradients.may_flow:
                gradients.graph = RemoteGraph(self._engine, step, route, self._timeout_s)
            flight.send(self._engine, (packed, *code.tensors, *keep, *sent), self._timeout_s, self.end)
        except BaseException as error:
            self._break(error, flight)
            raise
        # 3) count the tokens that the stages hold behind it
        self.num_rows = num_rows
        self.num_tokens += num_new
        return flight

    def finish_silent_steps(self, most_tokens: int = 0, until: StepInFlight | None = None) -> None:
        """Finish the first steps in flight, as long as they want no logits, until no more row-tokens are in flight."""
        while self._flights and self._flights[0] is not until and not self._flights[0].options.wants_logits:
            if sum(each.num_rows * each.num_new for each in self._flights) <= most_tokens:
                return
            self._flights[0].finish()

    def _finish_step(self, flight: StepInFlight) -> tuple[Tensor, Recorded]:
        self.finish_silent_steps(until=flight)
        if not self._flights or self._flights[0] is not flight:
            self._check_open()  # one before it has failed
            raise ArgumentError("steps are finished in the order in which they were started, and each once")
        try:
            self.stepping_thread = None if flight.options.hooks is None else threading.get_ident()
            results = flight.receive(self._spec, self._vocabulary, self.max_cache_len, self._engine.trusted)
            self._flights.popleft()
            self.last_step = flight.sample()
            self._watch(self.last_step)
            self._holds_kv = flight.options.keeps_kv
            self.kv_has_gradients |= flight.report_gradients() and self._holds_kv
        except BaseException as error:  # also an interrupt: what the stages hold is no longer known
            self._break(error, flight)
            raise
        finally:
            self.stepping_thread = None
            if not self._flights:
                self._used.close()
        return results

    def _break(self, error: BaseException, flight: StepInFlight) -> None:
        """End the session after a step that failed."""
        end_with_interpreter()
        self._broken_by = f" with {type(error).__name__}"
        self.end()
        if flight.options.gradients is not None:
            flight.options.gradients.graph = None  # which frees it
