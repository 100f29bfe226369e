"""Finds out whether a stage computes each text of a pass as if it were alone, with any number of threads.

Knows stages and passes over several texts; no sessions and no messages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lingualinked.model.exact.bits import have_equal_bits
from lingualinked.model.exact.packed_linear import PackedLinear
from lingualinked.model.exact.rounding_probe import find_groups, probe_rounding
from lingualinked.model.exact.row_probe import (
    find_functions,
    has_free_attention,
    has_free_elements,
    has_free_products,
)
from lingualinked.model.hf_internals.computing import number_of_heads
from lingualinked.model.packed.packed_pass import PackedStage, PassInputs, TextPart
from lingualinked.model.packed.qualifying import why_not_packed
from lingualinked.model.process.torch_settings import one_thread
from lingualinked.model.stages.drawing import draw_states
from lingualinked.model.stages.layer_skips import LayerSkips
from lingualinked.quantities import count_text
from lingualinked.rounding import Invariance

if TYPE_CHECKING:
    from lingualinked.model.kv.kv_cache import StageCache
    from lingualinked.model.stages.stage import Stage

_PROMPTS = (1, 160, 2, 5, 47, 18)  # tokens
_LATER = (1, 1, 3)  # tokens of each text after its prompt
_REMEDY = "leave batch_invariant out"


@dataclasses.dataclass(frozen=True, slots=True)
class _Text:
    """A text's inputs, ``[1, tokens]`` or ``[1, tokens, hidden]``, step by step, and what a stage makes of them alone."""

    steps: Sequence[Tensor]
    alone: Sequence[Tensor]


def probe_invariance(stage: Stage) -> Invariance:
    """Find out whether the bits of a stage's texts depend on nothing else, and how its products round; in some seconds."""
    if stage.device.type != "cpu":
        because = f"how accelerator {stage.device.type!r} rounds is not probed: use CPU devices, or {_REMEDY}"
        return Invariance(fingerprint=stage.device.type, because=because)
    because = why_not_packed(stage.span.model, stage.span.parts) or _why_products_vary(stage) or _why_layers_vary(stage)
    with one_thread():
        rounding = probe_rounding(stage.span.model.config.dtype, 1, find_groups(stage.span.model))
    return Invariance(fingerprint=rounding.fingerprint, because=because)


def _why_products_vary(stage: Stage) -> str:
    """Return which function of torch makes a row's bits depend on something else; "" if none does."""
    config, num_threads = stage.span.model.config, torch.get_num_threads()
    dtype: torch.dtype = cast("torch.dtype", config.dtype)
    name, text = str(dtype).removeprefix("torch."), config.get_text_config()
    remedy = _REMEDY if dtype is torch.bfloat16 else "load the model with dtype=torch.bfloat16"
    where = f"in {name} on this processor ({count_text(num_threads, 'thread')}): {remedy}"
    # 1) products
    shapes = set(_find_products(stage.span.model))
    for in_features, out_features, has_bias in sorted(shapes):
        if not has_free_products(dtype, in_features, out_features, has_bias, num_threads):
            return (
                f"a row of a product with a weight of {out_features:,} x {in_features:,} has other bits among more rows, or with one "
                f"thread, {where}"
            )
    # 2) attention
    num_heads = number_of_heads(text)
    head_size = getattr(text, "head_dim", None) or (text.hidden_size // num_heads if num_heads else 0)
    num_key_heads = getattr(text, "num_key_value_heads", None) or num_heads
    if num_heads and not has_free_attention(dtype, num_heads, num_key_heads, head_size):
        return f"attention with {num_heads} heads of {head_size} has other bits where a text lies among others, {where}"
    # 3) functions of single elements
    size = getattr(text, "intermediate_size", 0)
    for function in find_functions(stage.span.model):
        if isinstance(size, int) and not has_free_elements(function, dtype, size, num_threads):
            return f"{type(function).__name__} of rows of {size:,} gives other bits where a vector or a thread's share ends, {where}"
    return ""


def _find_products(model: nn.Module) -> Iterator[tuple[int, int, bool]]:
    """Yield inputs, outputs and whether there is a bias of a model's linear layers, and of each weight of experts both ways."""
    for module in model.modules():
        if isinstance(module, nn.Linear | PackedLinear):
            yield module.in_features, module.out_features, module.bias is not None
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 3:
                yield parameter.shape[2], parameter.shape[1], False
                yield parameter.shape[1], parameter.shape[2], False


def _why_layers_vary(stage: Stage) -> str:
    """Run a layer of each kind over texts alone with one thread, and together; return "" if their bits are equal."""
    generator = torch.Generator().manual_seed(0)
    runs = _Runs(stage)
    # 1) each text alone
    texts = []
    with one_thread():
        for num_tokens in _PROMPTS:
            steps = [draw_inputs(stage, each, generator) for each in (num_tokens, *_LATER)]
            cache = stage.new_cache()
            texts.append(_Text(steps, [runs.run([cache], [step])[0] for step in steps]))
    # 2) all together; then each beginning after the one before
    for delay in (0, 1):
        caches = [stage.new_cache() for _ in texts]
        for time in range(len(_LATER) + 1 + delay * len(texts)):
            due = [place for place in range(len(texts)) if 0 <= time - delay * place <= len(_LATER)]
            if not due:
                continue
            numbers = [time - delay * place for place in due]
            steps = [texts[place].steps[number] for place, number in zip(due, numbers, strict=True)]
            found = runs.run([caches[place] for place in due], steps)
            for place, number, output in zip(due, numbers, found, strict=True):
                if not have_equal_bits(output, texts[place].alone[number]):
                    return (
                        f"layers of {type(stage.span.model).__name__} give a text other bits among others than alone, with "
                        f"{count_text(torch.get_num_threads(), 'thread')}: {_REMEDY}"
                    )
    return ""


class _Runs:
    """Passes through one layer of each kind of a stage, and what is before and behind its layers."""

    def __init__(self, stage: Stage) -> None:
        self._packed = PackedStage(stage)
        self._layout = stage.layout_before
        self._skips = LayerSkips(bypassed=tuple(find_repeated(stage)))

    def run(self, caches: Sequence[StageCache], states: Sequence[Tensor]) -> list[Tensor]:
        """Run one pass; return each text's output."""
        sizes = [each.shape[1] for each in states]
        parts = [TextPart(cache, size, size) for cache, size in zip(caches, sizes, strict=True)]
        inputs = PassInputs(
            states=torch.cat(list(states), 1), parts=parts, layout=self._layout, skips=self._skips, is_invariant=True
        )
        return [each.clone() for each in self._packed.run(inputs).tensors[0].split(sizes, dim=1)]


def find_repeated(stage: Stage) -> Iterator[int]:
    """Yield the layers that are made as one before them."""
    kinds: set[Any] = set()
    types = getattr(stage.span.model.config.get_text_config(), "layer_types", None) or ()
    layers: Any = stage.span.model.get_submodule(stage.span.parts.layers)
    for index, layer in enumerate(layers):  # not its children: stand-ins for other stages' layers are one module
        if not stage.start <= index < stage.end:
            continue
        parts = tuple((name, type(module).__name__) for name, module in layer.named_modules())
        sizes = tuple(tuple(each.shape) for each in layer.parameters())
        kind = (types[index] if index < len(types) else "", parts, sizes)
        if kind in kinds:
            yield index
        kinds.add(kind)


def draw_inputs(stage: Stage, num_tokens: int, generator: torch.Generator) -> Tensor:
    """Draw a step's inputs of one text."""
    config = stage.span.model.config
    if stage.is_first:
        return torch.randint(config.get_text_config().vocab_size, (1, num_tokens), generator=generator)
    (states,) = draw_states(stage.span.parts, stage.start, 1, num_tokens, generator)
    return states
