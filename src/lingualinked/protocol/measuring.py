"""The messages with which the caller measures a model's parts on a worker, and the links between parties.

Knows neither who sends them nor over what.
"""

from __future__ import annotations

from lingualinked.model.spec import ModelSpec
from lingualinked.module_times import ModuleTimes
from lingualinked.protocol.base import Message
from lingualinked.rounding import Rounding


class MeasuredShape(Message, frozen=True):
    """The shape of a step: rows of the batch, new tokens per row, and tokens per row that the KV cache already holds."""

    rows: int
    tokens: int
    context: int


class MeasureModel(Message, frozen=True, tag=7):
    """Time the parts of a model by running spans of one or two layers, more where the model forbids cuts, with arbitrary weights.

    Steps of a shape are repeated ``num_prefills`` or ``num_decodes`` times after a first one that includes one-time costs: more
    often while their times spread, less often if they are long. No text grows beyond ``max_positions``.
    """

    request: int
    spec: ModelSpec
    spans: tuple[tuple[int, int], ...]
    kind_of_layer: tuple[int, ...]
    shapes: tuple[MeasuredShape, ...]
    num_prefills: int
    num_decodes: int
    max_positions: int | None


class ModelMeasured(Message, frozen=True, tag=26):
    """Answer to `MeasureModel`: the times of each kind of layer in the spans, and of the other parts if they were there.

    ``rounding`` is how the worker rounds in the model's dtype. ``watts`` is the mean power meanwhile; ``power_source`` says what measured it, or why it is ``None``.
    """

    request: int
    hardware: str
    free_bytes: int
    layers: dict[int, ModuleTimes]
    stage: ModuleTimes | None
    prologue: ModuleTimes | None
    epilogue: ModuleTimes | None
    watts: float | None
    power_source: str
    rounding: Rounding


class ProbeLink(Message, frozen=True, tag=8):
    """Measure the link to another party: send it ``Ping`` messages with these numbers of bytes, one after another."""

    request: int
    target: str
    sizes: tuple[int, ...]


class LinkProbed(Message, frozen=True, tag=27):
    """Answer to `ProbeLink`: the seconds from each ``Ping`` to its ``Pong``, in the order of the sizes."""

    request: int
    seconds: tuple[float, ...]


class PingWorker(Message, frozen=True, tag=70):
    """Acknowledge this at once: the caller times how long it travels, with the tensor that comes with it."""

    request: int


class Ping(Message, frozen=True, tag=9):
    """Request for an immediate ``Pong``."""

    number: int


class Pong(Message, frozen=True, tag=10):
    """Answer to a ``Ping``."""

    number: int
