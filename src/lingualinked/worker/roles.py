"""Whether a message comes from the party whose role it is, as the caller has given the roles out.

Knows stages, moves and peers by name; neither what a message is for nor how it is served.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from lingualinked.device import CALLER
from lingualinked.errors import ProtocolError
from lingualinked.protocol.base import Message
from lingualinked.protocol.roles import TO_WORKER, Role
from lingualinked.worker.lender import Lender
from lingualinked.worker.mover import Mover
from lingualinked.worker.peers import Peers
from lingualinked.worker.probe import LinkProbes
from lingualinked.worker.stages import HostedStages


class StaleMessageError(ProtocolError):
    """A message about what is not here, or not any more: it may have been on its way when that went."""


class Roles:
    """Who is what to one worker now.

    Parameters
    ----------
    peers : Peers
        Whom the caller has introduced.
    stages : HostedStages
        What is hosted, between whom; and who was asked for weights.
    mover : Mover
        Which moves have been announced, and to whom KV is sent.
    lender : Lender
        To whom weights are lent.
    probes : LinkProbes
        Who was sent a ``Ping``.
    """

    def __init__(self, peers: Peers, stages: HostedStages, mover: Mover, lender: Lender, probes: LinkProbes) -> None:
        self._peers = peers
        self._who: Mapping[Role, Callable[[Any], Collection[str]]] = {
            Role.PREVIOUS: lambda message: stages.sources(message.model, message.plan_version, message.stage),
            Role.KV_SOURCE: mover.sources,
            Role.KV_TARGET: lambda message: mover.targets(message.request),
            Role.BORROWER: lambda message: lender.borrowers(message.model),
            Role.LENDER: lambda message: stages.lenders(message.request),
            Role.PROBED: lambda message: probes.targets,
        }

    def check(self, message: Message, sender: str) -> None:
        """Refuse a message that is not its sender's to send.

        Raises
        ------
        StaleMessageError
            If it is nobody's.
        ProtocolError
            If it is another's, or the message is not for a worker at all.
        """
        role = TO_WORKER.get(type(message))
        if role is None:
            raise ProtocolError(f"{type(message).__name__} is not for a worker")
        if sender == CALLER and role in (Role.CALLER, Role.WORKER, Role.PREVIOUS):
            return
        if role is Role.WORKER and sender in self._peers:
            return
        who = self._who[role](message) if role in self._who else (CALLER,)
        if sender not in who:
            refusal = ProtocolError if who else StaleMessageError
            raise refusal(f"{type(message).__name__} from {sender!r}, and it is for {role.value} to say")
