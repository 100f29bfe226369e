"""Which awaited answer a worker's message belongs to, and whether its sender may give it.

Knows messages, roles and what is pending; neither mailboxes nor what an answer says.
"""

from __future__ import annotations

from lingualinked.cluster.messaging.pending import Key, Pending, PendingAnswers
from lingualinked.errors import ProtocolError
from lingualinked.protocol.failures import RequestFailed, StepFailed
from lingualinked.protocol.hooking import HookReached
from lingualinked.protocol.messages import AnyMessage, Progress, StageLoaded
from lingualinked.protocol.moving import KVCopied
from lingualinked.protocol.packed import PackedDone, PackedFailed
from lingualinked.protocol.roles import TO_CALLER, Role
from lingualinked.protocol.running import TokensChosen
from lingualinked.protocol.steps import StepDone, StepRecorded
from lingualinked.protocol.weights import FetchPart


def answer_key(message: AnyMessage) -> Key:
    """Return the key of the pending answer that a message completes, fails, or reports progress of."""
    if isinstance(message, StepDone | StepFailed | StepRecorded | HookReached):
        return "step", message.session, message.number
    if isinstance(message, TokensChosen):
        return "run", message.session, 0
    if isinstance(message, PackedDone | PackedFailed):
        return "packed", message.number, 0
    if isinstance(message, FetchPart):
        return "request", message.load, 0
    return "request", message.request, 0  # type: ignore[union-attr]


def pending_key(message: AnyMessage, pending: PendingAnswers) -> Key:
    """Return the key of the pending answer that a message is about: the run's, if the failed step is one of a run."""
    key = answer_key(message)
    return ("run", message.session, 0) if isinstance(message, StepFailed) and pending.find(key) is None else key


def find_role(message: AnyMessage) -> Role:
    """Return the role that a message to the caller requires; raise ProtocolError if it is none."""
    role = TO_CALLER.get(type(message))
    if role is None:
        raise ProtocolError(f"{type(message).__name__} is not for the caller")
    return role


def check_answer(message: AnyMessage, sender: str, role: Role, pending: Pending) -> None:
    """Refuse a message that its sender may not send, or that does not answer what was asked."""
    if role is Role.ASKED:
        fits = sender == pending.asked and isinstance(message, pending.answer | RequestFailed | Progress)
    elif role is Role.FILE_BORROWER:
        fits = sender == pending.asked and pending.answer is StageLoaded
    else:
        senders = {pending.asked} if role is Role.LAST_STAGE else pending.devices
        answers: tuple[type, ...] = (StepDone, TokensChosen)
        if role is Role.KV_ENDS:
            answers = (KVCopied,)
        elif isinstance(message, PackedDone | PackedFailed):
            answers = (PackedDone,)
        fits = sender in senders and pending.answer in answers and message.model == pending.model  # type: ignore[union-attr]
        if isinstance(message, StepRecorded):
            fits = fits and pending.awaits_part(message.stage, sender)
        if isinstance(message, HookReached):
            fits = fits and pending.takes_hooks and pending.held_answer is None
        if pending.paused_at and isinstance(message, StepDone | HookReached):
            fits = False  # the step waits for this process; what stages before that one recorded may still arrive
    if not fits:
        raise ProtocolError(f"{type(message).__name__} from {sender!r}, and it is for {role.value} to say")
