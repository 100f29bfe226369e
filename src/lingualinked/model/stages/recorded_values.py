"""What a model's forward pass has recorded of each layer, cut to those of one span.

Knows which values a class records; not how.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lingualinked.model.hf_internals.recording import recordable_outputs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lingualinked.model.stages.layer_order import SpanOrder
    from lingualinked.model.stages.stage_data import StageInputs


def values_of_span(
    name: str,
    values: tuple[Tensor | None, ...],
    span: tuple[int, int, int],
    inputs: StageInputs,
    order: SpanOrder | None,
    model: nn.Module,
) -> tuple[Tensor | None, ...]:
    """Return what a forward pass recorded in a span ``(start, end, layers of the model)``, on the CPU.

    Stand-ins for other layers count in some classes, in others they do not. Hidden states are the inputs of the layers, and behind the
    last layer the output of the model.
    """
    has_one_more, is_last = name == "hidden_states", span[1] == span[2]
    start, end, num_layers = map(inputs.skips.num_before, span)
    selected = inputs.hidden_state_indices
    if order is not None and order.has_substitute and len(values) == 1 + num_layers + has_one_more:
        values = values[1:]
    if len(values) == num_layers + has_one_more:
        values = values[start : end + (has_one_more and is_last)]
    elif has_one_more and not is_last:
        values = values[:-1]
    if has_one_more and order is not None and order.feeds_first and values and not recordable_outputs(model):
        values = (inputs.tensors[0], *values[1:])  # no layer is there to replay it: the class has collected the dummy
    if has_one_more and selected is not None:
        values = tuple(value if start + index in selected else None for index, value in enumerate(values))
    return tuple(None if value is None else value.cpu() for value in values)
