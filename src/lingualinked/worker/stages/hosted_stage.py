"""One stage in service, with its sessions, and the steps that run on it.

Knows the stage and its sessions' state; neither sockets nor other stages.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.model.context import SOURCE, ContextCode, MaskMode, PositionMode, StepContext
from lingualinked.model.hooks.hook_data import HookPoint
from lingualinked.model.hooks.hook_points import ModuleCall
from lingualinked.model.kv.kv_cache import StageCache
from lingualinked.model.packed.alone import most_alone
from lingualinked.model.packed.packed_pass import PackedStage
from lingualinked.model.process.memory import release_memory
from lingualinked.model.stages.autograd_graph import AutogradGraph
from lingualinked.model.stages.layer_skips import NO_SKIPS
from lingualinked.model.stages.stage import Stage
from lingualinked.model.stages.stage_data import StageInputs, StageOutput
from lingualinked.protocol.messages import ShortcutTarget
from lingualinked.protocol.moving import JoinedRows
from lingualinked.protocol.steps import Step
from lingualinked.quantities import count_text
from lingualinked.telemetry.reports import StageSnapshot
from lingualinked.worker.hooks.kept_graphs import KeptGraphs, new_graph
from lingualinked.worker.process.limits import spare_bytes
from lingualinked.worker.stages.arriving_sessions import ArrivingSessions, check_room
from lingualinked.worker.stages.hosted_session import HostedSession, edit_kv, join_rows, reorder_rows
from lingualinked.worker.steps.pace import Pace
from lingualinked.worker.steps.received_shortcuts import ReceivedShortcuts
from lingualinked.worker.steps.step_tensors import extras_of, split_tensors

NO_SOURCES: Mapping[int, str] = MappingProxyType({})

logger = logging.getLogger("lingualinked.worker")

Pause = Callable[[ModuleCall, AutogradGraph | None], tuple[HookPoint, ...] | None]
"""Waits until the hooks of a module have run; returns the hooked modules from now on, if they have changed."""


class HostedStage:
    """A loaded stage, between two parties, with the sessions that hold KV in it.

    All sessions together may hold `max_kv_tokens` rows x tokens of KV; ``None``: no limit.
    """

    def __init__(
        self,
        stage: Stage,
        previous_name: str,
        next_name: str,
        max_kv_tokens: int | None,
        num_stages: int = 1,
        *,
        shortcut_targets: Sequence[ShortcutTarget] = (),
        shortcut_sources: Mapping[int, str] = NO_SOURCES,
    ) -> None:
        self.previous_name = previous_name
        self.num_stages = num_stages
        self.next_name = next_name
        self._max_kv_tokens = max_kv_tokens
        self.stage = stage
        self.sent_bytes = 0
        self.shortcut_targets = shortcut_targets
        self.shortcuts = ReceivedShortcuts(shortcut_sources, stage.used_shortcuts if shortcut_sources else ())
        self.sessions: dict[int, HostedSession] = {}
        self.graphs = KeptGraphs(str(stage.device))
        # Made without this object, which would else be freed by the collector alone, with the stage's weights.
        self._new_cache = functools.partial(_make_cache, stage)
        self.arriving = ArrivingSessions(self._new_cache, max_kv_tokens)
        self._num_steps = 0
        self._compute_s = 0.0

    def run_step(
        self, step: Step, tensors: tuple[Tensor, ...], pace: Pace, pause: Pause | None = None
    ) -> tuple[StageOutput, float]:
        """Run one step; return its output and its seconds of compute, on the emulated device if there is one.

        `pause` waits until the hooks of a module have run.
        Frees the session if it raises: a ProtocolError if the step is not the session's next one, or does not match its tensors.
        """
        started = pace.start_timer()

        def pause_timed(call: ModuleCall) -> tuple[HookPoint, ...] | None:
            nonlocal started
            assert pause is not None
            paused = pace.start_timer()
            try:
                return pause(call, graph)
            finally:
                started = pace.skip_pause(started, paused)

        num_rows = len(tensors[0]) if tensors and tensors[0].ndim else 0
        session = self.find_session(step.session, step.number, num_rows, step.max_cache_len, keeps_kv=step.keeps_kv)
        session.runner, session.run_steps = step.runner, step.run_steps
        graph = new_graph(step)
        try:
            output = self._compute(session, step, tensors, pause_timed, graph)
            self.graphs.keep((step.session, step.number), graph)
        except BaseException:
            self.end_session(step.session)
            raise
        if not step.keeps_kv:
            self.end_session(step.session)
        elapsed_s = pace.finish_timer(started)
        self.record_step(elapsed_s)
        return output, elapsed_s

    @functools.cached_property
    def packed(self) -> PackedStage:
        """The stage, for packed steps; raises UnsupportedOperationError if its model's class can't run them."""
        return PackedStage(self.stage)

    @functools.cached_property
    def most_together(self) -> int:
        """How many sessions' tokens one pass can compute with the bits that each has alone; 1 if that can't be found out here."""
        try:
            return most_alone(self.stage)
        except Exception as error:  # noqa: BLE001 - memory may be short; steps run one by one then, as they can
            logger.debug("steps of several sessions are never run together: %s", error)
            return 1

    def record_step(self, elapsed_s: float) -> None:
        """Record a step, and its seconds of compute, for the snapshot."""
        self._num_steps += 1
        self._compute_s += elapsed_s

    def is_next(self, step: Step) -> bool:
        """Return whether a step is its session's next one."""
        session = self.sessions.get(step.session)
        return step.number == (0 if session is None else session.number)

    def runner_of(self, step: Step) -> str:
        """Return the worker that may send this step of a run to the first stage; "" if no worker may."""
        session = self.sessions.get(step.session)
        if session is None or step.number != session.number or step.run_steps >= session.run_steps:
            return ""
        return session.runner

    def fork_session(self, session: int, number: int, fork: int, num_tokens: int | None = None) -> None:
        """Copy a session with the KV of `num_tokens` tokens, or all, as session `fork`.

        Raises ProtocolError unless it is here, before step `number`, and ArgumentError if it has not so many tokens.
        """
        source = self.sessions.get(session)
        if source is None or source.number != number:
            raise ProtocolError(f"session {session} is not before step {number} on this stage")
        if fork in self.sessions:
            raise ProtocolError(f"session {fork} has state here already")
        kept = source.context.num_tokens if num_tokens is None else num_tokens
        context = source.context.copy(kept)
        cache = None if source.cache is None else source.cache.copy(source.context.num_tokens - kept)
        self.sessions[fork] = dataclasses.replace(
            source,
            cache=cache,
            context=context,
            num_tokens=source.num_tokens if cache is None or num_tokens is None else cache.max_cache_len or kept,
            runner="",
            run_steps=0,
            copies={},
        )

    def join_sessions(self, session: int, parts: Sequence[JoinedRows]) -> None:
        """Make one session of the rows of several, which end; raise ProtocolError unless they are here, before those steps."""
        found = [self.sessions.get(part.session) for part in parts]
        known = [each for each in found if each is not None]
        if session in self.sessions or not known or len({part.session for part in parts}) != len(known):
            raise ProtocolError(
                f"sessions {[part.session for part in parts]} can't be joined as {session} on this stage"
            )
        for part, each in zip(parts, known, strict=True):
            if each.number != part.number or each.cache is None:
                raise ProtocolError(f"session {part.session} is not before step {part.number} on this stage")
            edit_kv(part.edits, each, each.cache)
            reorder_rows(part.edits, each, each.cache, None)
        self.sessions[session] = join_rows(known)
        for part in parts:
            del self.sessions[part.session]

    def end_session(self, session: int, *, moved: bool = False) -> None:
        """Free a session's KV, including KV received in advance; does nothing if there is none.

        What a later session can use is kept, unless this one has moved, and its stage is about to be freed.
        """
        ended = self.sessions.pop(session, None)
        self.shortcuts.end_session(session, may_return=moved)
        self.arriving.sessions.pop(session, None)
        if ended is not None and ended.cache is not None and not moved:
            self.stage.graphs.keep(ended.cache, self._room())

    def _room(self) -> float:
        """Return the tokens, in all rows, that sessions leave of the budget."""
        return math.inf if self._max_kv_tokens is None else self._max_kv_tokens - self._count_held()

    def _count_held(self) -> int:
        """Return the tokens, in all rows, that sessions hold or are about to."""
        return sum(each.num_rows * each.num_tokens for each in self.sessions.values())

    def adopt_session(self, session: int, others: Iterable[HostedSession]) -> None:
        """Run a session here from now on, with the KV that has arrived and that of `others`, its states in other stages here.

        Raises ProtocolError if some of its KV is missing.
        """
        others = list(others)
        arrived = self.arriving.sessions.pop(session, None)
        known = others[0] if others else arrived
        assert known is not None
        assert known.cache is not None
        max_cache_len = known.cache.max_cache_len
        state = HostedSession(self._new_cache(max_cache_len), StepContext()) if arrived is None else arrived
        assert state.cache is not None
        state.cache.adopt_layers(other.cache for other in others if other.cache is not None)
        state.number = known.number
        state.num_rows, state.num_tokens = known.num_rows, max_cache_len or known.context.num_tokens
        state.context = known.context.copy(known.context.num_tokens)
        state.cache.reserve(known.cache.reserved_tokens)
        # Of a layer that the model itself passes over, only its owner knows.
        lags = dict(state.cache.arriving_lags)
        for other in others:
            lags |= {} if other.cache is None else other.cache.lags
        state.cache.complete_adoption(known.context.num_tokens, records_past=known.cache.records_past, lags=lags)
        self.sessions[session] = state

    def drop_moves(self) -> None:
        """Drop all copies of KV in progress, to here and from here."""
        self.arriving.sessions.clear()
        for session in self.sessions.values():
            session.copies.clear()

    @property
    def held_bytes(self) -> int:
        """Bytes of its weights, of all its KV, also of idle caches, and of autograd graphs."""
        idle = sum(each.nbytes for each in self.stage.graphs.idle)
        return self.stage.weight_bytes + self._kv_bytes() + self.graphs.num_bytes + idle

    def snapshot(self) -> StageSnapshot:
        """Return the stage's span, its memory, and the work that it has done."""
        return StageSnapshot(
            device="",  # for the caller to fill in
            start=self.stage.start,
            end=self.stage.end,
            weight_bytes=self.stage.weight_bytes,
            kv_bytes=self._kv_bytes(),
            num_sessions=len(self.sessions),
            num_steps=self._num_steps,
            compute_s=self._compute_s,
            sent_bytes=self.sent_bytes,
        )

    def _kv_bytes(self) -> int:
        held = (*self.sessions.values(), *self.arriving.sessions.values())
        return sum(session.cache.nbytes for session in held if session.cache is not None)

    def _open_cache(self, num_rows: int, max_cache_len: int) -> StageCache:
        """Make the KV cache of a new session, or use one again that fits; idle ones make room."""
        idle = self.stage.graphs.idle
        reused = self.stage.graphs.reuse(num_rows, max_cache_len)
        if reused is not None:
            return reused
        if idle and max_cache_len:
            accelerator = str(self.stage.device)
            token_bytes = sum(each.nbytes for each in idle) / sum(each.size for each in idle)
            if num_rows * max_cache_len * token_bytes > spare_bytes(accelerator):
                idle.clear()
                release_memory(accelerator)
        return self._new_cache(max_cache_len)

    def find_session(
        self, key: int, number: int, num_rows: int, max_cache_len: int, *, keeps_kv: bool = True
    ) -> HostedSession:
        """Return the session whose step `number` is about to run, and count that; raise ProtocolError if another one is due."""
        session = self.sessions.get(key)
        if session is None:
            if number != 0:
                raise ProtocolError(f"step {number} arrived for session {key}, which has no state here")
            cache = self._open_cache(num_rows, max_cache_len) if keeps_kv else None
            session = self.sessions[key] = HostedSession(cache, StepContext())
        elif number != session.number:
            raise ProtocolError(f"step {number} of session {key} arrived, and step {session.number} is due")
        session.number += 1
        session.runner, session.run_steps = "", 0
        return session

    def check_budget(
        self, session: HostedSession, num_rows: int, num_tokens: int, num_held: int | None = None
    ) -> int | None:
        """Record the size that a session's KV will have, and check the budget of all sessions (ProtocolError).

        Returns the row-tokens that all hold with it, if they are counted; `num_held` are those before it, if that is known.
        """
        num_before, num_now = session.num_rows * session.num_tokens, num_rows * num_tokens
        session.num_rows, session.num_tokens = num_rows, num_tokens
        if self._max_kv_tokens is None:
            return None
        num_held = self._count_held() if num_held is None else num_held - num_before + num_now
        idle = self.stage.graphs.idle
        if idle and sum(each.size for each in idle) > self._max_kv_tokens - num_held:
            idle.clear()
        check_room(num_held, self._max_kv_tokens)
        return num_held

    def _compute(
        self,
        session: HostedSession,
        step: Step,
        tensors: tuple[Tensor, ...],
        pause: Callable[[ModuleCall], tuple[HookPoint, ...] | None],
        graph: AutogradGraph | None,
    ) -> StageOutput:
        # 1) check the step
        inputs, shared = split_tensors(step, tensors)
        num_rows, num_new = self.stage.step_shape(inputs[0], step.shape)
        if step.position_rows not in (0, 1, num_rows):
            raise ProtocolError(f"positions of {count_text(step.position_rows, 'row')} arrived in a step of {num_rows}")
        if step.edits and session.cache is None:
            raise ProtocolError("a step edits the KV of a session that keeps no KV")
        extras = extras_of(step, shared)
        # 2) edit the KV; rows are reordered after the budget is checked, since an order may repeat them
        if session.cache is not None:
            edit_kv(step.edits, session, session.cache)
            source = extras[SOURCE].shape[1] if SOURCE in extras else session.cache.num_source
            num_tokens = session.cache.max_cache_len or session.context.num_tokens + num_new + source
            self.check_budget(session, num_rows, num_tokens)
            reorder_rows(step.edits, session, session.cache, num_rows)
        # 3) decode mask and positions, and run the stage
        num_context = (step.mask is MaskMode.FULL) + (step.positions is PositionMode.FULL)
        context, others = shared[:num_context], shared[num_context:]
        keep: int | Tensor = others[0] if step.logits_to_keep is None else step.logits_to_keep
        if step.instruments is not None:
            own = others[step.logits_to_keep is None :][: step.instruments.num_tensors]
            session.instruments = self.stage.place_instruments(step.instruments, own)
        code = ContextCode(mask=step.mask, positions=step.positions, position_rows=step.position_rows, tensors=context)
        past = session.context.num_tokens
        mask, positions = session.context.decode(code, num_new)
        return self.stage.step(
            StageInputs(
                tensors=inputs,
                layout=step.layout,
                shape=step.shape,
                shortcuts=self.shortcuts.remove(step.session, step.number),
                attention_mask=mask,
                position_ids=positions,
                logits_to_keep=keep,
                wants_logits=step.wants_logits,
                rope_reach=step.rope_reach,
                torch_settings=dict(step.torch_settings),
                records=step.records,
                hidden_state_indices=step.hidden_state_indices,
                skips=step.skips or NO_SKIPS,
                hooks=step.hooks,
                pause=pause,
                instruments=session.instruments,
                captures=step.captures,
                past=past,
                extras=session.context.keep_source(extras),
                picture_copies=0 if step.extras is None else step.extras.picture_copies,
                graph=graph,
                adapters=step.adapters,
            ),
            session.cache,
        )


def _make_cache(stage: Stage, max_cache_len: int) -> StageCache:
    return stage.new_cache(functools.partial(spare_bytes, str(stage.device)), max_cache_len)
