"""Checks that the sender of a message has the role that the message requires.

Knows stages, moves and peers by name; neither what a message is for nor how it is handled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from lingualinked.device import CALLER
from lingualinked.errors import ProtocolError
from lingualinked.protocol.base import Message
from lingualinked.protocol.roles import TO_WORKER, Role
from lingualinked.worker.kv.announced_moves import AnnouncedMoves
from lingualinked.worker.kv.kv_mover import KVMover
from lingualinked.worker.measuring.probe import LinkProbes
from lingualinked.worker.messaging.peers import Peers
from lingualinked.worker.stages.hosted_stages import HostedStages
from lingualinked.worker.weights.file_exchange import FileExchange


class StaleMessageError(ProtocolError):
    """A message about something that is no longer here: it may have been in flight when that was freed."""


class SenderCheck:
    """The roles that parties have towards one worker at the moment, as the other objects of the worker know them."""

    def __init__(
        self,
        peers: Peers,
        stages: HostedStages,
        mover: KVMover,
        moves: AnnouncedMoves,
        probes: LinkProbes,
        files: FileExchange,
    ) -> None:
        self._peers = peers
        self._parties: Mapping[Role, Callable[[Any], Collection[str]]] = {
            Role.PREVIOUS: stages.step_senders,
            Role.EARLIER: stages.shortcut_senders,
            Role.KV_SOURCE: mover.kv_senders,
            Role.KV_TARGET: lambda message: mover.kv_targets(message.request),
            Role.BORROWER: lambda message: moves.borrowers(message.model),
            Role.LENDER: lambda message: stages.lenders(message.request),
            Role.FILE_BORROWER: lambda message: files.borrowers(message.load),
            Role.FILE_SOURCE: lambda message: files.sources(message.load),
            Role.PROBED: lambda message: probes.targets,
        }

    def check_sender(self, message: Message, sender: str) -> None:
        """Raise ProtocolError unless the sender may send this message.

        The error is a StaleMessageError if at the moment no party has the role that the message requires.
        """
        role = TO_WORKER.get(type(message))
        if role is None:
            raise ProtocolError(f"{type(message).__name__} is not a message to a worker")
        if sender == CALLER and role in (Role.CALLER, Role.WORKER, Role.PREVIOUS):
            return
        if role is Role.WORKER and sender in self._peers:
            return
        parties = self._parties[role](message) if role in self._parties else (CALLER,)
        if sender not in parties:
            refusal = ProtocolError if parties else StaleMessageError
            raise refusal(f"{type(message).__name__} from {sender!r} is refused: only {role.value} may send it")
