"""The manager of a continuous batch: transformers' own, with its queues and outputs, whose loop runs packed steps in the workers.

Knows transformers' manager and the thread that the loop runs in; scheduling and steps are in other files.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
import weakref
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.continuous_api import BackgroundThreadStatus
from transformers.generation.continuous_batching.utils import drain_queue

from lingualinked.errors import ArgumentError, ClosedError
from lingualinked.interrupts import wait_in_pieces
from lingualinked.processes.resources import start_thread
from lingualinked.sharded.batching.choosing import Chooser
from lingualinked.sharded.batching.qualifying import check_between_steps, check_model, check_request
from lingualinked.sharded.batching.running import RunningBatch
from lingualinked.sharded.batching.settings import check_config, check_generation, read_settings
from lingualinked.sharded.batching.wake import Wake

if TYPE_CHECKING:
    from transformers.generation.continuous_batching.requests import GenerationOutput
    from transformers.generation.continuous_batching.utils import WorkloadHints

    from lingualinked.model.adapters.adapter_data import AdapterUse


class ShardedBatchingManager(ContinuousBatchingManager):
    """What ``init_continuous_batching`` of a sharded model returns; used as transformers' own, from any number of threads.

    Its thread ends with `stop`, with the model, or when the manager is no longer referenced.
    """

    if TYPE_CHECKING:
        model: Any

    def __init__(
        self,
        model: Any,
        generation_config: GenerationConfig,
        continuous_batching_config: ContinuousBatchingConfig,
        workload_hints: WorkloadHints | None = None,
    ) -> None:
        self._made_with = _describe(generation_config), dataclasses.asdict(continuous_batching_config)
        check_config(continuous_batching_config)
        check_generation(generation_config)
        check_model(model)
        self._settings = read_settings(
            continuous_batching_config,
            len(model.plan.stages),
            has_sliding_layers=model._sliding_window is not None,  # noqa: SLF001 - within the room
            num_positions=getattr(model._positions, "num_positions", None),  # noqa: SLF001 - within the room
            batch_invariant=model._pipeline.spec.batch_invariant,  # noqa: SLF001 - within the room
        )
        self._priorities: dict[str, int] = {}  # of requests that have been added and are not over
        self._wake = Wake()
        super().__init__(model, generation_config, continuous_batching_config, workload_hints)
        self._wake_up_loop: Any = self._wake
        seed = None
        if getattr(generation_config, "do_sample", True):  # as transformers reads it
            seed = continuous_batching_config.seed
            seed = int(torch.randint(0, 2**32 - 1, (1,))) if seed is None else seed
        self._chooser = Chooser(self.logit_processor, seed, logprobs=continuous_batching_config.return_logprobs)

    def was_made_with(self, generation: GenerationConfig | None, config: ContinuousBatchingConfig | None) -> bool:
        """Return whether configs say what those said that it was made with; ``None`` says nothing."""
        own_generation, own_config = self._made_with
        return (generation is None or _describe(generation) == own_generation) and (
            config is None or dataclasses.asdict(config) == own_config
        )

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Do nothing: the stages run packed steps with the attention that the model was loaded with."""

    def warmup(self) -> None:
        """Do nothing but record it: there are no graphs to capture."""
        self.warmed_up = True

    def start(self) -> None:
        """Start the thread that serves requests; raises if the model is closed, or does what packed steps can't."""
        if self.is_running():
            super().start()  # which warns
            return
        check_model(self.model)
        self.background_thread_status.clear()
        priorities, wake = self._priorities, self._wake

        def forget(request_id: str) -> None:
            priorities.pop(request_id, None)

        batch: Any = RunningBatch(
            self.model._pipeline,  # noqa: SLF001 - within the room
            self._settings,
            self._chooser,
            self.output_router,
            wake,
            forget,
            functools.partial(_adapters_of, weakref.ref(self.model)),
        )
        self.batch_processor = batch
        me = weakref.ref(self, lambda _: wake.set())
        thread: Any = threading.Thread(target=_serve, args=(me, batch, wake), name="lingualinked-batching", daemon=True)
        self._generation_thread = thread
        start_thread(thread)

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        """Stop the thread as transformers does: after all requests, or at once, when those that are left fail (``hard_stop``)."""
        super().stop(block, timeout, keep_for_next_session, hard_stop)
        self._wake.set()

    def join(self, stop_trigger_time: float, timeout: float | None = None) -> None:
        """Wait until the thread has ended, at most ``timeout`` seconds."""
        self._wake.set()
        super().join(stop_trigger_time, timeout)

    def add_request(
        self,
        input_ids: Sequence[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        *,
        priority: int = 0,
        **logit_processor_kwargs: Any,
    ) -> str:
        """Add a request.

        Parameters
        ----------
        input_ids, request_id, max_new_tokens, streaming, record_timestamps, eos_token_id, **logit_processor_kwargs
            As in transformers' manager.
        priority : int
            Requests of higher priority are admitted first.

        Returns
        -------
        str
            The id of the request.

        Raises
        ------
        ArgumentError
            If ids are missing, outside the vocabulary, or exceed the learned positions; if the request id is in use, or the priority no
            integer.
        ClosedError
            If the manager has stopped or failed, or the model is closed.
        queue.Full
            If ``max_queue_size`` requests wait for 10 seconds.
        """
        check_model(self.model)
        ids = self._check_ids(input_ids, max_new_tokens)
        if not isinstance(priority, int):  # compared with those of others, in the manager's thread
            raise ArgumentError(f"priority={priority!r} must be an integer")
        denied = self.background_thread_status.can_accept_new_requests()
        if denied is not None:
            cause = self.background_thread_status.fatal_error
            raise ClosedError(f"the manager takes no requests: {denied} Make a new one") from cause
        with self._request_lock:
            if request_id is None:
                request_id = f"req_{self._request_counter}"
                self._request_counter += 1
            if request_id in self._priorities:
                raise ArgumentError(f"request_id={request_id!r} is in use: choose another one, or leave it out")
            self._priorities[request_id] = priority
        try:
            super().add_request(
                ids, request_id, max_new_tokens, streaming, record_timestamps, eos_token_id, **logit_processor_kwargs
            )
        except BaseException:
            self._priorities.pop(request_id, None)
            raise
        return request_id

    def add_requests(
        self,
        inputs: Iterable[Sequence[int]],
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        **logit_processor_kwargs: Any,
    ) -> list[str]:
        """Add several requests, once all have been checked; arguments as in `add_request`."""
        checked = [self._check_ids(ids, max_new_tokens) for ids in inputs]
        return super().add_requests(checked, max_new_tokens, streaming, record_timestamps, **logit_processor_kwargs)

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> GenerationOutput | None:
        """Return one output, as transformers does; an interrupt comes between two waits."""
        found: list[GenerationOutput] = []

        def wait(timeout_s: float) -> bool:
            result = super(ShardedBatchingManager, self).get_result(request_id, timeout_s)
            if result is not None:
                found.append(result)
            has_ended = self._generation_thread is None or self.background_thread_status.fatal_error is not None
            return bool(found) or has_ended or not self.output_router.output_queue.empty()

        wait_in_pieces(wait, math.inf if timeout is None else timeout)
        return found[0] if found else None

    def _check_ids(self, input_ids: Sequence[int], max_new_tokens: int | None) -> list[int]:
        return check_request(self.model, self.generation_config, input_ids, max_new_tokens)

    def serve(self, batch: RunningBatch) -> bool:
        """Do all that can be done now, in the manager's thread; return whether to go on."""
        status = self.background_thread_status
        try:
            status.update_with_tp_status(status.local_status)
            if status.tp_status == BackgroundThreadStatus.HARD_STOP:
                batch.fail_all(ClosedError(_STOPPED), drain_queue(self.input_queue))
                return False
            for state in drain_queue(self.input_queue):
                batch.add(state, self._priorities.get(state.request_id, 0))
            for request_id in drain_queue(self.cancel_queue):
                if isinstance(request_id, Hashable):  # others name no request
                    batch.cancel(request_id)
            if not batch.is_idle:
                check_between_steps(self.model)
            is_paused = status.is_pause_requested()
            batch.advance(starts=not is_paused)
            if is_paused and batch.rests:
                status.pause_and_wait()
                self._wake.set()
            return status.tp_status == BackgroundThreadStatus.DONT_STOP or not batch.is_idle
        except Exception as error:  # noqa: BLE001 - every request gets it, and the manager ends
            status.request_stop(BackgroundThreadStatus.HARD_STOP, global_rank=0)
            batch.fail_all(error, drain_queue(self.input_queue))
            status.record_fatal_error(error.with_traceback(None))
            return False


_STOPPED = "the manager was stopped before this request had ended"


def _describe(generation: GenerationConfig) -> dict[str, Any]:
    settings: dict[str, Any] = generation.to_dict()
    return {**settings, "eos_token_id": -1 if generation.eos_token_id is None else generation.eos_token_id}


def _serve(manager: weakref.ref[ShardedBatchingManager], batch: RunningBatch, wake: Wake) -> None:
    """Serve requests until the manager stops or nothing refers to it any more."""
    goes_on = True
    while goes_on:
        served = manager()
        goes_on = served is not None and served.serve(batch)
        if goes_on:
            del served
            wake.wait()
    batch.close()
    if served is not None:
        served.background_thread_status.mark_as_stopped()


def _adapters_of(model: weakref.ref[Any]) -> AdapterUse | None:
    """Return the adapters that are active in a model now."""
    used = model()
    return None if used is None else used._use_adapters(None, 1)  # noqa: SLF001 - within the room
