"""A session: one conversation whose KV lies in every stage.

Knows steps and edits of KV; neither generation modes nor what made the tokens.
"""

from __future__ import annotations

import threading
import weakref
from typing import cast

import torch
from torch import Tensor

from lingualinked.cluster.engine import Engine
from lingualinked.cluster.exchange import StepReply
from lingualinked.errors import ArgumentError, ClosedError, KVCapacityError
from lingualinked.model.context import StepContext
from lingualinked.protocol.messages import EndSession, KVEdit, KVEditKind, Step


class KVBudget:
    """Rows x tokens of KV that all sessions of a model may hold together.

    Parameters
    ----------
    max_tokens : int or None
        The limit; ``None``: none.
    """

    def __init__(self, max_tokens: int | None) -> None:
        self._max_tokens = max_tokens
        self._held: dict[int, int] = {}
        self._lock = threading.RLock()  # a finalizer releases, and may run in the middle of a hold

    def hold(self, session: int, num_tokens: int) -> None:
        """Let a session hold so many row-tokens in all.

        Raises
        ------
        KVCapacityError
            If the limit would be passed; nothing changes then.
        """
        if self._max_tokens is None:
            return
        with self._lock:
            others = sum(self._held.values()) - self._held.get(session, 0)
            if others + num_tokens > self._max_tokens:
                raise KVCapacityError(
                    f"{num_tokens} tokens of KV for this session and {others} of others pass "
                    f"max_kv_tokens={self._max_tokens}: end other sessions, shorten the text, or raise it"
                )
            self._held[session] = num_tokens

    def release(self, session: int) -> None:
        """Give back what a session holds."""
        with self._lock:
            self._held.pop(session, None)


class Session:
    """One conversation through all stages; used by one thread at a time.

    Parameters
    ----------
    engine : Engine
        Sends its steps.
    model, number : int
        Who it is.
    devices : tuple of str
        Devices of all stages, in pipeline order.
    budget : KVBudget
        What its KV counts against.
    timeout_s : float
        Seconds that a step may take.
    """

    def __init__(
        self, engine: Engine, model: int, number: int, devices: tuple[str, ...], budget: KVBudget, timeout_s: float
    ) -> None:
        self.num_rows = 0
        self.num_tokens = 0
        self.timings_us: tuple[int, ...] = ()
        self._engine = engine
        self._model = model
        self._number = number
        self._devices = devices
        self._budget = budget
        self._timeout_s = timeout_s
        self._context = StepContext()
        self._edits: list[KVEdit] = []
        self._next_step = 0
        self._running = threading.Lock()
        self._broken_by = ""
        self._finalizer = weakref.finalize(self, _end, engine, model, number, devices[0], budget)
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
        *,
        keeps_kv: bool = True,
    ) -> Tensor:
        """Run one step through all stages.

        Parameters
        ----------
        inputs : Tensor
            Token ids, int64 ``[rows, tokens]``, or embeddings, ``[rows, tokens, hidden]``.
        attention_mask : Tensor or None
            int64 ``[rows, past + tokens]``.
        position_ids : Tensor or None
            int64 ``[1 or rows, tokens]``.
        logits_to_keep : int or Tensor
            As in transformers: 0 for all positions, N for the last N, or indices.
        keeps_kv : bool
            Whether later steps follow.

        Returns
        -------
        Tensor
            Logits, ``[rows, kept tokens, vocabulary]``.

        Raises
        ------
        ClosedError
            If the session has ended or broken off.
        KVCapacityError
            If the KV budget would be passed; the session goes on as it was.
        WorkerError, DeviceMemoryError, WorkerDiedError, StepTimeoutError
            If a worker raised, ended, or did not answer; the session has ended then.
        """
        if not self._running.acquire(blocking=False):
            raise ArgumentError("past_key_values is in use by another thread: a session runs one step at a time")
        try:
            return self._step(inputs, attention_mask, position_ids, logits_to_keep, keeps_kv)
        finally:
            self._running.release()

    def reorder(self, rows: Tensor) -> None:
        """Keep the KV rows ``rows`` (int64 ``[new rows]``); reaches the stages with the next step."""
        values = tuple(int(row) for row in rows.tolist())
        self._edits.append(KVEdit(kind=KVEditKind.REORDER, values=values))
        self._context.reorder(torch.tensor(values, dtype=torch.long))
        self.num_rows = len(values)

    def crop(self, num_tokens: int) -> None:
        """Forget the last ``num_tokens`` tokens; 0 still drops what sliding layers kept for a crop."""
        self._edits.append(KVEdit(kind=KVEditKind.CROP, values=(num_tokens,)))
        self._context.crop(num_tokens)
        self.num_tokens -= num_tokens

    def record_past(self, on: bool) -> None:
        """Have sliding layers keep what a later crop may need, or no longer."""
        self._edits.append(KVEdit(kind=KVEditKind.RECORD, values=(int(on),)))

    def end(self) -> None:
        """Free the session's KV in every stage."""
        self._finalizer()

    def _step(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        logits_to_keep: int | Tensor,
        keeps_kv: bool,
    ) -> Tensor:
        if self.ended:
            raise ClosedError(f"this session has ended{self._broken_by}: start anew with past_key_values=None")
        num_rows, num_new = inputs.shape[:2]
        if keeps_kv:
            self._budget.hold(self._number, num_rows * (self.num_tokens + num_new))
        code = self._context.encode(attention_mask, position_ids, num_new)
        keep = (logits_to_keep,) if isinstance(logits_to_keep, Tensor) else ()
        step = Step(
            model=self._model,
            stage=0,
            session=self._number,
            number=self._next_step,
            keeps_kv=keeps_kv,
            layout=None,
            mask=code.mask,
            positions=code.positions,
            position_rows=code.position_rows,
            logits_to_keep=None if isinstance(logits_to_keep, Tensor) else logits_to_keep,
            edits=tuple(self._edits),
            timings_us=(),
        )
        self._edits.clear()
        self._next_step += 1
        try:
            # Neither the future nor the error is kept: each would lead back here, and only the collector would free it.
            tensors = (inputs, *code.tensors, *keep)
            reply = cast("StepReply", self._engine.step(self._devices, step, tensors, self._timeout_s).result())
        except BaseException as error:  # also an interrupt: what the stages hold is no longer known
            self._broken_by = f" with {type(error).__name__}"
            self.end()
            raise
        self.num_rows = num_rows
        self.num_tokens += num_new
        self.timings_us = reply.timings_us
        return reply.tensors[0]


def _end(engine: Engine, model: int, number: int, first_device: str, budget: KVBudget) -> None:
    budget.release(number)
    engine.end_session(first_device, EndSession(model=model, stage=0, session=number))
