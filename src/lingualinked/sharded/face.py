"""What a sharded model does where transformers would run layers.

Knows transformers' calls and outputs; layers and KV are a pipeline's business.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from lingualinked.errors import UnsupportedOperationError
from lingualinked.model.hf_internals import makes_pipeline_for_device
from lingualinked.model.parts import ModelParts
from lingualinked.sharded.cache import ShardedCache, check_empty
from lingualinked.sharded.conversions import Conversions
from lingualinked.sharded.generation import ShardedGeneration
from lingualinked.sharded.inputs import (
    LearnedPositions,
    StepShape,
    check_inputs,
    check_logits_to_keep,
    check_tensor,
    refuse_arguments,
)
from lingualinked.sharded.model_code import ModelCode, check_observers
from lingualinked.sharded.outputs import IGNORED, LOSS_ARGUMENTS, output_class, returns_unrequested_cache
from lingualinked.sharded.sealed_config import SealedConfig
from lingualinked.sharded.sealing import Seal, SealedModel
from lingualinked.sharded.unsupported import UnsupportedOperations

if TYPE_CHECKING:
    from lingualinked.cluster.pipeline import Pipeline


class ShardedCausalLM(SealedModel, Conversions, UnsupportedOperations, ShardedGeneration):
    """The part of a sharded model's class that overrides transformers'; stands before the real class."""

    if TYPE_CHECKING:  # transformers evaluates the annotations of its subclasses
        loss_function: Any
        _parts: ModelParts
        _positions: LearnedPositions | None
        _code: ModelCode
        _embedding_shape: tuple[int, int]
        _seal: Seal
        _sealed_config: SealedConfig
        _output_class: type[Any]
        _own_arguments: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        """Where ids go in and logits come out: the CPU, wherever the stages compute."""
        return torch.device("cpu")

    @property
    def hf_device_map(self) -> dict[str, str]:
        """Accelerator of every layer and of the modules around them, as accelerate puts it.

        The first entry is the model's own, where inputs are to be: what reads the map for that takes the first one. A
        pipeline that is told a device, and then takes no model that has a map, finds none and asks the model to move there.
        """
        if makes_pipeline_for_device(sys._getframe(1)):  # noqa: SLF001 - of whoever asks
            raise AttributeError("hf_device_map")
        device = self._pipeline.cluster.device
        accelerators = [(stage, device(stage.device).accelerator) for stage in self._pipeline.plan.stages]
        placed = {"": str(self.device)} | dict.fromkeys(self._parts.prologue, accelerators[0][1])
        for stage, accelerator in accelerators:
            for index in range(stage.start, stage.end):
                placed[f"{self._parts.layers}.{index}"] = accelerator
        return placed | dict.fromkeys(self._parts.epilogue, accelerators[-1][1])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Run the model over all stages, with transformers' arguments and result.

        Parameters
        ----------
        input_ids : Tensor or None
            Token ids, int64 ``[rows, tokens]``.
        attention_mask : Tensor or None
            ``[rows, past + tokens]``, 0 where padded; or one mask for all heads, ``[rows, 1, tokens, past + tokens]``.
        position_ids : Tensor or None
            int64 ``[1 or rows, tokens]``.
        past_key_values : ShardedCache, DynamicCache or None
            What an earlier call of this model returned, to go on from there; or an empty one, which stands for this text's
            KV from now on.
        inputs_embeds : Tensor or None
            Embeddings instead of ids, ``[rows, tokens, hidden]``.
        labels : Tensor or None
            int64 ``[rows, tokens]``; gives ``loss``, computed here as transformers does.
        use_cache : bool or None
            Whether to keep KV for a next call; ``None``: the config's word.
        return_dict : bool or None
            Whether to return a ``ModelOutput`` rather than a tuple; ``None``: the config's word.
        logits_to_keep : int or Tensor
            0 for the logits of all positions, N for the last N, or indices.
        **kwargs
            What the loss takes beside labels (``num_items_in_batch``, ``ignore_index``, ``shift_labels``), and
            ``cache_position`` if it says where the new tokens are anyway; all else is refused by name unless ``None``.

        Returns
        -------
        ModelOutput
            The class's own: ``logits`` ``[rows, kept tokens, vocabulary]``, ``past_key_values`` where the class returns
            them, and ``loss`` if labels are given.

        Raises
        ------
        ArgumentError
            If ids are missing, empty, outside the vocabulary or beyond the learned positions, or do not fit the past; if
            another tensor has the wrong shape, or no data.
        UnsupportedOperationError
            If an argument has no sharded counterpart, or the model was changed in a way that would have no effect.
        ClosedError
            If the model, its cluster or the session has been closed.
        """
        self._pipeline.check_open()
        # Of what the workers answer, nothing but its numbers would be recorded.
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise UnsupportedOperationError("torch.jit.trace() of a sharded model: call the model itself")
        if self._checked_in_call():
            check_observers()  # they come and go
        else:
            self._check_unchanged()
        loss_arguments = {name: kwargs.pop(name) for name in LOSS_ARGUMENTS & kwargs.keys()}
        for name, value in loss_arguments.items():
            if isinstance(value, Tensor):
                loss_arguments[name] = check_tensor(name, value)
        cache_position = kwargs.pop("cache_position", None)
        refuse_arguments(self.config, kwargs, self._own_arguments)
        inputs = check_inputs(input_ids, inputs_embeds, *self._embedding_shape)
        past = self._past(past_key_values, inputs.shape[0])
        shape = StepShape(
            rows=inputs.shape[0],
            past=0 if past is None else past.get_seq_length(),
            new=inputs.shape[1],
            heads=getattr(self.config.get_text_config(), "num_attention_heads", None),
            window=self._sliding_window,
        )
        mask = shape.check_mask(attention_mask)
        positions = shape.check_positions(position_ids)
        shape.check_cache_position(cache_position)
        keep = check_logits_to_keep(logits_to_keep)
        targets = None if labels is None else self._check_labels(labels, shape, keep, loss_arguments)
        if self._positions is not None:
            self._positions.check(shape.past, shape.new, mask, positions)
        asks_for_kv = bool(getattr(self.config, "use_cache", True) if use_cache is None else use_cache)
        keeps_kv = past is not None or asks_for_kv
        cache = self._open_session() if past is None else self._as_session(past)
        try:
            logits = cache.session.step(inputs, mask, positions, keep, keeps_kv=keeps_kv)
        finally:
            if not keeps_kv:
                cache.end()
        loss = None
        if targets is not None:
            vocabulary = self.config.get_text_config().vocab_size
            loss = self.loss_function(logits=logits, labels=targets, vocab_size=vocabulary, **loss_arguments)
        is_returned = asks_for_kv or (past is not None and self._returns_unrequested_cache)
        output: Any = self._output_class(loss=loss, logits=logits, past_key_values=cache if is_returned else None)
        as_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()  # type: ignore[no-any-return]

    def _check_labels(self, labels: object, shape: StepShape, keep: int | Tensor, loss: dict[str, Any]) -> Tensor:
        """Check what the loss is computed from; a loss function of the user's own may take any labels."""
        targets = check_tensor("labels", labels)
        if self.loss_function is ForCausalLMLoss:
            shifted, ignored = loss.get("shift_labels"), loss.get("ignore_index", IGNORED)
            counted = targets if shifted is None else check_tensor("shift_labels", shifted)
            shape.check_labels(counted, keep, self.config.get_text_config().vocab_size, ignored)
        return targets

    def _check_unchanged(self) -> None:
        """Refuse to run if something was changed in the caller that the workers do not know of."""
        check_observers()
        self._code.check(self.config)
        self._seal.check(self)  # type: ignore[arg-type]  # a PreTrainedModel by its real class
        self._sealed_config.check(self.config)

    def _past(self, given: object, num_rows: int) -> DynamicCache | None:
        """Check what is to be gone on from."""
        if isinstance(given, ShardedCache):
            given.check(self._pipeline, num_rows)
            return given
        return None if given is None else check_empty(given, self.config)

    @functools.cached_property
    def _returns_unrequested_cache(self) -> bool:
        """Whether the class returns a KV cache that it was given also under ``use_cache=False``."""
        return returns_unrequested_cache(self._pipeline.spec)


def _with_signature_of(real: type[PreTrainedModel], name: str) -> Any:
    """Give a method of `ShardedCausalLM` the signature that it has in a real class, for transformers to inspect.

    Families differ in the arguments that they have and in their order.
    """
    ours = getattr(ShardedCausalLM, name)
    signature = inspect.signature(getattr(real, name))
    names = list(signature.parameters)[1:]

    @functools.wraps(ours)
    def method(self: ShardedCausalLM, *args: Any, **kwargs: Any) -> Any:
        if args:
            signature.bind(self, *args, **kwargs)
        return ours(self, **dict(zip(names, args, strict=False)), **kwargs)

    method.__signature__ = signature  # type: ignore[attr-defined]
    return method


@functools.cache  # one class per real one: types of two models of a kind are equal
def face_class(real: Any, base: type) -> Any:
    """Make the class whose instances are instances of ``base`` and of ``real`` both, under the name of the latter."""
    namespace = {name: _with_signature_of(real, name) for name in ("forward", "prepare_inputs_for_generation")}
    namespace |= {"__module__": real.__module__, "__doc__": real.__doc__}
    namespace |= {"_own_arguments": tuple(inspect.signature(real.forward).parameters)}
    namespace |= {"_output_class": output_class(real)}
    return type(real.__name__, (ShardedCausalLM, base, real), namespace)


def wear_face(
    meta: PreTrainedModel, pipeline: Pipeline, parts: ModelParts, code: ModelCode, *, base: type, owns_cluster: bool
) -> ShardedCausalLM:
    """Turn a model on the meta device into one that runs in a pipeline.

    Parameters
    ----------
    meta : PreTrainedModel
        The whole model on the meta device: names, shapes and dtypes, no memory.
    pipeline : Pipeline
        Where its layers are.
    parts : ModelParts
        Their names.
    code : ModelCode
        What it runs.
    base : type
        What it is an instance of beside the real class.
    owns_cluster : bool
        Whether the cluster ends with the model.

    Returns
    -------
    ShardedCausalLM
        The same object; its submodules can be looked at, and refuse to be used or changed.
    """
    state = {"_pipeline": pipeline, "_parts": parts, "_code": code, "_owns_cluster": owns_cluster}
    model: Any = meta.eval()
    real: Any = type(meta)
    embeddings = model.get_input_embeddings()
    state["_embedding_shape"] = embeddings.num_embeddings, embeddings.embedding_dim
    vars(model).update(
        state, _positions=LearnedPositions.of(meta), _seal=Seal(meta), _sealed_config=SealedConfig(meta.config)
    )
    model.__class__ = face_class(real, base)
    return cast("ShardedCausalLM", model)
