"""All stages that a worker hosts, of every model and plan version; loading them, and moving sessions from one to another.

Knows stages and a thread to load them in; no sockets.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.model.memory import release_memory
from lingualinked.model.stage import Stage
from lingualinked.protocol.messages import Acknowledged, LoadStage, StageReport, Step
from lingualinked.protocol.moving import ForkSession, WeightChunk
from lingualinked.worker.background import Background
from lingualinked.worker.borrowed_weights import Ask, BorrowedWeights
from lingualinked.worker.hosted import HostedStage

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_MAX_SESSIONS = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class StageKey:
    """Which stage: of a model, in a plan, at a position."""

    model: int
    plan_version: int
    index: int


class NotWantedError(Exception):
    """What is being loaded has been unloaded before it was there."""


class HostedStages:
    """The stages of one worker.

    Parameters
    ----------
    accelerator : str
        Where they compute.
    background : Background
        Where they are loaded.
    """

    def __init__(self, accelerator: str, background: Background) -> None:
        self._accelerator = accelerator
        self._background = background
        self._stages: dict[StageKey, HostedStage] = {}
        self._wanted: set[StageKey] = set()
        self._ended: dict[int, set[int]] = {}  # sessions, by number of the model
        self._borrowed: dict[int, tuple[StageKey, BorrowedWeights]] = {}  # by number of the request

    def load(
        self,
        request: LoadStage,
        on_progress: Callable[[int], None],
        on_loaded: Callable[[Stage], None],
        on_error: Callable[[Exception], None],
        fetch: Ask,
    ) -> None:
        """Load a stage beside whatever else is done; the callbacks are called on the worker's loop."""
        key = StageKey(request.model, request.plan_version, request.stage)
        self._wanted.add(key)

        def check_wanted() -> None:
            if key not in self._wanted:
                raise NotWantedError

        def borrow(meta_model: PreTrainedModel) -> BorrowedWeights:
            borrowed = BorrowedWeights(
                meta_model, request, lambda *asked: self._background.call(lambda: fetch(*asked)), check_wanted
            )
            self._borrowed[request.request] = key, borrowed
            return borrowed

        def progress(num_bytes: int) -> None:
            check_wanted()
            self._background.call(lambda: on_progress(num_bytes))

        def work() -> None:
            held = [hosted.stage for other, hosted in list(self._stages.items()) if other.model == request.model]
            try:
                stage = Stage.load(
                    request.spec,
                    request.start,
                    request.end,
                    accelerator=self._accelerator,
                    progress=progress,
                    held=[each for each in held if each.start < request.end and request.start < each.end],
                    instead=borrow if request.holders else None,
                )
            except NotWantedError:
                self._background.call(lambda: release_memory(self._accelerator))
            except Exception as error:  # noqa: BLE001 - the caller raises it
                self._background.call(functools.partial(on_error, error))
            else:
                hosted = HostedStage(stage, request.previous_name, request.next_name, request.max_kv_tokens)
                self._background.call(functools.partial(self._enter, key, hosted, on_loaded))
            finally:
                self._borrowed.pop(request.request, None)

        self._background.submit(work)

    def sources(self, model: int, plan_version: int, stage: int) -> tuple[str, ...]:
        """Who may send what a stage runs besides the caller: the party before it."""
        hosted = self._stages.get(StageKey(model, plan_version, stage))
        return () if hosted is None else (hosted.previous_name,)

    def lenders(self, request: int) -> tuple[str, ...]:
        """Who was asked for the weights of a stage that is being loaded."""
        borrowed = self._borrowed.get(request)
        return () if borrowed is None else (borrowed[1].asked,)

    def take_weight(self, chunk: WeightChunk, tensors: tuple[Tensor, ...]) -> None:
        """Hand a part of a weight to whoever waits for it; nobody may any more."""
        borrowed = self._borrowed.get(chunk.request)
        if borrowed is not None:
            borrowed[1].take(chunk, tensors)

    def get(self, key: StageKey) -> HostedStage:
        """Return a stage.

        Raises
        ------
        ProtocolError
            If it is not hosted.
        """
        hosted = self._stages.get(key)
        if hosted is None:
            raise ProtocolError(
                f"stage {key.index} of version {key.plan_version} of the plan of model {key.model} is not hosted here"
            )
        return hosted

    def span(self, key: StageKey) -> tuple[int, int]:
        """Which layers a stage has; none if it is not hosted."""
        hosted = self._stages.get(key)
        return (0, 0) if hosted is None else (hosted.stage.start, hosted.stage.end)

    def is_due(self, step: Step) -> bool:
        """Whether a step can run, or fail, now; if not, word that its session has moved is still to come.

        Raises
        ------
        ProtocolError
            If it has run already, or the session it would begin runs under another plan version.
        """
        hosted = self._stages.get(StageKey(step.model, step.plan_version, step.stage))
        if hosted is None:
            return True
        session = hosted.sessions.get(step.session)
        if session is not None:
            if step.number < session.number:
                raise ProtocolError(f"step {step.number} of session {step.session}, and {session.number} is due")
            return True
        is_elsewhere = any(
            step.session in other.sessions
            for key, other in self._stages.items()
            if key.model == step.model and key.plan_version != step.plan_version
        )
        if is_elsewhere and step.number == 0:
            raise ProtocolError(f"the first step of session {step.session}, which runs under another plan version")
        return not is_elsewhere and not hosted.awaits(step.session)

    def move_session(self, model: int, session: int, plan_version: int) -> None:
        """Have a session run in the stages of a plan version from now on; does nothing if it does so already.

        Raises
        ------
        ProtocolError
            If not all of its KV is there.
        """
        if self.has_ended(model, session):
            return
        own = [(key, hosted) for key, hosted in self._stages.items() if key.model == model]
        others = [hosted for key, hosted in own if key.plan_version != plan_version]
        leaving = [hosted.sessions[session] for hosted in others if session in hosted.sessions]
        for key, hosted in own:
            if (
                key.plan_version == plan_version
                and session not in hosted.sessions
                and (leaving or hosted.awaits(session))
            ):
                hosted.take_over(session, leaving)
        for hosted in others:
            hosted.end(session)

    def fork_session(self, message: ForkSession) -> Acknowledged:
        """Copy a session's KV in a stage under another number.

        Raises
        ------
        ProtocolError
            If the session is not there, or at another step.
        """
        hosted = self.get(StageKey(message.model, message.plan_version, message.stage))
        hosted.fork(message.session, message.number, message.fork)
        return Acknowledged(request=message.request)

    def end_session(self, model: int, session: int, plan_version: int) -> None:
        """Free a session's KV under every plan version; while it may be moving, nothing more of it is taken in.

        Where it runs under a later version than its end is said for, it has moved on, and stays there.
        """
        own = [(key.plan_version, hosted) for key, hosted in self._stages.items() if key.model == model]
        if not any(version > plan_version and session in hosted.sessions for version, hosted in own):
            for _, hosted in own:
                hosted.end(session)
        if (
            len({version for version, _ in own}) > 1 and len(self._ended.get(model, ())) < _MAX_SESSIONS
        ):  # the rest of its KV, and word of its move, may come only after word of its end
            self._ended.setdefault(model, set()).add(session)

    def has_ended(self, model: int, session: int) -> bool:
        """Whether a session has ended while it may have been moving."""
        return session in self._ended.get(model, ())

    def keep_plan(self, model: int, plan_version: int) -> None:
        """Free every stage of a model that is of another plan version, and what was under way between the two."""
        for key, hosted in self._stages.items():
            if key.model == model:
                hosted.forget_moves()
        self._ended.pop(model, None)
        self._drop({key for key in self._known() if key.model == model and key.plan_version != plan_version})

    def unload(self, model: int) -> None:
        """Free every stage of a model, with all its sessions."""
        self._ended.pop(model, None)
        self._drop({key for key in self._known() if key.model == model})

    def reports(self) -> tuple[StageReport, ...]:
        """Describe all stages."""
        return tuple(
            hosted.report(key.model, key.plan_version, key.index) for key, hosted in sorted(self._stages.items())
        )

    def held_bytes(self) -> int:
        """Weights and KV of all models; of one that is being moved, under the plan version that holds more of it.

        The two versions share most layers, so that both together would be counted twice.
        """
        held: defaultdict[int, defaultdict[int, int]] = defaultdict(lambda: defaultdict(int))
        for key, hosted in self._stages.items():
            held[key.model][key.plan_version] += hosted.held_bytes
        return sum(max(versions.values()) for versions in held.values())

    def _known(self) -> set[StageKey]:
        return self._wanted | self._stages.keys()

    def _enter(self, key: StageKey, hosted: HostedStage, on_loaded: Callable[[Stage], None]) -> None:
        if key in self._wanted:
            self._stages[key] = hosted
            on_loaded(hosted.stage)

    def _drop(self, keys: set[StageKey]) -> None:
        self._wanted -= keys
        for key, borrowed in list(self._borrowed.values()):
            if key in keys:
                borrowed.cancel()
        for key in keys:
            self._stages.pop(key, None)
        if keys:
            release_memory(self._accelerator)
