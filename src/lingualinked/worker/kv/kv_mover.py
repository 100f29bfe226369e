"""Sends the KV of sessions to other workers, and receives KV from them.

Knows messages, stages and peers; neither plans nor why KV is moved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.model.context import StepContext
from lingualinked.protocol.moving import MODULES, CopyKV, KVChunk, KVCopied, KVReceived, SessionState
from lingualinked.quantities import count_text
from lingualinked.worker.kv.announced_moves import AnnouncedMoves
from lingualinked.worker.kv.kv_copy import KVCopy, Piece, StatePiece
from lingualinked.worker.messaging.peers import Peers
from lingualinked.worker.stages.hosted_session import HostedSession
from lingualinked.worker.stages.hosted_stages import HostedStages, StageKey

_CHUNK_BYTES = 128 << 10
"""Bytes of KV in one message. Only one message is in flight, so that a step waits for no more than this on the link."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Transfer:
    """A copy in progress, with its request and its session."""

    request: CopyKV
    session: HostedSession
    copy: KVCopy


class KVMover:
    """Moves KV from and to one worker, between the parties of announced moves."""

    def __init__(self, stages: HostedStages, peers: Peers, moves: AnnouncedMoves) -> None:
        self._stages = stages
        self._peers = peers
        self._moves = moves
        self._transfers: dict[int, _Transfer] = {}

    def start_copy(self, request: CopyKV) -> KVCopied | None:
        """Start copying a session's KV to another worker; return the answer if there is nothing to copy.

        Raises ProtocolError if the stage is not hosted, or a final copy finds the session missing or at another step.
        """
        hosted = self._stages.get_stage(StageKey(request.model, request.plan_version, request.stage))
        session = hosted.sessions.get(request.session)
        if session is None or session.cache is None:
            if request.is_final:
                raise ProtocolError(f"session {request.session} has no KV on stage {request.stage}")
            # The session has ended, or has not begun.
            return KVCopied(request=request.request, model=request.model, num_bytes=0)
        if request.is_final and session.number != request.number:
            raise ProtocolError(
                f"session {request.session} is at step {session.number}, and the copy expects step {request.number}"
            )
        key = (request.target_version, request.target_stage)
        if key not in session.copies:
            slots = hosted.stage.cache_slots(request.start, request.end)
            session.copies[key] = KVCopy(
                session.cache, slots, hosted.stage.span.parts.is_kept_in(request.start, request.end)
            )
        self._transfers[request.request] = _Transfer(request, session, session.copies[key])
        self._send_next_chunk(request.request)
        return None

    def handle_answer(self, answer: KVReceived) -> None:
        """Send the next chunk, unless the last one was not accepted or nothing is left."""
        if not answer.accepted:
            self._transfers.pop(answer.request, None)
        elif answer.request in self._transfers:
            self._send_next_chunk(answer.request)

    def kv_senders(self, chunk: KVChunk) -> set[str]:
        """Return who may send KV of a stage: the holders of its layers under the other version of a move."""
        return {name for name, _, _ in self._sending_spans(chunk)}

    def kv_targets(self, request: int) -> tuple[str, ...]:
        """Return the worker to which the KV of a request is being sent."""
        return (self._transfers[request].request.target_name,) if request in self._transfers else ()

    def receive_chunk(self, chunk: KVChunk, sender: str, tensors: Sequence[Tensor]) -> KVCopied | None:
        """Write a chunk from another worker; return the answer for the caller after the last one.

        Raises ProtocolError if the chunk does not fit those before it, or its stage is not hosted.
        """
        # 1) check the chunk's tensors, and that its layers move from the sender to here
        num_kv, num_more = 2 * len(chunk.slices), sum(len(each.tensors) for each in chunk.states)
        state = chunk.state
        known = [False] * 3 if state is None else [state.has_mask, state.has_positions, state.has_source_mask]
        num_sent = num_kv + num_more + sum(known)
        if len(tensors) != num_sent or any(tensor.ndim != 4 for tensor in tensors[:num_kv]):
            raise ProtocolError(
                f"{count_text(len(tensors), 'tensor')} arrived with KV of {count_text(len(chunk.slices), 'layer')} and states of "
                f"{len(chunk.states)}"
            )
        hosted = self._stages.get_stage(StageKey(chunk.model, chunk.plan_version, chunk.stage))
        device = hosted.stage.device
        spans = [(start, end) for name, start, end in self._sending_spans(chunk) if name == sender]
        slots = frozenset({MODULES}).union(*(hosted.stage.cache_slots(*span) for span in spans))
        fits = slots.issuperset([each.slot for each in chunk.slices] + [each.slot for each in chunk.states])
        is_kept = [hosted.stage.span.parts.is_kept_in(*span) for span in spans]
        if not fits or not all(any(here(name) for here in is_kept) for name in _kept_names(chunk)):
            raise ProtocolError(f"{sender!r} sent KV of layers that do not move from there to here")
        # 2) write its KV, and the session's state if the chunk has it; a session that has ended needs neither
        pieces: list[Piece | StatePiece] = [
            Piece(place=place, keys=tensors[2 * index].to(device), values=tensors[2 * index + 1].to(device))
            for index, place in enumerate(chunk.slices)
        ]
        remaining = iter(tensors[num_kv:])
        pieces += [StatePiece(place, tuple(next(remaining) for _ in place.tensors)) for place in chunk.states]
        if not self._stages.has_ended(chunk.model, chunk.session):
            hosted.arriving.write_kv(chunk.session, pieces, chunk.max_cache_len)
            if state is not None:
                mask, positions, source_mask = (next(remaining) if is_sent else None for is_sent in known)
                context = StepContext(mask, state.num_tokens, positions, source_mask)
                hosted.arriving.record_state(chunk.session, context, state)
        # 3) after the last chunk, tell the caller
        if not chunk.is_last:
            return None
        return KVCopied(request=chunk.request, model=chunk.model, num_bytes=chunk.num_bytes)

    def drop_model(self, model: int) -> None:
        """Send nothing more of a model's sessions."""
        for number in [number for number, each in self._transfers.items() if each.request.model == model]:
            del self._transfers[number]

    def _sending_spans(self, chunk: KVChunk) -> list[tuple[str, int, int]]:
        """Return (name, start, end) of each party whose layers move to a stage."""
        span = self._stages.span_of(StageKey(chunk.model, chunk.plan_version, chunk.stage))
        held = [
            (name, max(start, span[0]), min(end, span[1]))
            for name, start, end in self._moves.spans_of_other_version(chunk.model, chunk.plan_version)
        ]
        return [(name, start, end) for name, start, end in held if start < end]

    def _send_next_chunk(self, number: int) -> None:
        transfer = self._transfers[number]
        request, session = transfer.request, transfer.session
        assert session.cache is not None
        pieces, is_last = transfer.copy.next_pieces(_CHUNK_BYTES, with_states=request.is_final)
        kv = [each for each in pieces if isinstance(each, Piece)]
        states = [each for each in pieces if isinstance(each, StatePiece)]
        state, context = None, []
        if is_last:
            del self._transfers[number]
            if request.is_final:
                mask, positions = session.context.mask, session.context.last_positions
                source_mask = session.context.source_mask
                context = [each for each in (mask, positions, source_mask) if each is not None]
                state = SessionState(
                    number=session.number,
                    num_tokens=session.context.num_tokens,
                    records_past=session.cache.records_past,
                    reserved_tokens=session.cache.reserved_tokens,
                    has_mask=mask is not None,
                    has_positions=positions is not None,
                    has_source_mask=source_mask is not None,
                    lags=session.cache.lags,
                )
        chunk = KVChunk(
            request=request.request,
            model=request.model,
            plan_version=request.target_version,
            stage=request.target_stage,
            session=request.session,
            slices=tuple(piece.place for piece in kv),
            states=tuple(piece.place for piece in states),
            num_bytes=transfer.copy.num_bytes,
            max_cache_len=session.cache.max_cache_len,
            is_last=is_last,
            state=state,
        )
        tensors = [tensor for piece in kv for tensor in (piece.keys, piece.values)]
        tensors += [tensor for piece in states for tensor in piece.tensors]
        self._peers.send(request.target_name, chunk, [*tensors, *context])


def _kept_names(chunk: KVChunk) -> list[str]:
    """Return the paths of what modules keep that a chunk has."""
    pieces = [each for each in chunk.states if each.slot == MODULES]
    return [name for each in pieces for names in (each.plain, *each.tensors) for name in names]
