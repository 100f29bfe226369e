"""One stage in service: its sessions, and the step that runs on it.

Knows the stage and its sessions' state; neither sockets nor other stages.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import msgspec
import torch
from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.model.context import ContextCode, MaskMode, PositionMode, StepContext
from lingualinked.model.kv_cache import StageCache
from lingualinked.model.stage import Stage, StageInputs, StageOutput
from lingualinked.protocol.messages import KVEdit, KVEditKind, StageReport, Step
from lingualinked.quantities import count_text
from lingualinked.worker.kv_copy import KVCopy, Piece, write_pieces
from lingualinked.worker.limits import spare_bytes
from lingualinked.worker.pace import Pace

_MAX_ARRIVING = 1 << 16


@dataclasses.dataclass(slots=True)
class HostedSession:
    """What a stage knows of one session.

    Parameters
    ----------
    cache : StageCache or None
        Its KV; ``None``: it keeps none.
    context : StepContext
        Its mask.
    number : int
        Number of its next step.
    num_rows, num_tokens : int
        What it holds.
    copies : dict of (int, int) to KVCopy
        Copies of its KV that are being made, by plan version and stage that they are for.
    """

    cache: StageCache | None
    context: StepContext
    number: int = 0
    num_rows: int = 0
    num_tokens: int = 0
    copies: dict[tuple[int, int], KVCopy] = dataclasses.field(default_factory=dict)


class HostedStage:
    """A loaded stage with the sessions that hold KV in it.

    Parameters
    ----------
    stage : Stage
        The loaded stage.
    previous_name : str
        From whom its inputs come.
    next_name : str
        To whom its outputs go.
    max_kv_tokens : int or None
        Rows x tokens of KV that all its sessions together may hold; ``None``: no limit of its own.
    """

    def __init__(self, stage: Stage, previous_name: str, next_name: str, max_kv_tokens: int | None) -> None:
        self.previous_name = previous_name
        self.next_name = next_name
        self._max_kv_tokens = max_kv_tokens
        self.stage = stage
        self.sent_bytes = 0
        self.sessions: dict[int, HostedSession] = {}
        self._arriving: dict[int, HostedSession] = {}
        self._num_steps = 0
        self._compute_s = 0.0

    def run(self, step: Step, tensors: tuple[Tensor, ...], pace: Pace) -> tuple[StageOutput, float]:
        """Run one step; the session is freed if it raises.

        Parameters
        ----------
        step : Step
            The step.
        tensors : tuple of Tensor
            What travelled beside it.
        pace : Pace
            How fast the worker is to be.

        Returns
        -------
        StageOutput
            What goes to the next stage, or the logits.
        float
            Seconds of compute, on the device that the worker may emulate.

        Raises
        ------
        ProtocolError
            If the step is not the session's next, or its tensors are not those it announces.
        """
        started = pace.start()
        session = self._session(step)
        try:
            output = self._compute(session, step, tensors)
        except BaseException:
            self.end(step.session)
            raise
        if not step.keeps_kv:
            self.end(step.session)
        elapsed_s = pace.finish(started)
        self._num_steps += 1
        self._compute_s += elapsed_s
        return output, elapsed_s

    def fork(self, session: int, number: int, fork: int) -> None:
        """Copy what is known of a session before its step ``number``, KV and all, as that of another.

        Raises
        ------
        ProtocolError
            If the session is not here, or at another step.
        """
        source = self.sessions.get(session)
        if source is None or source.number != number:
            raise ProtocolError(f"session {session} is not before step {number} on this stage")
        if fork in self.sessions:
            raise ProtocolError(f"session {fork} has state here already")
        self.sessions[fork] = dataclasses.replace(
            source,
            cache=None if source.cache is None else source.cache.copy(),
            context=StepContext.of(source.context.mask, source.context.num_tokens),
            copies={},
        )

    def end(self, session: int) -> None:
        """Free a session's KV, also what is arriving of it; does nothing if it has none."""
        self.sessions.pop(session, None)
        self._arriving.pop(session, None)

    def write(self, session: int, pieces: Sequence[Piece]) -> None:
        """Take in KV of a session that runs elsewhere as yet.

        Raises
        ------
        ProtocolError
            If the pieces don't fit what has come before, or are of layers that the stage does not hold.
        """
        if session not in self._arriving:
            if len(self._arriving) >= _MAX_ARRIVING:
                raise ProtocolError(f"more than {_MAX_ARRIVING} sessions arrive at once")
            self._arriving[session] = HostedSession(self._new_cache(), StepContext())
        arriving = self._arriving[session]
        cache = arriving.cache
        assert cache is not None
        fitting = []
        for piece in pieces:
            place, num_rows = piece.place, len(piece.keys)
            if place.slot not in cache.owned:
                raise ProtocolError(f"KV of layer slot {place.slot}, which this stage does not hold")
            self._check_arriving(arriving, num_rows, place.position + piece.keys.shape[2])
            if self._max_kv_tokens is not None:
                room = self._max_kv_tokens // max(1, num_rows) + 1
                place = msgspec.structs.replace(place, capacity=min(place.capacity, room))
            fitting.append(dataclasses.replace(piece, place=place))
        write_pieces(fitting, cache)

    def arrived(
        self, session: int, context: StepContext, number: int, *, records_past: bool, reserved_tokens: int
    ) -> None:
        """Record what else is known of a session that arrives."""
        arriving = self._arriving[session]
        arriving.context, arriving.number = context, number
        assert arriving.cache is not None
        arriving.cache.record_past(records_past)
        arriving.cache.reserve(reserved_tokens)

    def awaits(self, session: int) -> bool:
        """Whether KV of a session has come that runs elsewhere as yet."""
        return session in self._arriving

    def take_over(self, session: int, others: Iterable[HostedSession]) -> None:
        """Have a session run here from now on, with what has arrived of it, and what other stages here had of it.

        Raises
        ------
        ProtocolError
            If not all of its KV is there.
        """
        others = list(others)
        arrived = self._arriving.pop(session, None)
        state = HostedSession(self._new_cache(), StepContext()) if arrived is None else arrived
        assert state.cache is not None
        known = others[0] if others else state
        state.cache.adopt(other.cache for other in others if other.cache is not None)
        state.number = known.number
        state.num_rows, state.num_tokens = known.num_rows, known.context.num_tokens
        state.context = StepContext.of(known.context.mask, known.context.num_tokens)
        assert known.cache is not None
        state.cache.reserve(known.cache.reserved_tokens)
        state.cache.settle(known.context.num_tokens, records_past=known.cache.records_past)
        self.sessions[session] = state

    def forget_moves(self) -> None:
        """Give up whatever KV is on its way to or from here."""
        self._arriving.clear()
        for session in self.sessions.values():
            session.copies.clear()

    @property
    def held_bytes(self) -> int:
        """Bytes of its weights and of the KV that it holds or takes in."""
        return self.stage.weight_bytes + self._kv_bytes()

    def report(self, model: int, plan_version: int, index: int) -> StageReport:
        """Describe the stage, which is one of a model's in a plan, and what it has done."""
        return StageReport(
            model=model,
            plan_version=plan_version,
            stage=index,
            start=self.stage.start,
            end=self.stage.end,
            weight_bytes=self.stage.weight_bytes,
            kv_bytes=self._kv_bytes(),
            num_sessions=len(self.sessions),
            num_steps=self._num_steps,
            compute_us=round(self._compute_s * 1e6),
            sent_bytes=self.sent_bytes,
        )

    def _new_cache(self) -> StageCache:
        return self.stage.new_cache(functools.partial(spare_bytes, str(self.stage.device)))

    def _kv_bytes(self) -> int:
        held = (*self.sessions.values(), *self._arriving.values())
        return sum(session.cache.nbytes for session in held if session.cache is not None)

    def _session(self, step: Step) -> HostedSession:
        session = self.sessions.get(step.session)
        if session is None:
            if step.number != 0:
                raise ProtocolError(f"step {step.number} of session {step.session}, which has no state here")
            cache = self._new_cache() if step.keeps_kv else None
            session = self.sessions[step.session] = HostedSession(cache, StepContext())
        elif step.number != session.number:
            raise ProtocolError(f"step {step.number} of session {step.session} where {session.number} is due")
        session.number += 1
        return session

    def _check_budget(self, session: HostedSession, num_rows: int, num_tokens: int) -> None:
        """Note what a session comes to hold, and check all together."""
        session.num_rows, session.num_tokens = num_rows, num_tokens
        if self._max_kv_tokens is not None:
            self._check_room(sum(each.num_rows * each.num_tokens for each in self.sessions.values()))

    def _check_arriving(self, session: HostedSession, num_rows: int, num_tokens: int) -> None:
        """Check what has come of a session, and all that arrive together; note it."""
        self._check_room(num_rows * num_tokens)
        num_tokens = max(num_tokens, session.num_tokens)
        others = sum(each.num_rows * each.num_tokens for each in self._arriving.values() if each is not session)
        # Twice as much: what came ahead may be of sessions that have ended, or been cropped, where they run.
        self._check_room((others + num_rows * num_tokens) // 2)
        session.num_rows, session.num_tokens = num_rows, num_tokens

    def _check_room(self, num_tokens: int) -> None:
        """Refuse more KV, in all rows, than the caller gives room for, from whomever it comes."""
        if self._max_kv_tokens is not None and num_tokens > self._max_kv_tokens:
            raise ProtocolError(
                f"KV of {count_text(num_tokens, 'token')} in all rows exceeds max_kv_tokens={self._max_kv_tokens}"
            )

    def _compute(self, session: HostedSession, step: Step, tensors: tuple[Tensor, ...]) -> StageOutput:
        parts = split_tensors(step, tensors)
        num_rows, num_new = parts.inputs[0].shape[:2]
        if step.position_rows not in (0, 1, num_rows):
            raise ProtocolError(f"positions of {count_text(step.position_rows, 'row')} in a step of {num_rows}")
        if step.edits and session.cache is None:
            raise ProtocolError("a step edits the KV of a session that keeps none")
        if session.cache is not None:
            for edit in step.edits:
                if edit.kind is not KVEditKind.REORDER:
                    _apply(edit, session, session.cache)
            self._check_budget(session, num_rows, session.context.num_tokens + num_new)
            _reorder(step.edits, session, session.cache, num_rows)  # now: it may make many rows of few
        keep = parts.keep[0] if step.logits_to_keep is None else step.logits_to_keep
        code = ContextCode(
            mask=step.mask, positions=step.positions, position_rows=step.position_rows, tensors=parts.told
        )
        mask, positions = session.context.decode(code, num_new)
        return self.stage.step(
            StageInputs(
                tensors=parts.inputs,
                layout=step.layout,
                attention_mask=mask,
                position_ids=positions,
                logits_to_keep=keep,
                rope_reach=step.rope_reach,
                torch_settings=dict(step.torch_settings),
            ),
            session.cache,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class StepTensors:
    """The tensors beside a step, by what they are: the stage's inputs, mask and positions, indices of logits to keep."""

    inputs: tuple[Tensor, ...]
    told: tuple[Tensor, ...]
    keep: tuple[Tensor, ...]


def split_tensors(step: Step, tensors: tuple[Tensor, ...]) -> StepTensors:
    """Sort the tensors that came with a step.

    Raises
    ------
    ProtocolError
        If there are fewer than the step announces, or the inputs have no rows or no tokens.
    """
    num_told = (step.mask is MaskMode.FULL) + (step.positions is PositionMode.FULL)
    num_keep = int(step.logits_to_keep is None)
    num_inputs = len(tensors) - num_told - num_keep
    if num_inputs < 1 or tensors[0].ndim < 2 or 0 in tensors[0].shape[:2]:
        raise ProtocolError(
            f"a step arrived with the tensors {[list(tensor.shape) for tensor in tensors[:9]]}, of which "
            f"{num_told + num_keep} are announced beside its inputs: rows and tokens, at least one of each"
        )
    return StepTensors(
        tensors[:num_inputs], tensors[num_inputs : num_inputs + num_told], tensors[num_inputs + num_told :]
    )


def _reorder(edits: Sequence[KVEdit], session: HostedSession, cache: StageCache, num_rows: int) -> None:
    """Order a session's KV as several orders say, of which only what they come to counts, for a step of so many rows."""
    orders = [edit.values for edit in edits if edit.kind is KVEditKind.REORDER]
    if not orders:
        return
    order = functools.reduce(_chain, orders)  # rows in between may be as many as fit into a message
    if len(order) != num_rows:
        raise ProtocolError(f"KV of {count_text(len(order), 'row')} in a step of {num_rows}")
    rows = torch.tensor(order, dtype=torch.long)
    cache.reorder(rows)
    session.context.reorder(rows)
    for copy in session.copies.values():
        copy.reorder(rows)


def _chain(rows: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    if not all(0 <= row < len(rows) for row in order):
        raise ProtocolError(f"an order of rows that are not among {len(rows)}")
    return tuple(rows[row] for row in order)


def _apply(edit: KVEdit, session: HostedSession, cache: StageCache) -> None:
    """Edit a session's KV but for the order of its rows."""
    if len(edit.values) != 1:
        raise ProtocolError(f"{len(edit.values)} values, where an edit of KV has one")
    (value,) = edit.values
    if edit.kind is KVEditKind.RECORD:
        cache.record_past(bool(value))
        return
    if edit.kind is KVEditKind.RESERVE:
        cache.reserve(value)
        return
    if not 0 <= value <= session.context.num_tokens:  # fewer than none would count against the budget of all
        raise ProtocolError(f"a crop of {count_text(value, 'token')} of {session.context.num_tokens}")
    cache.crop(-value)
    session.context.crop(value)
    for copy in session.copies.values():
        copy.crop()
