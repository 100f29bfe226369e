"""The messages that measure: what a model's parts cost on a worker, and what the links between parties carry.

Knows neither who sends them nor over what.
"""

from __future__ import annotations

from lingualinked.model.spec import ModelSpec
from lingualinked.protocol.base import Message


class StepShape(Message, frozen=True):
    """Rows of the batch, new tokens of each, and tokens of each that are in the KV cache already."""

    rows: int
    tokens: int
    context: int


class MeasureModel(Message, frozen=True, tag=7):
    """Measure what the parts of a model cost: run spans of one or two layers with weights that are filled in.

    ``layout`` and ``hidden_size`` describe what crosses a boundary. Steps are repeated so many times, after one that shows
    what a new shape costs once; more often while their times spread, less often where they are long. No text grows beyond
    ``max_positions``.
    """

    request: int
    spec: ModelSpec
    spans: tuple[tuple[int, int], ...]
    kind_of_layer: tuple[int, ...]
    shapes: tuple[StepShape, ...]
    layout: tuple[bool, ...] | None
    hidden_size: int
    num_prefills: int
    num_decodes: int
    max_positions: int | None


class MeasuredStep(Message, frozen=True):
    """Seconds that one part of a model took in steps of one shape: median, and distance between the quartiles."""

    shape: StepShape
    seconds: float
    spread_s: float


class ModelMeasured(Message, frozen=True, tag=26):
    """Answer to `MeasureModel`: times of each kind of layer that was among the spans, and of the rest."""

    request: int
    hardware: str
    free_bytes: int
    layers: dict[int, tuple[MeasuredStep, ...]]
    stage: tuple[MeasuredStep, ...]
    prologue: tuple[MeasuredStep, ...]
    epilogue: tuple[MeasuredStep, ...]


class ProbeLink(Message, frozen=True, tag=8):
    """Measure the link to another party: send it ``Ping`` messages with so many bytes beside them, one after the other."""

    request: int
    target: str
    sizes: tuple[int, ...]


class LinkProbed(Message, frozen=True, tag=27):
    """Answer to `ProbeLink`: seconds from each ``Ping`` to its ``Pong``, in the order of the sizes."""

    request: int
    seconds: tuple[float, ...]


class Ping(Message, frozen=True, tag=9):
    """Answer with a ``Pong`` at once."""

    number: int


class Pong(Message, frozen=True, tag=10):
    """Answer to a ``Ping``."""

    number: int
