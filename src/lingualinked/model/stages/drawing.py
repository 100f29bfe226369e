"""Draws what arrives at a stage in a step, as if other stages had sent it.

Knows shapes and dtypes; neither weights nor where other stages are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lingualinked.model.stages.stage_data import StageInputs
from lingualinked.transmission import INPUT_IDS

if TYPE_CHECKING:
    from torch import Tensor

    from lingualinked.model.cutting.model_parts import ModelParts, OutputShape


def draw_inputs(parts: ModelParts, start: int, end: int) -> StageInputs:
    """Draw the inputs of a stage of layers ``[start, end)`` in a step of one token, always the same."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros((1, 1), dtype=torch.int64)
    return StageInputs(
        tensors=draw_states(parts, start, 1, 1, generator) if start else (ids,),
        layout=parts.transmission.items[start - 1] if start else None,
        attention_mask=None,
        position_ids=None,
        shortcuts=draw_shortcuts(parts, start, end, 1, 1, generator),
    )


def draw_states(
    parts: ModelParts, start: int, num_rows: int, num_new: int, generator: torch.Generator, num_past: int = 0
) -> tuple[Tensor, ...]:
    """Draw the output of the layer before `start`, of what crosses the boundary, behind `num_past` tokens."""
    return tuple(_draw(each, (num_rows, num_new, num_past), generator) for each in parts.layer_outputs[start - 1])


def draw_shortcuts(
    parts: ModelParts, start: int, end: int, num_rows: int, num_new: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Draw what earlier stages make for the one of layers ``[start, end)``; token ids are zeros."""
    shapes = {each.path: each for each in (*(items[0] for items in parts.layer_outputs), *parts.outputs)}
    return {
        name: torch.zeros((num_rows, num_new), dtype=torch.int64)
        if name == INPUT_IDS
        else _draw(shapes[name], (num_rows, num_new, 0), generator)
        for name in parts.shortcuts_to(start, end)
    }


def _draw(output: OutputShape, step: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    sizes, dtype = output.sizes(*step), getattr(torch, output.dtype)
    if not dtype.is_floating_point:  # indices, of which 0 is always one
        return torch.zeros(sizes, dtype=dtype)
    return torch.randn(sizes, generator=generator).to(dtype)
