"""Runs a step through stages in one process, one after the other: only what would be sent reaches the next one.

Knows stages and what they give; no workers, and no sessions' owners.
"""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lingualinked.model.kv.kv_cache import StageCache
    from lingualinked.model.stages.stage import Stage
    from lingualinked.model.stages.stage_data import StageInputs

_NONE: Mapping[str, Tensor] = MappingProxyType({})


def run_chained(
    stages: Sequence[Stage],
    caches: Sequence[StageCache | None],
    inputs: StageInputs,
    extras_of_first: Mapping[str, Tensor] = _NONE,
) -> tuple[Tensor, ...]:
    """Run a step, given the inputs of the first stage, whose further arguments may be more; return copies of the last one's output."""
    made: dict[str, Tensor] = {}
    for stage, cache in zip(stages, caches, strict=True):
        output = stage.step(
            dataclasses.replace(
                inputs,
                shortcuts={name: made[name] for name in stage.used_shortcuts if name in made},
                extras={**inputs.extras, **(extras_of_first if stage.is_first else {})},
            ),
            cache,
        )
        made |= {name: each.clone().cpu() for name, each in output.shortcuts.items()}
        inputs = dataclasses.replace(
            inputs,
            tensors=tuple(each.clone().cpu() for each in output.tensors),
            layout=output.layout,
            shape=output.shape,
        )
    return inputs.tensors
