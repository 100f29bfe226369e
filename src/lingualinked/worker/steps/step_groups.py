"""Steps of several sessions that one stage runs in one pass, with the bits that each has alone.

Knows a stage's sessions and their steps; neither sockets nor other stages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lingualinked.model.context import ContextCode, MaskMode, PositionMode
from lingualinked.model.kv.kv_cache import StageCache
from lingualinked.model.kv.kv_layers import GrowingLayer
from lingualinked.model.packed.packed_pass import PassInputs, TextPart
from lingualinked.model.stages.stage_data import StageOutput
from lingualinked.protocol.steps import Step
from lingualinked.worker.stages.hosted_session import HostedSession
from lingualinked.worker.stages.hosted_stage import HostedStage

_NO_MASK = ContextCode(mask=MaskMode.NONE, positions=PositionMode.NONE, position_rows=0, tensors=())


def may_join(hosted: HostedStage, step: Step, tensors: tuple[Tensor, ...]) -> bool:
    """Return whether a step can run together with others: the next one of a run, for one token of a text without padding."""
    session = hosted.sessions.get(step.session)
    return (
        bool(step.runner)
        and session is not None
        and session.number == step.number > 0
        and not hosted.stage.adapters
        and _is_plain(step)
        and _are_plain(hosted, tensors)
        and _has_one_text(session, step)
        and hosted.most_together > 1  # last: it takes half a second to find out
    )


def _is_plain(step: Step) -> bool:
    """Return whether a step does nothing but compute, and choose a token at the end."""
    return (
        step.keeps_kv
        and step.logits_to_keep == 1
        and step.wants_logits
        and step.mask is not MaskMode.FULL
        and step.positions not in (PositionMode.FULL, PositionMode.NEXT)
        and step.position_rows in (0, 1)
        and not step.rope_reach
        and all(
            each is None
            for each in (
                step.requires_grad,
                step.instruments,
                step.adapters,
                step.skips,
                step.strides,
                step.extras,
                step.shape,
            )
        )
        and not (step.edits or step.torch_settings or step.records or step.hooks or step.captures)
    )


def _are_plain(hosted: HostedStage, tensors: tuple[Tensor, ...]) -> bool:
    """Return whether the tensors of a step are one token's id, or hidden state."""
    if len(tensors) != 1:
        return False
    config = hosted.stage.span.model.config
    if hosted.stage.is_first:  # an id that the vocabulary lacks would fail them all
        is_one_id = tensors[0].dtype is torch.long and tensors[0].shape == (1, 1)
        return is_one_id and 0 <= int(tensors[0]) < config.get_text_config().vocab_size
    return tensors[0].dtype is config.dtype and tensors[0].shape == (1, 1, config.get_text_config().hidden_size)


def _has_one_text(session: HostedSession, step: Step) -> bool:
    """Return whether a session has one row, no padding, growing KV of all its tokens, and nothing else that a step has to regard."""
    cache, context = session.cache, session.context
    return (
        cache is not None
        and cache.num_rows == 1
        and session.instruments is None
        and cache.is_plain
        and all(type(layer) is GrowingLayer for layer in cache.owned.values())
        and context.num_tokens == cache.num_tokens
        and (step.mask is MaskMode.NONE or (context.mask is not None and bool(context.mask.all())))
    )


class GroupedSteps:
    """The steps of a group that a stage runs; `prepare` one after the other, then `run`."""

    def __init__(self, hosted: HostedStage) -> None:
        self.steps: list[Step] = []
        self._hosted = hosted
        self._sessions: list[tuple[HostedSession, StageCache]] = []
        self._inputs: list[Tensor] = []
        self._layout: tuple[bool, ...] | None = None

    def prepare(self, step: Step, tensors: tuple[Tensor, ...]) -> None:
        """Add a step that may join; free its session and raise if it exceeds the budget of all sessions."""
        session = self._hosted.find_session(step.session, step.number, 1, 0)
        session.runner, session.run_steps = step.runner, step.run_steps
        try:
            assert session.cache is not None
            self._hosted.check_budget(session, 1, session.context.num_tokens + 1)
        except BaseException:
            self._hosted.end_session(step.session)
            raise
        self.steps.append(step)
        self._sessions.append((session, session.cache))
        self._inputs.append(tensors[0])
        self._layout = step.layout

    def run(self) -> StageOutput:
        """Run the steps; return an output with one row that has a token, or its logits, for each. All sessions end if it raises."""
        try:
            output = self._hosted.packed.run(
                PassInputs(
                    states=torch.cat(self._inputs, dim=1),
                    parts=[TextPart(cache, 1) for _, cache in self._sessions],
                    layout=self._layout,
                    least_rows=1,
                    is_alone=True,
                )
            )
        except BaseException:
            for step in self.steps:
                self._hosted.end_session(step.session)
            raise
        for step, (session, _) in zip(self.steps, self._sessions, strict=True):
            if step.mask is MaskMode.EXTEND:
                session.context.extend(1, step.positions)
            else:
                session.context.decode(_NO_MASK, 1)
        return output
