"""Runs a continuous batch: carries out what its scheduler asks for, and turns answers into tokens and outputs.

Knows packed steps and transformers' records of requests; not which request runs when, nor the thread that it runs in.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from lingualinked.cluster.packed.packed_flight import PackedPart
from lingualinked.cluster.packed.packed_reply import PartReply
from lingualinked.errors import (
    ArgumentError,
    ClosedError,
    DeviceMemoryError,
    KVCapacityError,
    LingualinkedError,
    WorkerDiedError,
)
from lingualinked.quantities import count_text
from lingualinked.sharded.batching.events import Admitted, Copy, Failed, Instruction, Outcome, Part, Request, Run
from lingualinked.sharded.batching.kv_copier import KVCopier
from lingualinked.sharded.batching.rooms import SessionRooms
from lingualinked.sharded.batching.scheduling import Scheduler

if TYPE_CHECKING:
    from transformers.generation.continuous_batching.continuous_api import OutputRouter

    from lingualinked.cluster.packed.packed_flight import PackedFlight
    from lingualinked.cluster.pipeline import Pipeline
    from lingualinked.model.adapters.adapter_data import AdapterUse
    from lingualinked.sharded.batching.choosing import Choice, Chooser
    from lingualinked.sharded.batching.settings import BatchSettings
    from lingualinked.sharded.batching.wake import Wake

logger = logging.getLogger("lingualinked.batching")


class _Served(NamedTuple):
    """A request that is served: transformers' record of it, and how its tokens are chosen."""

    state: RequestState
    request: Request
    choice: Choice


class RunningBatch:
    """All requests of a manager from when they are taken in to their last output; used by one thread.

    What comes back of steps and copies waits until `advance`; ``wake`` tells the thread of it. ``forget`` is told the id of each
    request that is over; ``adapters`` returns those that steps compute with at the moment.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        settings: BatchSettings,
        chooser: Chooser,
        router: OutputRouter,
        wake: Wake,
        forget: Callable[[str], None],
        adapters: Callable[[], AdapterUse | None],
    ) -> None:
        self._pipeline = pipeline
        self._settings = settings
        self._chooser = chooser
        self._router = router
        self._forget = forget
        self._adapters = adapters
        self._wake = wake
        self._rooms = SessionRooms(pipeline, settings, wake.set)
        self._scheduler = Scheduler(settings.limits, self._rooms)
        self._copier = KVCopier()
        self._served: dict[str, _Served] = {}
        self._flights: dict[int, tuple[tuple[Part, ...], PackedFlight | None]] = {}  # None: it could not start
        self._ended: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    @property
    def is_idle(self) -> bool:
        """Whether no request is served."""
        return self._scheduler.is_idle

    @property
    def rests(self) -> bool:
        """Whether no step is in flight."""
        return not self._flights

    def add(self, state: RequestState, priority: int) -> None:
        """Take in a request, and its children; it fails by itself if it can't be served."""
        children = [_child(state, index) for index in range(state.num_children)]
        state.num_children = 0
        requests = []
        for each in (state, *children):
            try:
                choice = self._chooser.begin(each.request_id, each.logit_processor_kwargs)
            except Exception as error:  # noqa: BLE001 - as transformers' processors check them, each in its way
                self._fail(each, error)
                continue
            request = Request(
                key=each.request_id, ids=[*each.initial_tokens], max_new=each.max_new_tokens, priority=priority
            )
            self._served[each.request_id] = _Served(each, request, choice)
            requests.append(request)
        if requests:
            requests[0].children = requests[1:]
            self._scheduler.add(requests[0])

    def cancel(self, request_id: str) -> None:
        """End a request, without any output, as transformers does; and its children that have not begun."""
        served = self._served.get(request_id)
        if served is not None:
            gone = [request_id, *(child.key for child in served.request.children)]
            if self._scheduler.cancel(request_id):
                for key in gone:
                    self._served.pop(key, None)
                    self._forget(key)

    def advance(self, *, starts: bool = True) -> None:
        """Handle what has come back since the last call, and start what can be started, unless it is not to."""
        while not self._ended.empty():
            self._ended.get()()
        if starts:
            for instruction in self._scheduler.next_instructions():
                self._carry_out(instruction)

    def fail_all(self, error: Exception, queued: list[RequestState]) -> None:
        """End everything: every request that is served, or was still queued, fails with an error."""
        states = [served.state for served in self._served.values()]
        self._served.clear()
        for state in (*states, *queued):
            children = [_child(state, index) for index in range(state.num_children)]
            for each in (state, *children):
                self._fail(each, error)
        self.close()

    def close(self) -> None:
        """End all sessions, also those of steps in flight."""
        self._flights.clear()
        self._rooms.close()
        self._copier.close()

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Run(number, parts):
                self._start_step(number, parts)
            case Copy(key, source, target, num_tokens):
                sessions = self._rooms.session(source), self._rooms.session(target)
                self._copier.start_copy(*sessions, num_tokens, self._later(key))
            case Admitted(key):
                state = self._served[key].state
                if state.status == RequestStatus.PENDING:
                    state.status = RequestStatus.PREFILLING
            case Failed(key, error, num_needed):
                served = self._served.pop(key, None)
                if served is not None:
                    self._fail(served.state, error or self._lacks_room(num_needed))

    def _later(self, key: str) -> Callable[[bool], None]:
        """Return what a copy calls at its end, on another thread."""

        def end(succeeded: bool) -> None:
            self._ended.put(lambda: self._scheduler.end_copy(key, succeeded=succeeded))
            self._wake.set()

        return end

    def _start_step(self, number: int, parts: tuple[Part, ...]) -> None:
        packed = [
            PackedPart(
                session=self._rooms.session(part.slot),
                ids=part.ids,
                num_logits=int(part.wants_choice),
                choice=self._served[part.key].choice.for_stage() if part.wants_choice else None,
            )
            for part in parts
        ]
        flight: PackedFlight | None = None
        replies: Sequence[PartReply] = ()
        try:
            flight = self._pipeline.packed_steps.start(packed, self._adapters())
        except LingualinkedError as error:
            replies = _fail_parts(parts, error)
        self._flights[number] = parts, flight
        ended, wake = self._ended, self._wake

        def tell(_: object) -> None:
            ended.put(lambda: self._end_step(number, replies))
            wake.set()

        if flight is None:
            tell(None)
        else:
            flight.future.add_done_callback(tell)

    def _end_step(self, number: int, replies: Sequence[PartReply]) -> None:
        """Record the tokens of a step, and deliver the outputs of requests that end or stream with them.

        Without `replies`, they are those of the flight. If it has failed as a whole, its requests fail, and others go on.
        """
        parts, flight = self._flights.pop(number)
        if flight is not None:
            try:
                replies = flight.result()
            except LingualinkedError as error:
                replies = _fail_parts(parts, error)
        outcomes = {part.key: self._read(part, reply) for part, reply in zip(parts, replies, strict=True)}
        self._scheduler.end_step(number, outcomes)
        for part in parts:
            served = self._served.get(part.key)
            if served is not None and part.wants_choice and outcomes[part.key].error is None:
                if outcomes[part.key].is_last:
                    del self._served[part.key]
                if outcomes[part.key].is_last or served.state.streaming:
                    self._deliver(served.state)

    def _read(self, part: Part, reply: PartReply) -> Outcome:
        """Return what came of one part; a token that has come is added to the record of its request."""
        if reply.error is not None:
            lacks_memory = isinstance(reply.error, DeviceMemoryError | KVCapacityError)
            return Outcome(error=reply.error, lacks_memory=lacks_memory)
        served = self._served.get(part.key)
        if served is None or not part.wants_choice:  # or it was cancelled
            return Outcome(token=0 if part.wants_choice else None)
        token, logprob = reply.token, reply.logprob
        if token is None:
            assert reply.logits is not None
            try:
                token, logprob = served.choice.choose(reply.logits[-1], served.request.ids)
            except Exception as error:  # noqa: BLE001 - by settings of this request's own
                return Outcome(error=error)
        state = served.state
        if state.status != RequestStatus.DECODING:
            state.status = RequestStatus.DECODING
        is_last = state.update_and_check_completion(token, logprob)
        return Outcome(token=token, is_last=is_last)

    def _lacks_room(self, num_needed: int) -> LingualinkedError:
        most = self._settings.max_text_tokens
        if most is not None and num_needed > most:
            return ArgumentError(
                f"{num_needed:,} tokens exceed the {count_text(most, 'position')} that this model has learned"
            )
        return KVCapacityError(
            f"the request needs room for {count_text(num_needed, 'token')} of KV, more than max_kv_tokens of the model or num_blocks of "
            "the ContinuousBatchingConfig allow at all: shorten its prompt or max_new_tokens, or raise the limit"
        )

    def _fail(self, state: RequestState, error: Exception) -> None:
        state.status = RequestStatus.FAILED
        state.error = f"{type(error).__name__}: {error}"
        logger.error("request %s failed: %s", state.request_id, state.error)
        self._deliver(state)

    def _deliver(self, state: RequestState) -> None:
        if state.status >= RequestStatus.FINISHED:
            self._forget(state.request_id)
        try:
            self._router.deliver(state.to_generation_output())
        except RuntimeError as error:  # the event loop of its handler is closed
            logger.error("the output of request %s could not be delivered: %s", state.request_id, error)


def _child(state: RequestState, index: int) -> RequestState:
    """Return another request for the same prompt, named as transformers names it."""
    return RequestState(
        request_id=f"{state.request_id}__child#{index}",
        initial_tokens=state.initial_tokens,
        **{**state.get_request_config(), "num_children": 0},
    )


def _fail_parts(parts: tuple[Part, ...], error: LingualinkedError) -> tuple[PartReply, ...]:
    """Return a failure of each part of a step that has failed as a whole; raise an error that leaves no request its KV."""
    if isinstance(error, ClosedError | WorkerDiedError):
        raise error
    return (PartReply(error=error),) * len(parts)
