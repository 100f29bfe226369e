"""A session: one conversation whose KV lies in every stage.

Knows steps and edits of KV; neither generation modes nor what made the tokens.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import weakref
from collections.abc import Callable

from torch import Tensor

from lingualinked.cluster.kv.kv_age import KVAge
from lingualinked.cluster.kv.kv_budget import KVBudget
from lingualinked.cluster.messaging.engine import Engine
from lingualinked.cluster.messaging.io_thread import end_with_interpreter
from lingualinked.cluster.messaging.pending import results_of
from lingualinked.cluster.plans.route import Routes
from lingualinked.cluster.runs.run_in_flight import RunInFlight
from lingualinked.cluster.sessions.routed_session import RoutedSession
from lingualinked.cluster.sessions.session_place import end_session
from lingualinked.cluster.sessions.session_use import SessionUse
from lingualinked.cluster.sessions.stepped_session import PLAIN, SteppedSession
from lingualinked.cluster.steps.recorded import Recorded
from lingualinked.cluster.steps.remote_graph import RemoteGraph
from lingualinked.cluster.steps.step_in_flight import MOST_TOKENS_AHEAD, StepInFlight, StepOptions
from lingualinked.cluster.weights.tensor_edits import TensorEdits
from lingualinked.errors import ArgumentError, ClosedError
from lingualinked.model.context import PositionMode, StepContext
from lingualinked.model.hooks.instrument_data import Instruments
from lingualinked.model.process.torch_settings import read_torch_settings
from lingualinked.model.spec import ModelSpec
from lingualinked.model.stages.rotary import RopeHistory, RopeReach
from lingualinked.model.tensor_strides import pack_tensor
from lingualinked.protocol.steps import KVEdit, KVEditKind, Step
from lingualinked.telemetry.samples import StepSample
from lingualinked.transport.wire.hop_clock import clock_us


class Session(RoutedSession, SteppedSession):
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
        ropes: RopeHistory,
        edits: TensorEdits,
        watch: Callable[[StepSample], None],
        record_move: Callable[[float, int], None],
        timeout_s: float,
        vocabulary: int | None,
        spec: ModelSpec,
        max_cache_len: int = 0,
    ) -> None:
        super().__init__(engine, model, number, routes, record_move, timeout_s)
        self.max_cache_len = max_cache_len
        self.num_rows = 0
        self.num_tokens = 0
        self._num_source = 0  # tokens that an encoder has read, whose KV is held too
        self.kv_has_gradients = False  # whether tokens of its KV were computed in steps with gradients
        self.last_step: StepSample | None = None
        self.stepping_thread: int | None = None  # which runs the hooks of a step now
        self._budget = budget
        self._ropes = ropes
        self._reach: RopeReach | None = None  # before its first step
        self._changes = edits
        self.kv_age = KVAge(edits)
        self._watch = watch
        self._timeout_s = timeout_s
        self._vocabulary = vocabulary
        self._spec = spec
        self._context = StepContext()
        self._edits: list[KVEdit] = []
        self._flights: collections.deque[StepInFlight] = collections.deque()
        self._flying_thread = 0  # which has started them
        self._run: RunInFlight | None = None  # which is not finished, though the stages may have ended it
        self._use = SessionUse(edits.gate)
        self._used = contextlib.ExitStack()  # its use by the steps in flight
        self._landing = threading.Lock()
        self._finalizer = weakref.finalize(self, end_session, engine, model, number, self._place, budget)
        self._finalizer.atexit = False

    @property
    def ended(self) -> bool:
        """Whether the session has been ended."""
        return not self._finalizer.alive

    def start_step(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        logits_to_keep: int | Tensor,
        options: StepOptions = PLAIN,
    ) -> StepInFlight:
        """Send a step, as `step` does, to be finished later by the same thread.

        Several may be in flight, which the stages run in order, and which are finished in order; one with hooks only alone.
        Until all are finished, the session does not change to another route. If one fails, those behind it fail with it.
        Those that want no logits need not be finished: later ones do that.
        """
        self._finish_run()
        is_ours = self._flying_thread == threading.get_ident()
        if is_ours:  # make room, or let all end if it is to change to another route
            self.finish_silent_steps(MOST_TOKENS_AHEAD if self._place.route is self._routes.target else 0)
        is_first = not (self._flights and is_ours)
        if not is_first and (self._flights[-1].options.hooks or options.hooks):
            raise ArgumentError("past_key_values is in use by a step with hooks: finish it before the next one starts")
        with contextlib.ExitStack() as undo:
            if is_first:
                undo.enter_context(self._use.for_steps(self._end_run if options.run else None))
                self._switch_route()
                self._flying_thread = threading.get_ident()
            return self._send_step(inputs, attention_mask, position_ids, logits_to_keep, options, undo)

    def reorder(self, rows: Tensor) -> None:
        """Keep the KV rows ``rows`` (int64 ``[new rows]``); reaches the stages with the next step."""
        self._finish_run()
        values = tuple(int(row) for row in rows.tolist())
        self._edits.append(KVEdit(kind=KVEditKind.REORDER, values=values))
        self._context.reorder(rows.cpu().long())
        self.num_rows = len(values)

    def crop(self, num_tokens: int) -> None:
        """Forget the last ``num_tokens`` tokens; 0 still drops what sliding layers kept for a crop."""
        self._finish_run()
        self._edits.append(KVEdit(kind=KVEditKind.CROP, values=(num_tokens,)))
        self._context.crop(num_tokens)
        self.num_tokens -= num_tokens

    def copy_to(self, other: Session, num_tokens: int | None = None) -> None:
        """Make a session that has just been opened go on from here by itself, with a copy of the KV in every stage.

        With `num_tokens`, it goes on behind so many of the tokens. If that fails, the other session has ended.
        """
        self._finish_run()
        kept = self.num_tokens if num_tokens is None else num_tokens
        try:
            context = self._context.copy(kept)
            with self._use.alone(), self._use.for_change(), other._use.for_change():
                self._switch_route()
                self._check_open()
                self._announce_switch()
                other._place.route = self._place.route
                if self._holds_kv:
                    if num_tokens is None:
                        self._budget.hold_as_much(other._number, self._number)  # with what edits are still to drop
                    else:
                        self._budget.hold(
                            other._number, self.num_rows * (self.max_cache_len or kept + self._num_source)
                        )
                    results_of(self._requests.fork(self._place.route, self._next_step, other._number, num_tokens))
                    other._instruments = self._instruments
                other.num_rows, other.num_tokens, other._num_source = self.num_rows, kept, self._num_source
                other._reach = None if self._reach is None else self._reach.copy()
                other.kv_has_gradients = self.kv_has_gradients
                other._context = context
                other.kv_age.copy_from(self.kv_age)
                edits = [each for each in self._edits if num_tokens is None or each.kind is not KVEditKind.CROP]
                other._edits, other._next_step, other._holds_kv = edits, self._next_step, self._holds_kv
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
            self._run = None
            self._flights.clear()
            self._land()

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
        used: contextlib.ExitStack,
    ) -> StepInFlight:
        self._check_open()
        self.kv_age.begin_step(holds_kv=self._holds_kv or bool(self._flights))
        self._announce_switch()
        # 1) count its KV, and encode what travels beside the inputs
        instruments, gradients, run = options.instruments, options.gradients, options.run
        num_rows, num_new = inputs.shape[:2]
        due = {} if instruments is None else instruments.due_captures(num_rows, num_new, self.num_tokens)
        if self._reach is None:
            self._reach = self._ropes.reach.copy()
        num_steps = 1 if run is None or self._reach.advances else run.num_steps
        if options.extras is not None:
            self._num_source = max(self._num_source, options.extras.num_source)
        if options.keeps_kv:
            num_steps = self._hold_kv(num_rows, num_new + options.num_tokens_ahead, num_steps)
        code = self._context.encode(attention_mask, position_ids, num_new)
        later = None if run is None or self._reach.advances else run.later_code(self._context)
        keep = (logits_to_keep,) if isinstance(logits_to_keep, Tensor) else ()
        have_changed = instruments is not self._instruments
        extras = () if options.extras is None else options.extras.tensors
        sent = () if instruments is None or not have_changed else instruments.tensors
        num_positions = self.num_tokens + num_new if position_ids is None else int(position_ids.max()) + 1
        route = self._place.route
        self._ropes.reach.advance(num_positions)
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
            runner="" if later is None else route.stage_devices[-1],
            run_steps=0 if later is None else num_steps - 1,
            extras=None if options.extras is None else options.extras.describe(),
        )
        self._edits.clear()
        self._instruments = instruments
        self._next_step += 1
        # 2) send it to the first stage
        arguments = (step, route, inputs, logits_to_keep, self.num_tokens, options, due, self._finish_step)
        if later is None:
            flight = StepInFlight(*arguments)
        else:
            flight = self._run = RunInFlight(*arguments, self, later, self._vocabulary)
        # It is in flight before it is sent: a run may have ended before this thread goes on.
        if not self._flights:
            self._used = used.pop_all()
        self._flights.append(flight)
        try:
            if gradients is not None and gradients.may_flow:
                gradients.graph = RemoteGraph(self._engine, step, route, self._timeout_s)
            flight.send(self._engine, (packed, *code.tensors, *keep, *sent, *extras), self._timeout_s, self.end)
        except BaseException as error:
            self.break_off(error, flight)
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
            self.break_off(error, flight)
            raise
        finally:
            self.stepping_thread = None
            if not self._flights:
                self._land()
        return results

    def _land(self) -> None:
        """Let others use the session, which has nothing in flight; on the I/O thread after a run, which may coincide."""
        with self._landing:
            used, self._used = self._used, contextlib.ExitStack()
        used.close()

    def _hold_kv(self, num_rows: int, num_new: int, num_steps: int) -> int:
        """Count the KV that a step needs, and those behind it in a run; return for how many steps there is room."""
        if self.max_cache_len:
            self._budget.hold(self._number, num_rows * self.max_cache_len)
            return num_steps
        least = num_rows * (self.num_tokens + self._num_source + num_new)
        return (
            1 + (self._budget.hold_up_to(self._number, least, least + num_rows * (num_steps - 1)) - least) // num_rows
        )

    def _end_run(self) -> None:
        if self._run is not None:
            self._run.end()

    def _finish_run(self) -> None:
        """End a run that this thread has started, to do something else with the session."""
        if self._run is not None and self._flying_thread == threading.get_ident():
            self._run.finish()

    def count_steps(self, num_steps: int, positions: PositionMode) -> None:
        """Count the steps that the stages have begun by themselves in a run, which has ended; on the I/O thread.

        So the session rests, and can move, even if nobody takes the tokens of the run.
        """
        self._next_step += num_steps
        self._context.extend(num_steps, positions)
        self._holds_kv = True
        self._flights.pop()  # chunks of a prompt before the run may still be to be finished
        if not self._flights:
            self._land()

    def record_step(self, sample: StepSample, num_new: int) -> None:
        """Count the tokens of a step of a run, and report its timings."""
        self.num_tokens += num_new
        self.last_step = sample
        self._watch(sample)

    def finish_run(self, num_untaken: int, *, can_undo: bool) -> None:
        """Drop the KV of steps of a run whose tokens nobody takes; the session ends if that is impossible."""
        self._run = None
        if num_untaken and not can_undo:
            self._broken_by = ", in whose KV there are tokens that can't be dropped"
            self.end()
        elif num_untaken:
            self._edits.append(KVEdit(kind=KVEditKind.CROP, values=(num_untaken,)))
            self._context.crop(num_untaken)

    def break_off(self, error: BaseException, flight: StepInFlight) -> None:
        """End the session after a step that failed."""
        end_with_interpreter()
        self._broken_by = f" with {type(error).__name__}"
        self.end()
        if flight.options.gradients is not None:
            flight.options.gradients.graph = None  # which frees it
