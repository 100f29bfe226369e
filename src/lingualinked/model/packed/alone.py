"""Finds out whether one pass over new tokens of several texts gives each the bits that it has in a step of its own.

Knows stages, their modules and passes; no sessions and no messages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lingualinked.kernels import few_rows, norm
from lingualinked.model.exact import exact_attention
from lingualinked.model.exact.bits import have_equal_bits
from lingualinked.model.exact.exact_norm import FasterNorm
from lingualinked.model.exact.packed_linear import PackedLinear
from lingualinked.model.exact.rounding_probe import VECTOR_BYTES, fills_vectors, find_groups
from lingualinked.model.exact.row_probe import find_functions, has_free_elements
from lingualinked.model.hf_internals import computing
from lingualinked.model.packed.invariance import draw_inputs, find_repeated
from lingualinked.model.packed.packed_pass import PackedStage, PassInputs, TextPart
from lingualinked.model.packed.qualifying import why_not_packed
from lingualinked.model.stages.layer_skips import LayerSkips
from lingualinked.model.stages.stage_data import StageInputs

if TYPE_CHECKING:
    from lingualinked.model.kv.kv_cache import StageCache
    from lingualinked.model.stages.stage import Stage

_PROMPTS = (1, 160, 2, 5, 47, 18, 33)  # tokens
_NUM_STEPS = 4
_ANGLE_BYTES = 8  # two of float32 for each frequency


def most_alone(stage: Stage) -> int:
    """Return for how many texts of one new token one pass has the bits of a step of each; 1 if for no more. In half a second."""
    sizes = [module.get_parameter("weight").numel() for module in stage.span.model.modules() if _is_norm(module)]
    most = min([few_rows.MAX_ROWS, *(norm.most_rows(size) for size in sizes)])
    return most if most > 1 and _has_known_parts(stage) and _layers_agree(stage) else 1


def _has_known_parts(stage: Stage) -> bool:
    """Return whether all that a stage runs computes each row by itself, by kernels that have been found to have torch's bits of one row."""
    model = stage.span.model
    config, dtype = model.config, cast("torch.dtype", model.config.dtype)
    if stage.device.type != "cpu" or dtype is not torch.bfloat16 or why_not_packed(model, stage.span.parts):
        return False
    if computing.attention_implementation(model) != "sdpa" or computing.length_ropes(model) or stage.module_state:
        return False
    # 1) products, norms, and embeddings, which copy rows
    for module in model.modules():
        own = [each for each in module.parameters(recurse=False) if not each.is_meta]
        if isinstance(module, PackedLinear):
            if not module.keeps_rows_apart:
                return False
        elif own and not _is_norm(module) and not (isinstance(module, nn.Embedding) and len(own) == 1):
            return False
    # 2) functions of single elements, among them of angles
    num_threads, text = torch.get_num_threads(), config.get_text_config()
    angles = [each.numel() for each in model.buffers() if each.is_floating_point() and not each.is_meta]
    size = getattr(text, "intermediate_size", 0)
    if not fills_vectors(model, dtype) or any(number * _ANGLE_BYTES % VECTOR_BYTES for number in angles):
        return False
    if not all(has_free_elements(each, dtype, size, num_threads) for each in find_functions(model)):
        return False
    # 3) attention
    num_heads = computing.number_of_heads(text)
    head_size = getattr(text, "head_dim", None) or (text.hidden_size // num_heads if num_heads else 0)
    return bool(head_size) and all(
        exact_attention.is_exact(dtype, head_size, group, 1, False, num_threads) for group in find_groups(model) or (1,)
    )


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, FasterNorm)


def _layers_agree(stage: Stage) -> bool:
    """Run a layer of each kind over texts in steps of their own, and together; return whether their bits are equal."""
    generator = torch.Generator().manual_seed(0)
    layout = stage.layout_before
    skips = LayerSkips(bypassed=tuple(find_repeated(stage)))
    packed = PackedStage(stage)
    # 1) prompts
    alone = [stage.new_cache() for _ in _PROMPTS]
    for cache, num_tokens in zip(alone, _PROMPTS, strict=True):
        _run_alone(stage, cache, draw_inputs(stage, num_tokens, generator), layout, skips)
    together = [cache.copy() for cache in alone]
    # 2) single tokens: of all texts, and of fewer and fewer
    for number in range(_NUM_STEPS):
        places = range(number, len(_PROMPTS))
        inputs = [draw_inputs(stage, 1, generator) for _ in places]
        expected = [
            _run_alone(stage, alone[place], each, layout, skips) for place, each in zip(places, inputs, strict=True)
        ]
        found = packed.run(
            PassInputs(
                states=torch.cat(inputs, 1),
                parts=[TextPart(together[place], 1) for place in places],
                layout=layout,
                skips=skips,
                least_rows=1,
                is_alone=True,
            )
        ).tensors[0]
        if not have_equal_bits(found, torch.cat(expected, 1)):
            return False
    return True


def _run_alone(
    stage: Stage, cache: StageCache, states: Tensor, layout: tuple[bool, ...] | None, skips: LayerSkips
) -> Tensor:
    num_new = states.shape[1]
    num_tokens = cache.num_tokens + num_new
    step = StageInputs(
        tensors=(states,),
        layout=layout,
        attention_mask=torch.ones((1, num_tokens), dtype=torch.long),
        position_ids=torch.arange(num_tokens - num_new, num_tokens)[None],
        logits_to_keep=1,
        skips=skips,
    )
    return stage.step(step, cache).tensors[0].clone()
