"""The transmission map of a plan: which tensors each stage consumes, from which stage they come, and how many bytes they are.

Knows plans and a model's shortcuts; no process and no seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lingualinked.planning.planned_stage import PlannedStage
from lingualinked.shown import Shown
from lingualinked.transmission import ID_BYTES, INPUT_IDS, Transmission

HIDDEN_STATES = "hidden states"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Consumed:
    """A tensor that a stage consumes.

    Parameters
    ----------
    name : str
        ``"input_ids"``, ``"hidden states"``, the path of a part, or ``"layer 3"`` for that layer's hidden output.
    source : int or None
        Index of the stage that sends it; ``None``: the caller.
    token_bytes : int
        Bytes per row and token.
    """

    name: str
    source: int | None
    token_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MappedStage:
    """One stage, and what it consumes.

    Parameters
    ----------
    device : str
        Name of its device.
    start, end : int
        Its half-open layer range.
    consumed : tuple of Consumed
        What is sent to it in every step.
    """

    device: str
    start: int
    end: int
    consumed: tuple[Consumed, ...]

    @property
    def token_bytes(self) -> int:
        """Bytes per row and token of all that is sent to it."""
        return sum(each.token_bytes for each in self.consumed)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TransmissionMap(Shown):
    """What crosses the boundaries between a plan's stages: shows itself as a table.

    Parameters
    ----------
    stages : tuple of MappedStage
        In pipeline order.
    forbidden_cuts : tuple of int
        Layers that must lie in the same stage as the layer before them.
    held : tuple of str
        Paths of the parts that every stage holds.
    """

    stages: tuple[MappedStage, ...]
    forbidden_cuts: tuple[int, ...] = ()
    held: tuple[str, ...] = ()


def map_transmission(stages: Sequence[PlannedStage], transmission: Transmission, hidden_bytes: int) -> TransmissionMap:
    """Map what each stage of a plan consumes, hidden states of so many bytes per row and token included."""
    mapped = []
    for index, (stage, shortcuts) in enumerate(zip(stages, consumed_by(stages, transmission), strict=True)):
        first = Consumed(name=INPUT_IDS, source=None, token_bytes=ID_BYTES)
        hidden = Consumed(name=HIDDEN_STATES, source=index - 1, token_bytes=hidden_bytes)
        mapped.append(
            MappedStage(
                device=stage.device,
                start=stage.start,
                end=stage.end,
                consumed=(first,) if index == 0 else (hidden, *shortcuts),
            )
        )
    return TransmissionMap(stages=tuple(mapped), forbidden_cuts=transmission.forbidden_cuts, held=transmission.held)


def consumed_by(stages: Sequence[PlannedStage], transmission: Transmission) -> list[tuple[Consumed, ...]]:
    """Return what each stage of a plan gets beside hidden states, from which other stage."""
    num_layers = stages[-1].end
    found = []
    for stage in stages:
        consumed = [
            Consumed(name=shortcut.name, source=_index_of(stages, shortcut.made_at), token_bytes=shortcut.token_bytes)
            for shortcut in transmission.shortcuts
            if shortcut.is_sent_to(stage.start, stage.end, num_layers)
        ]
        found.append(tuple(consumed))
    return found


def _index_of(stages: Sequence[PlannedStage], layer: int) -> int:
    return next(index for index, stage in enumerate(stages) if stage.start <= layer < stage.end)
