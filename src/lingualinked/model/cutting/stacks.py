"""The two stacks of an encoder-decoder model, each as a model of its own that is cut like any other.

Knows how such a model calls its encoder and its decoder; no parts, spans or caches of stages.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, Seq2SeqLMOutput

from lingualinked.model.cutting.cut import StandIn
from lingualinked.model.hf_internals import building

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import Cache, PreTrainedConfig, PreTrainedModel

Stack = Literal["encoder", "decoder"]

_NUM_UNKNOWN = 2  # source tokens of a pass whose source does not matter


@functools.cache
def stack_class(cls: Any, stack: Stack) -> type[PreTrainedModel]:
    """Derive a class that holds and runs one stack of an encoder-decoder model, called as a causal language model is.

    The encoder's "logits" are its hidden states. The class keeps the name and module of `cls`, by which transformers looks
    things up.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        cls.__init__(self, *args, **kwargs)
        _drop_other_stack(self, stack)

    namespace = {
        "__init__": __init__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "forward": _encode if stack == "encoder" else functools.partialmethod(_decode, cls),
        "get_input_embeddings": lambda self: _owner(self, stack).get_input_embeddings(),
        "stack": stack,
    }
    derived: type[PreTrainedModel] = type(cls.__name__, (cls,), namespace)
    return derived


def _owner(model: PreTrainedModel, stack: Stack) -> PreTrainedModel:
    """Return the module that a stack is."""
    owner: PreTrainedModel = model.get_encoder() if stack == "encoder" else model.get_decoder()
    return owner


def kv_config(model: Any) -> PreTrainedConfig:
    """Return the configuration that the KV cache of a model follows: of a decoder, its own."""
    owner = model.get_decoder() if getattr(model, "stack", "") == "decoder" else model
    config: PreTrainedConfig = owner.config
    return config


def kv_slots(model: Any, slots: frozenset[int], num_layers: int) -> frozenset[int]:
    """Return the slots of a KV cache that layers with these slots have: a decoder's each have a second one, of cross-attention."""
    stack: Stack | None = getattr(model, "stack", None)
    if stack == "encoder":
        return frozenset()
    return slots if stack is None else slots | {slot + num_layers for slot in slots}


def _drop_other_stack(model: PreTrainedModel, stack: Stack) -> None:
    encoder = model.get_encoder()
    (path,) = (path for path, module in model.named_modules() if module is encoder)
    if stack == "encoder":
        path = f"{path.rpartition('.')[0]}.decoder".lstrip(".")
        model.lm_head = StandIn(model.lm_head)
        biases = (name for name, _ in model.named_buffers(recurse=False))  # of logits
        model._non_persistent_buffers_set.update(biases)  # noqa: SLF001 - so that none is read
    model.set_submodule(path, StandIn())
    held = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    building.set_ties(
        model, {target: source for target, source in building.ties(model).items() if {target, source} <= held}
    )


def _encode(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    *,
    logits_to_keep: int | Tensor = 0,
    **recorded: Any,
) -> CausalLMOutputWithPast:
    """Run the encoder, which keeps no KV."""
    output = self.get_encoder()(
        input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, return_dict=True, **recorded
    )
    return CausalLMOutputWithPast(
        logits=_kept(output.last_hidden_state, logits_to_keep),
        hidden_states=output.hidden_states,
        attentions=output.attentions,
    )


_encode.__annotations__["return"] = CausalLMOutputWithPast  # as in transformers' classes


def _decode(
    self: Any,
    cls: type[PreTrainedModel],
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    logits_to_keep: int | Tensor = 0,
    **recorded: Any,
) -> CausalLMOutputWithPast:
    """Run the decoder; the KV cache has two layers for each of its own, first those of self-attention."""
    num_layers = next(len(child) for child in self.get_decoder().children() if isinstance(child, nn.ModuleList))
    cache = None if past_key_values is None else split_cache(past_key_values, num_layers)
    if encoder_hidden_states is None:
        first = cast("Tensor", input_ids if inputs_embeds is None else inputs_embeds)
        encoder_hidden_states = _like_source(cache, len(first), self.config.hidden_size, self.dtype, first.device)
    with _fitting_biases(self):
        output: Seq2SeqLMOutput = cls.forward(
            self,
            decoder_input_ids=input_ids,
            decoder_attention_mask=attention_mask,
            decoder_inputs_embeds=inputs_embeds,
            past_key_values=cache,
            use_cache=use_cache,
            attention_mask=encoder_attention_mask,
            encoder_outputs=BaseModelOutput(last_hidden_state=encoder_hidden_states),
            return_dict=True,
            **recorded,
        )
    return CausalLMOutputWithPast(
        logits=_kept(output.logits, logits_to_keep),
        past_key_values=output.past_key_values,
        hidden_states=output.decoder_hidden_states,
    )


@contextlib.contextmanager
def _fitting_biases(model: Any) -> Iterator[None]:
    """Make biases of logits fit hidden states in this context, if the head is on another stage."""
    buffers = model._buffers  # noqa: SLF001 - only the model's own
    own = dict(buffers) if isinstance(model.lm_head, StandIn) else {}
    buffers.update({name: bias[..., :1] for name, bias in own.items()})
    try:
        yield
    finally:
        buffers.update(own)


def _kept(states: Any, which: int | Tensor) -> Any:
    """Return the states of the last positions, of those with some indices, or of all (0)."""
    return states[:, slice(-which, None) if isinstance(which, int) else which]


def _like_source(
    cache: EncoderDecoderCache | None, num_rows: int, dim: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return a tensor of the shape of the encoder's output, of which cross-attention has kept all that it needs."""
    layers: list[Any] = [] if cache is None else cache.cross_attention_cache.layers
    kept = [each for each in layers if each.is_initialized]
    num_tokens = kept[0].keys.shape[2] if kept else _NUM_UNKNOWN
    return torch.zeros((), dtype=dtype, device=device).expand(num_rows, num_tokens, dim)


def split_cache(cache: Cache, num_layers: int) -> EncoderDecoderCache:
    """Return the KV cache that a decoder expects, of the same layers; those of cross-attention are new if there are none."""
    own, cross = copy.copy(cache), copy.copy(cache)
    own.layers = cache.layers[:num_layers]
    has_cross = len(cache.layers) == 2 * num_layers
    cross.layers = cache.layers[num_layers:] if has_cross else [DynamicLayer() for _ in own.layers]
    return EncoderDecoderCache(own, cross)


def find_stack_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    """Return the path and the list of the layers of a model that is one stack; None for other models."""
    stack: Stack | None = getattr(model, "stack", None)
    if stack is None:
        return None
    owner = _owner(model, stack)
    (found,) = (
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(module is child for child in owner.children())
    )
    return found
