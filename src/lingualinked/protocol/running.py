"""The messages of a run: steps of one token that follow each other through the stages, without the caller in between.

Knows what the last stage is told of a run and what it says of each step; not how tokens are chosen.
"""

from __future__ import annotations

from lingualinked.model.context import MaskMode, PositionMode
from lingualinked.model.sampling.processor_data import BatchRows, ProcessorSpec
from lingualinked.protocol.base import Message, Natural
from lingualinked.protocol.steps import StageTimes


class BeginRun(Message, frozen=True, tag=71):
    """Choose the tokens of a session's steps on the last stage, from step ``number`` on, which the caller sends.

    Each choice is sent to the caller (`TokensChosen`) and, as the next step, to the first stage, on ``first_name``: until
    ``num_steps`` steps have run, all rows have met one of ``eos_token_ids``, or the caller ends the run (`EndRun`). Later steps encode their
    mask and positions as ``mask``, ``positions`` and ``position_rows`` say. Rows that are not ``unfinished`` get ``pad_token_id``.
    Its tensors are, in order: the ids so far, int64 ``[rows, tokens]``, if there are ``processors``; and the state of the random
    number generator, uint8, if tokens are sampled. ``rows`` says which they are of a batch that is sampled as one.
    """

    model: int
    plan_version: int
    session: int
    number: int
    num_steps: Natural
    first_name: str
    processors: tuple[ProcessorSpec, ...]
    samples: bool
    rows: BatchRows | None
    unfinished: tuple[bool, ...]
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    mask: MaskMode
    positions: PositionMode
    position_rows: Natural


class TokensChosen(Message, frozen=True, tag=72):
    """The tokens that follow a step of a run, one for each row, and whether the next step is under way.

    If none could be chosen, there are none, and the logits are beside the message.
    """

    model: int
    session: int
    number: int
    timings: tuple[StageTimes, ...]
    tokens: tuple[Natural, ...]
    goes_on: bool


class EndRun(Message, frozen=True, tag=73):
    """Begin no further step of a session's run: the step under way is the last one."""

    model: int
    session: int
    number: int  # of the run's first step


RunMessage = BeginRun | EndRun
"""What the caller says of a run."""
