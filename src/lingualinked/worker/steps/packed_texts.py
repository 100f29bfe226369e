"""The sessions of a packed step on one stage: which of them can run, and what their state is afterwards.

Knows a stage's sessions and their parts in the step; neither sockets nor other stages.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lingualinked.errors import ProtocolError, UnsupportedOperationError
from lingualinked.model.context import ContextCode, MaskMode, PositionMode
from lingualinked.model.kv.kv_cache import StageCache
from lingualinked.model.packed.choosing import check_choice
from lingualinked.model.packed.packed_pass import PassInputs, TextPart
from lingualinked.model.stages.layer_skips import NO_SKIPS
from lingualinked.protocol.packed import PackedFailure, PackedStep, PackedText
from lingualinked.quantities import count_text
from lingualinked.worker.messaging.error_report import describe_error
from lingualinked.worker.stages.hosted_session import HostedSession, edit_kv, reorder_rows
from lingualinked.worker.stages.hosted_stage import HostedStage

_PLAIN = ContextCode(mask=MaskMode.NONE, positions=PositionMode.NONE, position_rows=0, tensors=())


def check_packed(step: PackedStep, tensors: tuple[Tensor, ...]) -> None:
    """Raise ProtocolError unless a packed step has one part for each session, and one row with the tokens of all."""
    sessions = [text.session for text in step.texts]
    if len({*sessions, *(failure.session for failure in step.failures)}) != len(sessions) + len(step.failures):
        raise ProtocolError("a session has several parts in one packed step")
    num_tokens = sum(text.num_new for text in step.texts)
    shapes = [list(tensor.shape) for tensor in tensors[:9]]
    if not sessions and not tensors:
        return
    if not sessions or len(tensors) != 1 or tensors[0].ndim < 2 or list(tensors[0].shape[:2]) != [1, num_tokens]:
        raise ProtocolError(
            f"a packed step of {count_text(len(sessions), 'session')} with {count_text(num_tokens, 'token')} arrived with the "
            f"tensors {shapes}"
        )
    for text in step.texts:
        least = 0 if text.choice is None else 1
        if not least <= text.num_logits <= text.num_new:
            raise ProtocolError(f"{text.num_logits} logits were asked for of {count_text(text.num_new, 'token')}")
        if text.choice is not None:
            check_choice(text.choice)


class PackedTexts:
    """The texts of a packed step that one stage runs, and why it does not run the others."""

    def __init__(self, hosted: HostedStage, step: PackedStep) -> None:
        self._stage = hosted.packed
        self.texts: list[PackedText] = []
        self.failures: list[PackedFailure] = []
        self._hosted = hosted
        self._step = step
        self._sessions: list[HostedSession] = []
        self._caches: list[StageCache] = []
        self._kept: list[tuple[int, int]] = []  # places of their tokens among those of all
        self._num_held: int | None = None  # row-tokens of all sessions, counted once and not for each text
        start = 0
        for text in step.texts:
            self._add(text, start)
            start += text.num_new

    def _add(self, text: PackedText, start: int) -> None:
        try:
            session = self._hosted.find_session(text.session, text.number, 1, text.max_cache_len)
            try:
                cache = self._prepare(session, text)
            except BaseException:
                self._hosted.end_session(text.session)
                self._num_held = None
                raise
        except Exception as error:  # noqa: BLE001 - the caller raises it for this text
            report = describe_error(error)
            self.failures.append(PackedFailure(session=text.session, stage=self._step.stage, **report))
            return
        self.texts.append(text)
        self._sessions.append(session)
        self._caches.append(cache)
        self._kept.append((start, start + text.num_new))

    def _prepare(self, session: HostedSession, text: PackedText) -> StageCache:
        """Edit a session's KV, and check that it has room for the new tokens."""
        cache = session.cache
        session.runner, session.run_steps = "", 0
        if cache is None:
            raise ProtocolError("a session in a packed step keeps KV")
        if session.instruments is not None:
            raise UnsupportedOperationError("a session with instruments can't be part of a packed step")
        if session.context.mask is not None and not bool(session.context.mask.all()):
            raise ProtocolError("a session in a packed step has no padding")
        edit_kv(text.edits, session, cache)
        reorder_rows(text.edits, session, cache, 1)
        if cache.num_rows > 1:
            raise ProtocolError(
                f"a session in a packed step has {count_text(cache.num_rows, 'row')}, and must have one"
            )
        num_tokens = cache.max_cache_len or session.context.num_tokens + text.num_new
        self._num_held = self._hosted.check_budget(session, 1, num_tokens, self._num_held)
        cache.check_room(text.num_new)
        return cache

    def run(self, states: Tensor) -> tuple[Tensor, tuple[bool, ...] | None]:
        """Run the stage over the texts' tokens; return its output for them, and its layout. All end if it raises."""
        step = self._step
        try:
            if self.failures:
                states = states[:, [place for start, stop in self._kept for place in range(start, stop)]]
            parts = [TextPart(cache, text.num_new, text.num_logits) for text, cache in self._pairs()]
            output = self._stage.run(
                PassInputs(
                    states=states,
                    parts=parts,
                    layout=step.layout,
                    torch_settings=dict(step.torch_settings),
                    skips=step.skips or NO_SKIPS,
                    adapters=step.adapters,
                    least_rows=step.least_rows,
                    is_invariant=step.is_invariant,
                ),
            )
        except BaseException:
            for text in self.texts:
                self._hosted.end_session(text.session)
            raise
        for text, session in zip(self.texts, self._sessions, strict=True):
            session.context.decode(_PLAIN, text.num_new)
        return output.tensors[0], output.layout

    @property
    def lengths(self) -> list[int]:
        """The numbers of tokens of the texts."""
        return [session.context.num_tokens for session in self._sessions]

    def _pairs(self) -> Iterator[tuple[PackedText, StageCache]]:
        return zip(self.texts, self._caches, strict=True)
