"""All stages that a worker hosts, of every model and plan version: loads them, and moves sessions between them.

Knows stages and a thread to load them in; no sockets.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.model.process.memory import release_memory
from lingualinked.model.stages.stage import Stage
from lingualinked.protocol.editing import EditTensor
from lingualinked.protocol.messages import LoadStage, StageReport
from lingualinked.protocol.moving import ForkSession, JoinSessions, WeightChunk
from lingualinked.protocol.packed import PackedStep
from lingualinked.protocol.steps import EndSession, ShortcutTensors, Step, StepGroup
from lingualinked.worker.background import Background
from lingualinked.worker.process.limits import spare_bytes
from lingualinked.worker.stages.hosted_stage import HostedStage
from lingualinked.worker.weights.borrowed_weights import BorrowedWeights, RequestPart
from lingualinked.worker.weights.edited_tensors import EditedTensors
from lingualinked.worker.weights.file_exchange import StageFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lingualinked.model.kv.kv_cache import StageCache

_MAX_SESSIONS = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class StageKey:
    """Identifies a stage: its model, the plan version, and its position in the plan."""

    model: int
    plan_version: int
    index: int


class LoadCancelledError(Exception):
    """A stage was unloaded before it had been loaded."""


class HostedStages:
    """The stages of one worker, which compute on `accelerator` and are loaded in `background`."""

    def __init__(self, accelerator: str, background: Background) -> None:
        self._accelerator = accelerator
        self._background = background
        self._stages: dict[StageKey, HostedStage] = {}
        self._wanted: set[StageKey] = set()
        self._ended: dict[int, set[int]] = {}  # sessions, by the model's number
        self._borrowed: dict[int, tuple[StageKey, BorrowedWeights]] = {}  # by the request's number
        self.edited = EditedTensors()

    def load_stage(
        self,
        request: LoadStage,
        on_progress: Callable[[int], None],
        on_loaded: Callable[[Stage], None],
        on_error: Callable[[Exception], None],
        request_part: RequestPart,
        files: StageFiles | None = None,
    ) -> None:
        """Load a stage in the background; the callbacks run on the worker's loop.

        The weights come from `files`, or else from those of the caller.
        """
        # 1) on the loop: register the stage as wanted; unloading its model, or keeping another plan, cancels it
        self.drop_idle_caches()
        key = StageKey(request.model, request.plan_version, request.stage)
        self._wanted.add(key)

        def check_cancelled() -> None:
            if key not in self._wanted:
                raise LoadCancelledError

        def borrow(meta_model: PreTrainedModel) -> BorrowedWeights:
            borrowed = BorrowedWeights(
                meta_model,
                request,
                lambda *part: self._background.call_on_loop(lambda: request_part(*part)),
                check_cancelled,
            )
            self._borrowed[request.request] = key, borrowed
            return borrowed

        num_done = 0

        def progress(num_bytes: int) -> None:
            nonlocal num_done
            check_cancelled()
            num_done = most = max(num_done, num_bytes)  # weights that were fetched first are then loaded
            self._background.call_on_loop(lambda: on_progress(most))

        def load_in_background() -> None:
            # 2) in the background: load the layers that no stage here holds, from the checkpoint or from other workers
            own = [hosted.stage for other, hosted in list(self._stages.items()) if other.model == request.model]
            try:
                stage = Stage.load(
                    request.spec,
                    request.start,
                    request.end,
                    accelerator=self._accelerator,
                    progress=progress,
                    shared=[each for each in own if each.start < request.end and request.start < each.end],
                    fallback=borrow if request.holders else None,
                    open_files=None
                    if files is None
                    else lambda spec: files.open_weights(spec, check_cancelled, progress),
                )
            except LoadCancelledError:
                self._background.call_on_loop(lambda: release_memory(self._accelerator))
            except Exception as error:  # noqa: BLE001 - the caller re-raises it
                self._background.call_on_loop(functools.partial(on_error, error))
            else:
                # 3) on the loop again: put the stage in service, if it is still wanted
                hosted = HostedStage(
                    stage,
                    request.previous_name,
                    request.next_name,
                    request.max_kv_tokens,
                    request.num_stages,
                    shortcut_targets=request.shortcut_targets,
                    shortcut_sources=dict(request.shortcut_sources),
                )
                self._background.call_on_loop(functools.partial(self._put_in_service, key, hosted, on_loaded, on_error))
            finally:
                self._borrowed.pop(request.request, None)
                if files is not None:
                    files.end()

        self._background.submit(load_in_background)

    def step_senders(self, message: Step | StepGroup | PackedStep | EndSession) -> tuple[str, ...]:
        """Return who may send a step to a stage, or end its session, besides the caller: the party before it, or who runs it.

        Nobody may send the step of a run that is not in progress: it may have been on its way when the run ended.
        """
        if isinstance(message, StepGroup):  # who may send one of its steps, which are checked one by one
            return tuple({name for step in message.steps for name in self.step_senders(step)})
        hosted = self._stages.get(StageKey(message.model, message.plan_version, message.stage))
        if hosted is None:
            return ()
        if isinstance(message, Step) and message.stage == 0 and message.runner:
            runner = hosted.runner_of(message)
            return (runner,) if runner else ()
        return (hosted.previous_name,)

    def shortcut_senders(self, message: ShortcutTensors) -> tuple[str, ...]:
        """Return who may send a stage what the stage `message.source` makes for it."""
        hosted = self._stages.get(StageKey(message.model, message.plan_version, message.stage))
        sender = None if hosted is None else hosted.shortcuts.sender(message)
        return () if sender is None else (sender,)

    def lenders(self, request: int) -> tuple[str, ...]:
        """Return the worker that a part of a weight was last requested from, for a stage that is being loaded."""
        borrowed = self._borrowed.get(request)
        return () if borrowed is None else (borrowed[1].last_asked,)

    def deliver_weight(self, chunk: WeightChunk, tensors: tuple[Tensor, ...]) -> None:
        """Deliver a part of a weight to the stage that is being loaded; does nothing if its loading has ended."""
        borrowed = self._borrowed.get(chunk.request)
        if borrowed is not None:
            borrowed[1].deliver_chunk(chunk, tensors)

    def find_stage(self, key: StageKey) -> HostedStage | None:
        """Return a stage if it is hosted here."""
        return self._stages.get(key)

    def get_stage(self, key: StageKey) -> HostedStage:
        """Return a stage, or raise ProtocolError if it is not hosted here."""
        hosted = self._stages.get(key)
        if hosted is None:
            raise ProtocolError(
                f"stage {key.index} of version {key.plan_version} of the plan of model {key.model} is not hosted here"
            )
        return hosted

    def edit_tensor(self, request: EditTensor, tensors: tuple[Tensor, ...]) -> None:
        """Edit a tensor in all stages of a model that hold it; raise ProtocolError if none does."""
        self.edited.edit(request, tensors, self._stages_of(request.model))

    def _stages_of(self, model: int) -> list[Stage]:
        return [hosted.stage for key, hosted in self._stages.items() if key.model == model]

    def span_of(self, key: StageKey) -> tuple[int, int]:
        """Return the span of a stage; an empty one if it is not hosted here."""
        hosted = self._stages.get(key)
        return (0, 0) if hosted is None else (hosted.stage.start, hosted.stage.end)

    def is_due(self, key: StageKey, session: int, number: int) -> bool:
        """Return whether a session's step can run, or fail, now; if not, it must wait.

        Until the session has moved to this version, or until what other stages make for the step has come.

        Raises ProtocolError if the step has run already, or is the first one of a session that runs under another version.
        """
        hosted = self._stages.get(key)
        if hosted is None:
            return True
        state = hosted.sessions.get(session)
        if state is not None:
            if number < state.number:
                raise ProtocolError(f"step {number} of session {session} arrived, and {state.number} is due")
            return hosted.shortcuts.are_complete(session, number)
        is_elsewhere = self._is_elsewhere(key, session)
        if is_elsewhere and number == 0:
            raise ProtocolError(f"the first step arrived of session {session}, which runs under another plan version")
        is_here = not is_elsewhere and session not in hosted.arriving
        return is_here and (number > 0 or hosted.shortcuts.are_complete(session, number))

    def is_lost(self, key: StageKey, session: int) -> bool:
        """Return whether a session can have no step on a stage unless it moves there first, or the stage is not here."""
        hosted = self._stages.get(key)
        if hosted is None:
            return True
        return session not in hosted.sessions and (session in hosted.arriving or self._is_elsewhere(key, session))

    def _is_elsewhere(self, key: StageKey, session: int) -> bool:
        """Return whether a session runs under another plan version."""
        return any(
            session in other.sessions
            for at, other in self._stages.items()
            if at.model == key.model and at.plan_version != key.plan_version
        )

    def move_session(self, model: int, session: int, plan_version: int) -> None:
        """Run a session under a plan version from now on; does nothing if it already does.

        Raises ProtocolError if some of its KV is missing.
        """
        # 1) do nothing if the session has ended while it was moving
        if self.has_ended(model, session):
            return
        # 2) find its state in the stages of other versions
        own = [(key, hosted) for key, hosted in self._stages.items() if key.model == model]
        others = [hosted for key, hosted in own if key.plan_version != plan_version]
        leaving = [hosted.sessions[session] for hosted in others if session in hosted.sessions]
        # 3) put that, and the KV that has arrived, into the stages of this version
        for key, hosted in own:
            if (
                key.plan_version == plan_version
                and session not in hosted.sessions
                and (leaving or session in hosted.arriving)
            ):
                hosted.adopt_session(session, leaving)
        # 4) free it in the others
        for hosted in others:
            hosted.end_session(session, moved=True)

    def make_session(self, message: ForkSession | JoinSessions) -> None:
        """Make a session of the KV of others within a stage; raise ProtocolError if one is missing, or at another step."""
        hosted = self.get_stage(StageKey(message.model, message.plan_version, message.stage))
        self.trim_idle_caches()
        if isinstance(message, ForkSession):
            hosted.fork_session(message.session, message.number, message.fork, message.num_tokens)
        else:
            hosted.join_sessions(message.session, message.parts)

    def end_session(self, model: int, session: int, plan_version: int) -> None:
        """Free a session's KV under every plan version, and accept no more of it while it may be moving.

        A session that runs under a later version than this one has moved on, and stays.
        """
        own = [(key.plan_version, hosted) for key, hosted in self._stages.items() if key.model == model]
        if not any(version > plan_version and session in hosted.sessions for version, hosted in own):
            for _, hosted in own:
                hosted.end_session(session)
            self.trim_idle_caches()
        # While a model moves, the rest of the session's KV, and the message that it has moved, may arrive later.
        is_moving = len({version for version, _ in own}) > 1
        if is_moving and len(self._ended.get(model, ())) < _MAX_SESSIONS:
            self._ended.setdefault(model, set()).add(session)

    def has_ended(self, model: int, session: int) -> bool:
        """Return whether a session ended while it may have been moving."""
        return session in self._ended.get(model, ())

    def keep_plan(self, model: int, plan_version: int) -> None:
        """Free every stage of a model that has another plan version, and drop all copies in progress."""
        for key, hosted in self._stages.items():
            if key.model == model:
                hosted.drop_moves()
        self._ended.pop(model, None)
        self._drop_stages(
            {key for key in self._known_keys() if key.model == model and key.plan_version != plan_version}
        )

    def unload_model(self, model: int) -> None:
        """Free every stage of a model, with all its sessions."""
        self._ended.pop(model, None)
        self._drop_stages({key for key in self._known_keys() if key.model == model})

    def reports(self) -> tuple[StageReport, ...]:
        """Report on all stages."""
        return tuple(
            StageReport(model=key.model, plan_version=key.plan_version, snapshot=hosted.snapshot())
            for key, hosted in sorted(self._stages.items())
        )

    def drop_idle_caches(self) -> None:
        """Free the KV caches that are kept for later sessions."""
        idle = self._idle_caches()
        if any(idle):
            for caches in idle:
                caches.clear()
            release_memory(self._accelerator)

    def trim_idle_caches(self) -> None:
        """Free idle KV caches, the oldest of a stage first, until they leave as much memory free as they take."""
        while True:
            sizes = [(sum(cache.nbytes for cache in caches), caches) for caches in self._idle_caches()]
            held = sum(size for size, _ in sizes)
            if not held or held <= spare_bytes(self._accelerator):
                return
            del max(sizes, key=operator.itemgetter(0))[1][0]

    def _idle_caches(self) -> list[list[StageCache]]:
        return [hosted.stage.graphs.idle for hosted in self._stages.values()]

    def held_bytes(self) -> int:
        """Return the bytes of weights and KV of all models, and of edited weights as they were loaded.

        Of a model that moves, only the larger of the two versions counts, since they share most layers.
        """
        held: defaultdict[int, defaultdict[int, int]] = defaultdict(lambda: defaultdict(int))
        for key, hosted in self._stages.items():
            held[key.model][key.plan_version] += hosted.held_bytes
        return sum(max(versions.values()) for versions in held.values()) + self.edited.num_bytes

    def _known_keys(self) -> set[StageKey]:
        return self._wanted | self._stages.keys()

    def _put_in_service(
        self,
        key: StageKey,
        hosted: HostedStage,
        on_loaded: Callable[[Stage], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        if key not in self._wanted:
            return
        try:
            self.edited.renew(key.model, hosted.stage)  # what it shares with no other stage was loaded anew
        except Exception as error:  # noqa: BLE001 - the caller, who waits for the stage, re-raises it
            on_error(error)
            return
        self._stages[key] = hosted
        on_loaded(hosted.stage)

    def _drop_stages(self, keys: set[StageKey]) -> None:
        self._wanted -= keys
        for key, borrowed in list(self._borrowed.values()):
            if key in keys:
                borrowed.cancel()
        for key in keys:
            self._stages.pop(key, None)
        for model in {key.model for key in keys}:
            self.edited.drop_unheld(model, self._stages_of(model))
        if keys:
            release_memory(self._accelerator)
