"""One stage in service: its sessions, and the step that runs on it.

Knows the stage and its sessions' state; neither sockets nor other stages.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lingualinked.errors import ProtocolError
from lingualinked.model.context import ContextCode, MaskMode, PositionMode, StepContext
from lingualinked.model.kv_cache import StageCache
from lingualinked.model.stage import Stage, StageInputs, StageOutput
from lingualinked.protocol.messages import KVEdit, KVEditKind, LoadStage, StageReport, Step
from lingualinked.worker.pace import Pace


@dataclasses.dataclass(slots=True)
class _Session:
    cache: StageCache | None
    context: StepContext
    next_number: int = 0


class HostedStage:
    """A loaded stage with the sessions that hold KV in it.

    Parameters
    ----------
    request : LoadStage
        The message that asked for it.
    stage : Stage
        The loaded stage.
    """

    def __init__(self, request: LoadStage, stage: Stage) -> None:
        self.next_name = request.next_name
        self.stage = stage
        self.sent_bytes = 0
        self._request = request
        self._sessions: dict[int, _Session] = {}
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
            Seconds of compute, on the device that the worker may imitate.

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

    def end(self, session: int) -> None:
        """Free a session's KV; does nothing if it has none."""
        self._sessions.pop(session, None)

    def report(self) -> StageReport:
        """Describe the stage and what it has done."""
        caches = [session.cache for session in self._sessions.values()]
        return StageReport(
            model=self._request.model,
            stage=self._request.stage,
            start=self.stage.start,
            end=self.stage.end,
            weight_bytes=self.stage.weight_bytes,
            kv_bytes=sum(cache.nbytes for cache in caches if cache is not None),
            num_sessions=len(self._sessions),
            num_steps=self._num_steps,
            compute_us=round(self._compute_s * 1e6),
            sent_bytes=self.sent_bytes,
        )

    def _session(self, step: Step) -> _Session:
        session = self._sessions.get(step.session)
        if session is None:
            if step.number != 0:
                raise ProtocolError(f"step {step.number} of session {step.session}, which has no state here")
            cache = self.stage.new_cache() if step.keeps_kv else None
            session = self._sessions[step.session] = _Session(cache, StepContext())
        elif step.number != session.next_number:
            raise ProtocolError(f"step {step.number} of session {step.session} where {session.next_number} is due")
        session.next_number += 1
        return session

    def _compute(self, session: _Session, step: Step, tensors: tuple[Tensor, ...]) -> StageOutput:
        for edit in step.edits:
            _apply(edit, session)
        parts = split_tensors(step, tensors)
        num_new = parts.inputs[0].shape[1]
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
        If there are fewer than the step announces, or the inputs have no rows and tokens.
    """
    num_told = (step.mask is MaskMode.FULL) + (step.positions is PositionMode.FULL)
    num_keep = int(step.logits_to_keep is None)
    num_inputs = len(tensors) - num_told - num_keep
    if num_inputs < 1 or tensors[0].ndim < 2:
        raise ProtocolError(
            f"a step came with {len(tensors)} tensors, {num_told + num_keep} of them announced beside its inputs"
        )
    return StepTensors(
        tensors[:num_inputs], tensors[num_inputs : num_inputs + num_told], tensors[num_inputs + num_told :]
    )


def _apply(edit: KVEdit, session: _Session) -> None:
    cache = session.cache
    if cache is None:
        raise ProtocolError("a step edits the KV of a session that keeps none")
    if edit.kind is KVEditKind.REORDER:
        rows = torch.tensor(edit.values, dtype=torch.long)
        cache.reorder(rows)
        session.context.reorder(rows)
    elif edit.kind is KVEditKind.CROP:
        (num_tokens,) = edit.values
        cache.crop(-num_tokens)
        session.context.crop(num_tokens)
    else:
        (on,) = edit.values
        cache.record_past(bool(on))
