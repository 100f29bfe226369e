"""What comes back of a packed step: whether it can be the answer, and what it says of each session.

Knows shapes and numbers; neither messages' ways nor sessions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from lingualinked.cluster.messaging.failures import error_of
from lingualinked.errors import LingualinkedError, ProtocolError, WorkerError
from lingualinked.protocol.packed import PackedDone, PackedStep, PackedText
from lingualinked.quantities import count_text


@dataclasses.dataclass(frozen=True, slots=True)
class PackedAnswer:
    """The last stage's answer to a packed step, its tensors, and the bytes of both."""

    done: PackedDone
    tensors: tuple[Tensor, ...]
    num_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PartReply:
    """What came back of one session's part in a packed step.

    Parameters
    ----------
    logits : Tensor or None
        Of its last tokens, ``[num_logits, vocabulary]``; ``None`` if none were asked for.
    token : int or None
        The next token; ``None`` without a choice.
    logprob : float or None
        The natural logarithm of the token's probability; ``None`` unless the choice returns it.
    error : LingualinkedError or None
        Why the part failed; the session has ended then, unless it is a KVCapacityError.
    """

    logits: Tensor | None = None
    token: int | None = None
    logprob: float | None = None
    error: LingualinkedError | None = None


def read_reply(
    step: PackedStep, answer: PackedAnswer, devices: Sequence[str], vocabulary: int | None
) -> dict[int, PartReply]:
    """Return what came back of each session; raise a WorkerError of a ProtocolError if it is not what was asked for.

    ``vocabulary`` is how many logits each token has, if that is known.
    """
    done = answer.done
    # 1) each session has run, in order, or has failed in one of the stages
    failed = {failure.session: failure for failure in done.failures}
    ran = [text for text in step.texts if text.session not in failed]
    fits = (
        tuple(text.session for text in ran) == done.sessions
        and len(failed) == len(done.failures) == len(step.texts) - len(ran)
        and failed.keys() <= {text.session for text in step.texts}
        and all(failure.stage < len(devices) for failure in done.failures)
        and len(done.timings) == len(devices)
    )
    # 2) there are as many tokens and logits as were asked for
    num_logits = sum(text.num_logits for text in ran if _returns_logits(text))
    choices = [text.choice for text in ran if text.choice is not None]
    fits = (
        fits
        and len(done.tokens) == len(choices)
        and len(done.logprobs) == sum(choice.returns_logprob for choice in choices)
        and (vocabulary is None or all(token < vocabulary for token in done.tokens))
        and len(answer.tensors) == bool(num_logits)
        and all(_are_logits(tensor, num_logits, vocabulary) for tensor in answer.tensors)
    )
    if not fits:
        shapes = [list(tensor.shape) for tensor in answer.tensors]
        error = ProtocolError(
            f"the answer to a packed step of {count_text(len(step.texts), 'session')} came for {len(done.sessions)} with "
            f"{count_text(len(failed), 'failure')}, {count_text(len(done.tokens), 'token')}, tensors {shapes} and the times of "
            f"{count_text(len(done.timings), 'stage')}, where {count_text(len(choices), 'token')}, {num_logits} logits and the times of "
            f"{len(devices)} were due"
        )
        raise WorkerError(devices[-1], f"ProtocolError: {error}") from error
    # 3) give each session its own
    replies = {
        session: PartReply(error=error_of(devices[failure.stage], failure)) for session, failure in failed.items()
    }
    tokens, logprobs, start = iter(done.tokens), iter(done.logprobs), 0
    for text in ran:
        logits = None
        if _returns_logits(text) and text.num_logits:
            logits = answer.tensors[0][start : start + text.num_logits]
            start += text.num_logits
        choice = text.choice
        replies[text.session] = PartReply(
            logits=logits,
            token=None if choice is None else next(tokens),
            logprob=next(logprobs) if choice is not None and choice.returns_logprob else None,
        )
    return replies


def _returns_logits(text: PackedText) -> bool:
    return text.choice is None or text.choice.returns_logits


def _are_logits(tensor: Tensor, num_logits: int, vocabulary: int | None) -> bool:
    return (
        tensor.is_floating_point()
        and tensor.itemsize > 1
        and tensor.ndim == 2
        and tensor.shape[0] == num_logits
        and vocabulary in (None, tensor.shape[1])
    )
