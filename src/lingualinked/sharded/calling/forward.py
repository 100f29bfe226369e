"""Replaces a transformers class's ``forward`` with a step through the pipeline, and makes the class that has it.

Knows transformers' calls and outputs; a pipeline runs the layers and holds the KV.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from lingualinked.errors import UnsupportedOperationError
from lingualinked.model.cutting.model_parts import ModelParts
from lingualinked.model.cutting.tasks import GENERATION, task_of_class
from lingualinked.model.hf_internals.building import mark_initialized, ties
from lingualinked.model.hf_internals.cache_arguments import cache_argument
from lingualinked.model.hf_internals.computing import balancing_loss
from lingualinked.model.hf_internals.recording import recordable_outputs
from lingualinked.sharded.adapters.model_adapters import Adapters
from lingualinked.sharded.calling.inputs import LearnedPositions, StepShape, check_logits_to_keep, check_tensor
from lingualinked.sharded.calling.outputs import (
    IGNORED,
    LOSS_ARGUMENTS,
    calls_loss_function,
    output_class,
    returns_unrequested_cache,
)
from lingualinked.sharded.calling.pictures import FurtherArguments, PictureGeneration
from lingualinked.sharded.calling.stepping import ShardedSteps
from lingualinked.sharded.calling.task_models import ShardedTaskModel
from lingualinked.sharded.generating.generation import ShardedGeneration
from lingualinked.sharded.generating.prefill import PipelinedPrefill
from lingualinked.sharded.hooks.hooked_modules import HookedModules
from lingualinked.sharded.instruments.in_force import OpenBlocks
from lingualinked.sharded.loading.model_code import ModelCode
from lingualinked.sharded.sealed.conversions import Conversions
from lingualinked.sharded.sealed.layer_surgery import LayerSurgery
from lingualinked.sharded.sealed.sealed_config import SealedConfig
from lingualinked.sharded.sealed.sealing import Seal, SealedModel
from lingualinked.sharded.sealed.stand_in_class import make_stand_in
from lingualinked.sharded.sealed.unsupported import UnsupportedOperations
from lingualinked.sharded.weights.fetched_weights import FetchedWeights
from lingualinked.sharded.weights.saving import Saving
from lingualinked.sharded.weights.weight_edits import WeightEditor

if TYPE_CHECKING:
    from lingualinked.cluster.pipeline import Pipeline


class ShardedCausalLM(
    SealedModel,
    Adapters,
    Conversions,
    Saving,
    UnsupportedOperations,
    PipelinedPrefill,
    PictureGeneration,
    ShardedGeneration,
    ShardedSteps,
):
    """The overrides of a sharded model's class; comes before the transformers class in the order of classes."""

    if TYPE_CHECKING:  # transformers evaluates the annotations of its subclasses
        loss_function: Any
        _output_class: type[Any]
        router_aux_loss_coef: float
        _real_class: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | StaticCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Run one step through all stages, with transformers' arguments and result.

        Parameters
        ----------
        input_ids : Tensor or None
            Token ids, int64 ``[rows, tokens]``.
        attention_mask : Tensor or None
            ``[rows, past + tokens]``, 0 where padded; or one mask for all heads, ``[rows, 1, tokens, past + tokens]``.
        position_ids : Tensor or None
            int64 ``[1 or rows, tokens]``.
        past_key_values : ShardedCache, DynamicCache, StaticCache or None
            What an earlier call of this model returned, to continue from there; or an empty ``DynamicCache`` or
            ``StaticCache``, which becomes the handle of this text's KV.
        inputs_embeds : Tensor or None
            Embeddings instead of ids, ``[rows, tokens, hidden]``.
        labels : Tensor or None
            int64 ``[rows, tokens]``; adds ``loss``, which is computed in this process by transformers' loss function.
        use_cache : bool or None
            Whether to keep KV for a next call; ``None``: as the config says.
        return_dict : bool or None
            Whether to return a ``ModelOutput`` rather than a tuple; ``None``: as the config says.
        logits_to_keep : int or Tensor
            0 for the logits of all positions, N for the last N, or indices.
        **kwargs
            Further arguments of the loss (``num_items_in_batch``, ``ignore_index``, ``shift_labels``), and
            ``cache_position`` if it equals the positions of the new tokens; ``output_hidden_states`` (a bool, an index or
            several), ``output_attentions`` and, where the class has it, ``output_router_logits``, which default to the
            config's; what a model that sees pictures takes with them (``pixel_values``); ``adapter_names``, one for each row ("__base__" for none), in place of the active adapters; others are
            refused by name unless ``None``.

        Returns
        -------
        ModelOutput
            The output class of the model: ``logits`` ``[rows, kept tokens, vocabulary]``, ``past_key_values`` if the class
            returns them, ``loss`` if labels are given, and what layers recorded if it was asked for.

        Raises
        ------
        ArgumentError
            If ids are missing, empty, outside the vocabulary, exceed the learned positions or the length of a static KV
            cache, or do not fit the past; if another tensor has the wrong shape or no data.
        UnsupportedOperationError
            If an argument has no sharded counterpart, or the model was changed in a way that would have no effect.
        ClosedError
            If the model, its cluster or the session has been closed.
        WorkerError
            If a stage failed, or sent something else than was asked for.
        """
        # 1) refuse a model that is closed, traced or changed
        self._check_callable()
        # 2) check the arguments
        loss_arguments = {name: kwargs.pop(name) for name in LOSS_ARGUMENTS & kwargs.keys()}
        for name, value in loss_arguments.items():
            if isinstance(value, Tensor):
                loss_arguments[name] = check_tensor(name, value)
        step = self._check_step(input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, kwargs)
        fields = self._output_class.__dataclass_fields__
        records = tuple(each for each in step.records if each in fields)
        step = dataclasses.replace(step, records=records)  # a class without attention ignores that it is asked for some
        keep = check_logits_to_keep(logits_to_keep) if "logits_to_keep" in self._own_arguments else 0
        targets = None if labels is None else self._check_labels(labels, step.shape, keep, loss_arguments)
        # 3) run the step in the session of the given KV cache, or in a new one
        asks_for_kv = self._asks_for_kv(use_cache)
        keeps_kv = step.past is not None or (asks_for_kv and self._cache_name is not None)
        result = self._run_step(step, keep=keep, use_cache=use_cache, keeps_kv=keeps_kv)
        logits = result.output
        recorded = {name: each for name, each in result.recorded.items() if name in fields}
        # 4) compute the loss here, and return the class's own output
        loss = None
        if targets is not None:
            vocabulary = self.config.get_text_config().vocab_size
            loss = self.loss_function(logits=logits, labels=targets, vocab_size=vocabulary, **loss_arguments)
        if "router_logits" in recorded:
            balance = balancing_loss(self, recorded["router_logits"], step.mask)
            if balance is not None:
                recorded["aux_loss"] = balance
                loss = None if loss is None else loss + self.router_aux_loss_coef * balance
        if self._cache_name is not None and self._cache_name in self._output_class.__dataclass_fields__:
            is_returned = asks_for_kv or (step.past is not None and self._returns_unrequested_cache)
            recorded[self._cache_name] = result.cache if is_returned else None
        output: Any = self._output_class(loss=loss, logits=logits, **recorded)
        as_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()  # type: ignore[no-any-return]

    def _check_labels(self, labels: object, shape: StepShape, keep: int | Tensor, loss: dict[str, Any]) -> Tensor:
        """Check the labels, unless the user has set a loss function, which may take any."""
        if not calls_loss_function(self._real_class):
            raise UnsupportedOperationError(
                f"labels of a sharded {self._real_class.__name__}, whose forward computes the loss in its own way: leave them out, and "
                "compute it from the logits"
            )
        targets = check_tensor("labels", labels)
        if self.loss_function is ForCausalLMLoss:
            shifted, ignored = loss.get("shift_labels"), loss.get("ignore_index", IGNORED)
            counted = targets if shifted is None else check_tensor("shift_labels", shifted)
            shape.check_labels(counted, keep, self.config.get_text_config().vocab_size, ignored)
        return targets

    @functools.cached_property
    def _returns_unrequested_cache(self) -> bool:
        """Whether the class returns a KV cache that it was given even under ``use_cache=False``."""
        return returns_unrequested_cache(self._pipeline.spec)


def _with_signature_of(real: type[PreTrainedModel], own: type[Any], name: str) -> Any:
    """Return a method of our class with the signature of the real class, which transformers inspects.

    Families differ in their arguments and the order of them.
    """
    ours = getattr(own, name)
    signature = inspect.signature(getattr(real, name))
    names = list(signature.parameters)[1:]
    cache_name = cache_argument(real) if name == "forward" else None

    @functools.wraps(ours)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            signature.bind(self, *args, **kwargs)
        arguments = dict(zip(names, args, strict=False), **kwargs)
        if cache_name in arguments:
            arguments["past_key_values"] = arguments.pop(cache_name)
        return ours(self, **arguments)

    method.__signature__ = signature  # type: ignore[attr-defined]
    return method


@functools.cache  # so that two models of a class have equal types
def sharded_class(real: Any, base: type, own: Any = None) -> Any:
    """Return a subclass of ``own``, ``base`` and ``real``, with the name of ``real``.

    Ours is `ShardedCausalLM` or `ShardedTaskModel` if it is not given.
    """
    generates = task_of_class(real.__name__) == GENERATION
    own = own or (ShardedCausalLM if generates else ShardedTaskModel)
    names = ("forward", "prepare_inputs_for_generation") if generates else ("forward",)
    namespace = {name: _with_signature_of(real, own, name) for name in names}
    namespace |= {"_own_arguments": tuple(inspect.signature(real.forward).parameters)}
    namespace |= {"_output_class": output_class(real), "_cache_name": cache_argument(real), "_real_class": real}
    return make_stand_in(real, (own, base, real), namespace)


def make_sharded(
    meta: PreTrainedModel,
    pipeline: Pipeline,
    parts: ModelParts,
    code: ModelCode,
    *,
    base: type,
    owns_cluster: bool,
    real: Any = None,
    own: Any = None,
) -> ShardedCausalLM | ShardedTaskModel:
    """Turn a model on the meta device, in place, into one that runs in a pipeline and is also an instance of ``base``.

    Its class is made of ``own`` and ``real`` if they are given (`sharded_class`). Its submodules become read-only.
    ``owns_cluster`` says whether closing the model closes its cluster.
    """
    state = {"_pipeline": pipeline, "_parts": parts, "_code": code, "_owns_cluster": owns_cluster}
    model: Any = meta.eval()
    embeddings = model.get_input_embeddings()
    state["_recordable"] = recordable_outputs(meta)
    state["_further"] = FurtherArguments.of(meta, pipeline.spec)
    state["_embedding_shape"] = embeddings.num_embeddings, embeddings.embedding_dim
    mark_initialized(meta)
    editor = WeightEditor(pipeline, parts, ties(meta))
    weights = FetchedWeights(functools.partial(pipeline.weights.read, parts), pipeline.check_open, editor=editor)
    editor.serve(weights)
    state["_editor"] = editor
    seal = Seal(meta, weights)
    vars(model).update(
        state, _positions=LearnedPositions.of(meta), _seal=seal, _sealed_config=SealedConfig(meta.config)
    )
    vars(model)["_surgery"] = LayerSurgery(model.get_submodule(parts.layers), pipeline.edits, parts.transmission)
    vars(model).update(
        _hooked_modules=HookedModules(
            {path: each for path, each in meta.named_modules() if path}, parts, seal.adapters, seal.wrapped.wrapped
        ),
        _open_blocks=OpenBlocks(parts),
        _adapters_lock=threading.Lock(),
    )
    stood_for: Any = real or type(meta)
    model.__class__ = sharded_class(stood_for, base, own)
    return cast("ShardedCausalLM | ShardedTaskModel", model)
