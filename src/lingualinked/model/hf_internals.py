"""The only file that uses undocumented names of transformers; each of them has a test.

Knows how transformers 5 builds, renames and loads; no spans and no stages.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import cached_file, logging as transformers_logging, output_capturing

from lingualinked.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import FrameType

    from transformers import PreTrainedConfig, PreTrainedModel

GLOBAL_STATE = threading.RLock()
"""Held while transformers constructs a model, and while a stage computes.

Construction sets torch's default dtype and replaces functions of torch for the whole process, including other threads.
"""

torch_attention = sdpa_attention_forward
"""The function by which models compute attention as "sdpa"."""

_ROTATION = "apply_rotary_pos_emb"
_SEQUENTIAL_LOAD = "HF_DEACTIVATE_ASYNC_LOAD"
_REPORT_LOGGER = "transformers.modeling_utils"


_FILLING = {
    *(getattr(torch.nn.init, name) for name in ("constant_", "kaiming_uniform_", "normal_", "uniform_")),
    *(getattr(torch.Tensor, name) for name in ("fill_", "normal_", "uniform_", "zero_")),
}


class _LeaveUnfilled(TorchFunctionMode):
    """Leaves tensors on the meta device alone where a module fills its parameters: torch takes long over what has no values."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _FILLING:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **(kwargs or {}))


def build_on_meta(
    cls: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str | None
) -> PreTrainedModel:
    """Build a model without memory, with the dtype and the attention implementation that loading would give it."""
    arguments = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with GLOBAL_STATE, torch.device("meta"), _LeaveUnfilled():
        model: PreTrainedModel = cls._from_config(config, dtype=dtype, **arguments)
    model.eval()
    return model


def exclusive_init_context(cls: type[PreTrainedModel]) -> Any:
    """Return a ``get_init_context`` for a class derived from `cls` that holds `GLOBAL_STATE` during construction."""

    def get_init_context(_derived: type, *args: Any, **kwargs: Any) -> list[Any]:
        return [GLOBAL_STATE, *cls.get_init_context(*args, **kwargs), _LeaveUnfilled()]

    return classmethod(get_init_context)


def makes_pipeline_for_device(frame: FrameType | None) -> bool:
    """Return whether a frame makes a ``transformers.pipeline`` with a device, which refuses models with a device map."""
    if frame is None or frame.f_globals.get("__name__") != "transformers.pipelines.base":
        return False
    return frame.f_code.co_qualname == "Pipeline.__init__" and frame.f_locals.get("device") is not None


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


def ties(model: PreTrainedModel) -> dict[str, str]:
    """Return the tied parameters of a model, as ``{target: source}``."""
    return dict(model.all_tied_weights_keys)


@contextlib.contextmanager
def computed_attention(attend: Callable[..., Any]) -> Iterator[None]:
    """Make models that compute attention as "sdpa" call `attend` in place of `torch_attention`, within the context.

    Does nothing if another function has been registered. Needs `GLOBAL_STATE`.
    """
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not torch_attention:
        yield
        return
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def rotary_modules(model: torch.nn.Module) -> list[Any]:
    """Find the Python modules of a model's code that have a function of their own for rotary embeddings."""
    names = {type(module).__module__ for module in model.modules()}
    found = [sys.modules[name] for name in sorted(names) if name.startswith("transformers.models.")]
    return [each for each in found if isinstance(getattr(each, _ROTATION, None), FunctionType)]


@contextlib.contextmanager
def computed_rotation(modules: Iterable[Any], faster: Callable[[Any], Any]) -> Iterator[None]:
    """Make the code in some Python modules call ``faster(function)`` in place of its rotary function, within the context.

    Needs `GLOBAL_STATE`.
    """
    before = [(module, getattr(module, _ROTATION)) for module in modules]
    for module, function in before:
        setattr(module, _ROTATION, faster(function))
    try:
        yield
    finally:
        for module, function in before:
            setattr(module, _ROTATION, function)


class DynamicRope:
    """A rotary embedding, of one type of layers or of all, that long texts stretch, and that stays stretched."""

    def __init__(self, module: torch.nn.Module, layer_type: str | None) -> None:
        self._module = module
        self._arguments = {} if layer_type is None else {"layer_type": layer_type}
        self._prefix = "" if layer_type is None else f"{layer_type}_"

    def stretch(self, num_tokens: int, device: torch.device) -> None:
        """Put the embedding into its state after a text of `num_tokens` tokens, whatever its present state."""
        module: Any = self._module
        reach = getattr(module, f"{self._prefix}max_seq_len_cached", module.max_seq_len_cached)
        if int(reach) != num_tokens:
            for position in (0, num_tokens - 1):  # a short text first, which resets the stretching
                positions = torch.tensor([[position]], device=device)
                module(torch.empty(0, device=device), positions, **self._arguments)


def dynamic_ropes(model: torch.nn.Module) -> list[DynamicRope]:
    """Find the rotary embeddings that keep state from one forward pass to the next."""
    found = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None) if hasattr(module, "max_seq_len_cached") else None
        by_type = kinds if isinstance(kinds, dict) else {None: kinds or ""}
        found += [DynamicRope(module, layer_type) for layer_type, kind in by_type.items() if "dynamic" in kind]
    return found


def set_ties(model: PreTrainedModel, tied: dict[str, str]) -> None:
    """Set the parameters that the loader ties."""
    model.all_tied_weights_keys = tied


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
    with _quiet_sequential_loading() as reports:
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
def _quiet_sequential_loading() -> Iterator[list[str]]:
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


def recordable_outputs(model: torch.nn.Module) -> frozenset[str]:
    """Return what transformers records by hooks; empty for classes whose own forward collects it."""
    return frozenset(name for module in model.modules() for name in output_capturing._CAN_RECORD_REGISTRY.get(module))  # type: ignore[arg-type]


def selected_hidden_states(asked: Any, num_hidden_states: int) -> tuple[int, ...] | None:
    """Return the indices that a value of ``output_hidden_states`` selects, from 0; None if it is a flag."""
    if (selected := output_capturing.selected_hidden_states(asked)) is None:
        return None
    return tuple(sorted(output_capturing.resolve_hidden_states_indices(None, selected, num_hidden_states)))  # type: ignore[arg-type]


class Recorders:
    """The hooks by which transformers records a model's outputs: on its modules only while it records, as each costs time."""

    def __init__(self, model: torch.nn.Module) -> None:
        for module in model.modules():
            vars(module).pop("_output_capturing_hooks_installed", None)  # modules that several cut models share
        for module in model.modules():
            if output_capturing._CAN_RECORD_REGISTRY.get(module):  # type: ignore[arg-type]
                output_capturing.maybe_install_capturing_hooks(module)  # type: ignore[arg-type]
        self._hooks = [
            (module._forward_hooks, number, hook)
            for module in model.modules()
            for number, hook in module._forward_hooks.items()
            if hook.__module__ == output_capturing.__name__
        ]
        with self.attached():
            pass

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Put the hooks on the modules within the context."""
        for hooks, number, hook in self._hooks:
            hooks[number] = hook
        try:
            yield
        finally:
            for hooks, number, _ in self._hooks:
                del hooks[number]


def record_too(name: str) -> None:
    """Record one more output of the forward pass that is in progress, as if it had been called for it."""
    collected = output_capturing._active_collector.get()
    if collected is not None:
        collected.setdefault(name, [])


def make_masks(
    config: Any,
    states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Any,
    position_ids: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Make the masks of a step of one token as ``generate`` does for a static cache, by type of layers; "" if there is one type.

    `states` are ``[rows, 1, ...]``; the masks are ``[rows, 1, 1, tokens]``.
    """
    like = torch.empty((*states.shape[:2], 0), dtype=config.dtype, device=states.device)
    made = create_masks_for_generate(config, like, attention_mask, cache, position_ids)
    return made if isinstance(made, dict) else {"": made}


def balancing_loss(model: Any, router_logits: tuple[Any, ...], attention_mask: torch.Tensor | None) -> Any:
    """Return the loss that the class of a model of experts adds for experts that are used unequally; None if it has none."""
    compute = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    if compute is None:
        return None
    return compute(router_logits, model.num_experts, model.num_experts_per_tok, attention_mask)


class CacheLayer(DynamicLayer):
    """Base of full-attention KV layers; unlike transformers' own, subclasses do not register as default layer types."""

    _layer_type: Any = None

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]


class SlidingCacheLayer(DynamicSlidingWindowLayer):
    """Base of sliding-window KV layers, as `CacheLayer`."""

    _layer_type: Any = None

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)


class StaticCacheLayer(StaticLayer):
    """Base of full-attention KV layers of a fixed size, as `CacheLayer`."""

    _layer_type: Any = None

    def __init__(self, max_cache_len: int) -> None:
        super().__init__(max_cache_len)


class StaticSlidingCacheLayer(StaticSlidingWindowLayer):
    """Base of sliding-window KV layers of a fixed size, as `CacheLayer`."""

    _layer_type: Any = None

    def __init__(self, max_cache_len: int, sliding_window: int) -> None:
        super().__init__(max_cache_len, sliding_window)
