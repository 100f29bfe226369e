"""Sends the tokens that a run's steps end with: to the caller, and as next steps to the first stage.

Knows runs and where their tokens go; not how they are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lingualinked.device import CALLER
from lingualinked.protocol.messages import encode
from lingualinked.protocol.running import TokensChosen
from lingualinked.protocol.steps import StageTimes, Step
from lingualinked.transport.mailbox import Mailbox
from lingualinked.worker.messaging.joined_steps import join_steps
from lingualinked.worker.messaging.peers import Peers
from lingualinked.worker.steps.runs import Runs, TokenRun


class ChosenStep(NamedTuple):
    """A step of a run, its token of each row, int64 ``[rows]``, or its logits if none could be chosen, and the times of its stages."""

    step: Step
    run: TokenRun
    tokens: Tensor | None
    logits: Tensor
    timings: tuple[StageTimes, ...]


class TokenSender:
    """Sends what has been chosen behind steps, of which those that go on to the same stage go together."""

    def __init__(self, mailbox: Mailbox, peers: Peers, runs: Runs) -> None:
        self._mailbox = mailbox
        self._peers = peers
        self._runs = runs

    def send(self, chosen: Sequence[ChosenStep], sent_us: int) -> int:
        """Send the next steps, which leave at `sent_us`, and then the tokens to the caller; return the bytes."""
        num_bytes = 0
        # 1) the next steps
        onward: dict[str, list[tuple[Step, Tensor]]] = {}
        going = set()
        for each in chosen:
            if each.tokens is not None and each.run.num_left > 0:
                going.add(each.step.session)
                step = each.run.next_step(each.step, self._mailbox.name, sent_us)
                onward.setdefault(each.run.first_name, []).append((step, each.tokens[:, None]))
            else:
                self._runs.drop(each.step.model, each.step.session)
        for name, steps in onward.items():
            joined, tensor = join_steps(steps)
            num_bytes += self._peers.send(name, joined, (tensor,))
        # 2) the tokens
        for step, _, tokens, logits, timings in chosen:
            message = TokensChosen(
                model=step.model,
                session=step.session,
                number=step.number,
                timings=timings,
                tokens=() if tokens is None else tuple(tokens.tolist()),
                goes_on=step.session in going,
            )
            num_bytes += self._mailbox.send(CALLER, encode(message), () if tokens is not None else (logits,))
        return num_bytes
