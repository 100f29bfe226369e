"""Loads checkpoints as transformers' ``from_pretrained`` does.

Knows how transformers renames, converts and loads; no spans and no stages.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import cached_file, logging as transformers_logging

from lingualinked.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from transformers import PreTrainedConfig, PreTrainedModel

_SEQUENTIAL_LOAD = "HF_DEACTIVATE_ASYNC_LOAD"


_REPORT_LOGGER = "transformers.modeling_utils"


def find_file(path: str, name: str, **hub: Any) -> str | None:
    """Find a file in a folder or a model on the hub, downloading it if necessary; return None if there is none."""
    found: str | None = cached_file(
        path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
    return found


@dataclass(frozen=True, slots=True)
class MappedKey:
    """The parameters that transformers' loader makes from one tensor of a checkpoint."""

    names: tuple[str, ...]  # several if the loader splits the tensor, none if the model does not use it
    is_converted: bool  # whether the tensor is fused, split or transposed


def map_keys(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, MappedKey]:
    """Map the keys of a checkpoint to the parameters that transformers' loader makes from them."""
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    converter_of = {pattern: each for each in converters for pattern in each.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    mapped: dict[str, MappedKey] = {}
    # In the loader's order, since some renamings are triggered by an earlier key.
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            mapped[key] = MappedKey((), False)
        elif pattern is None:
            mapped[key] = MappedKey((name,), False)
        else:
            first, *others = converter_of[pattern].target_patterns
            mapped[key] = MappedKey((name, *(name.replace(first, other) for other in others)), True)
    return mapped


def computed_parameters(model: PreTrainedModel) -> frozenset[str]:
    """Return the parameters that a checkpoint may lack, since the model's class computes them, such as sinusoidal positions."""
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    names = (name for name, _ in model.named_parameters(remove_duplicate=False))
    return frozenset(name for name in names if any(pattern.search(name) for pattern in patterns))


def load_model(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    weights: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    attn_implementation: str | None,
) -> PreTrainedModel:
    """Build and load a model on the CPU as ``from_pretrained`` does; ``weights[key][...]`` materialises one tensor.

    Raises CheckpointError if a parameter was not loaded, where transformers would leave random values.
    """
    arguments: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    loader: Any = cls
    with quiet_loading() as reports:
        try:
            model, info = loader.from_pretrained(
                None,
                config=config,
                state_dict=dict(weights),
                dtype=dtype,
                ignore_mismatched_sizes=True,  # mismatched sizes are refused below, by name
                output_loading_info=True,
                **arguments,
            )
        except RuntimeError as error:
            if not reports:
                raise
            raise CheckpointError(
                f"the weights of {cls.__name__} can't be converted: {error}\n{reports[-1]}"
            ) from error
    buffers = {name for name, _ in model.named_buffers()}  # buffers that a checkpoint lacks are computed
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        wrong = sorted(str(each) for each in info[what] if each not in buffers)
        if wrong:
            raise CheckpointError(
                f"the checkpoint does not fit {cls.__name__}: {what.replace('_', ' ')} {', '.join(wrong)}; "
                "the weights and config.json are of different models"
            )
    loaded: PreTrainedModel = model
    return loaded


@contextlib.contextmanager
def quiet_loading() -> Iterator[list[str]]:
    """Make loading sequential, in the calling thread, without a progress bar; yield the loader's reports.

    Reading ahead in a thread pool would hold tensors twice while they are fused, and call back from other threads.
    """
    reports: list[str] = []

    def withhold(record: logging.LogRecord) -> bool:
        reports.append(record.getMessage())
        return False

    logger = logging.getLogger(_REPORT_LOGGER)
    bars = transformers_logging.is_progress_bar_enabled()
    setting = os.environ.get(_SEQUENTIAL_LOAD)
    logger.addFilter(withhold)
    os.environ[_SEQUENTIAL_LOAD] = "1"
    transformers_logging.disable_progress_bar()
    try:
        yield reports
    finally:
        logger.removeFilter(withhold)
        if bars:
            transformers_logging.enable_progress_bar()
        if setting is None:
            del os.environ[_SEQUENTIAL_LOAD]
        else:
            os.environ[_SEQUENTIAL_LOAD] = setting
