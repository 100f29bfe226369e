"""What a sharded model does where transformers would run layers.

Knows transformers' calls and outputs; layers and KV are a pipeline's business.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from lingualinked.errors import ArgumentError, ClosedError, UnsupportedOperationError
from lingualinked.model.parts import ModelParts, learned_positions
from lingualinked.sharded.cache import ShardedCache
from lingualinked.sharded.inputs import check_ids, refuse_forward_arguments
from lingualinked.sharded.model import ShardedModel
from lingualinked.sharded.unsupported import UnsupportedOperations

if TYPE_CHECKING:
    from lingualinked.cluster.pipeline import Pipeline

_sessions_of_call: contextvars.ContextVar[list[ShardedCache] | None] = contextvars.ContextVar(
    "sessions_of_call", default=None
)


class ShardedCausalLM(UnsupportedOperations, ShardedModel):
    """The part of a sharded model's class that overrides transformers'; stands before the real class."""

    if TYPE_CHECKING:  # transformers evaluates the annotations of its subclasses
        _parts: ModelParts
        _num_positions: int | None

    @property
    def device(self) -> torch.device:
        """Where ids go in and logits come out: the CPU, wherever the stages compute."""
        return torch.device("cpu")

    @property
    def hf_device_map(self) -> dict[str, str]:
        """Accelerator of every layer and of the modules around them, as accelerate puts it."""
        accelerators = [(stage, self.cluster.device(stage.device).accelerator) for stage in self.plan.stages]
        placed = dict.fromkeys(self._parts.prologue, accelerators[0][1])
        for stage, accelerator in accelerators:
            for index in range(stage.start, stage.end):
                placed[f"{self._parts.layers}.{index}"] = accelerator
        return placed | dict.fromkeys(self._parts.epilogue, accelerators[-1][1])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ShardedCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
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
            int64 ``[rows, past + tokens]``, 0 where padded.
        position_ids : Tensor or None
            int64 ``[1 or rows, tokens]``.
        past_key_values : ShardedCache or None
            What an earlier call of this model returned, to go on from there.
        inputs_embeds : Tensor or None
            Embeddings instead of ids, ``[rows, tokens, hidden]``.
        labels : Tensor or None
            int64 ``[rows, tokens]``; gives ``loss``, computed here as transformers does.
        use_cache : bool or None
            Whether to keep KV for a next call; ``None``: the config's word.
        output_attentions, output_hidden_states : bool or None
            Not supported: they stay in the workers.
        return_dict : bool or None
            Whether to return a ``ModelOutput`` rather than a tuple; ``None``: the config's word.
        logits_to_keep : int or Tensor
            0 for the logits of all positions, N for the last N, or indices.
        **kwargs
            Refused by name unless ``None``.

        Returns
        -------
        CausalLMOutputWithPast
            ``logits`` ``[rows, kept tokens, vocabulary]``, ``past_key_values``, and ``loss`` if labels are given.

        Raises
        ------
        ArgumentError
            If ids are missing, empty, outside the vocabulary or beyond the learned positions.
        UnsupportedOperationError
            If an argument has no sharded counterpart.
        ClosedError
            If the model, its cluster or the session has been closed.
        """
        self._check_open()
        refuse_forward_arguments(
            self,
            {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states} | kwargs,
            past_key_values,
        )
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs = check_ids(input_ids, inputs_embeds, self._vocabulary_size, self._num_positions, past)
        keeps_kv = bool(getattr(self.config, "use_cache", True) if use_cache is None else use_cache)
        cache = past_key_values if past_key_values is not None else ShardedCache(self._pipeline.open_session())
        try:
            logits = cache.session.step(
                inputs,
                None if attention_mask is None else attention_mask.cpu(),
                None if position_ids is None else position_ids.cpu(),
                logits_to_keep,
                keeps_kv=keeps_kv or past_key_values is not None,
            )
        finally:
            if not keeps_kv and past_key_values is None:
                cache.end()
        loss = None
        if labels is not None:
            vocabulary = self.config.get_text_config().vocab_size
            loss = self.loss_function(logits=logits, labels=labels.cpu(), vocab_size=vocabulary)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if keeps_kv else None)
        as_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate token ids: transformers' own ``generate`` with the layers in the workers.

        Every argument is that of ``transformers.GenerationMixin.generate``. The sessions that a call opens are freed
        in every stage when it ends, however it ends; a returned ``past_key_values`` keeps its session.

        Raises
        ------
        UnsupportedOperationError
            If an argument asks for what a sharded model does not do, by name.
        ArgumentError
            If ids are empty, outside the vocabulary or beyond the learned positions.
        WorkerDiedError, WorkerError, StepTimeoutError, ClosedError
            If a step can't be run.
        """
        self._check_open()
        _refuse_generate_arguments(args, kwargs)
        with _ending_sessions() as keep:
            result = super().generate(*args, **kwargs)
            if isinstance(result, ModelOutput):
                keep(result.get("past_key_values"))
            return result

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Open a session where transformers would make a cache."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise UnsupportedOperationError(
                f"cache_implementation={generation_config.cache_implementation!r} is not supported by a sharded model: "
                "leave it out; the KV grows in the workers"
            )
        given = model_kwargs.get("past_key_values")
        if given is not None or generation_config.use_cache is False:
            return
        cache = ShardedCache(self._pipeline.open_session())
        if generation_config.is_assistant:
            cache.activate_past_recording()
        opened = _sessions_of_call.get()
        if opened is not None:
            opened.append(cache)
        model_kwargs["past_key_values"] = cache

    @functools.cached_property
    def _vocabulary_size(self) -> int:
        return int(self.get_input_embeddings().num_embeddings)

    def _check_open(self) -> None:
        if self._pipeline.closed:
            raise ClosedError("the model is closed: make a new one with ShardedModel.from_pretrained")


@contextlib.contextmanager
def _ending_sessions() -> Iterator[Any]:
    """Collect the sessions opened inside; end all but the one that is kept."""
    opened: list[ShardedCache] = []
    kept: list[Any] = []
    token = _sessions_of_call.set(opened)
    try:
        yield kept.append
    finally:
        _sessions_of_call.reset(token)
        for cache in opened:
            if not any(cache is other for other in kept):
                cache.end()


def _refuse_generate_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for name in ("compile_config", "custom_generate"):
        if kwargs.get(name) is not None:
            raise UnsupportedOperationError(f"{name} is not supported by a sharded model: leave it out")
    if kwargs.get("cache_implementation") == "paged":
        raise UnsupportedOperationError("cache_implementation='paged' is not supported by a sharded model: leave it out")
    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    if isinstance(ids, Tensor) and ids.numel() == 0:
        raise ArgumentError(f"input_ids of shape {tuple(ids.shape)} are empty: give at least one token")


def _refuse_call(module: nn.Module, *_: Any) -> None:
    raise UnsupportedOperationError(
        f"{type(module).__name__} of a sharded model can't be called: its weights are in a worker; call the whole model"
    )


@functools.cache
def face_class(real: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Make the class whose instances are sharded models and instances of ``real`` both, under its name."""
    return type(real.__name__, (ShardedCausalLM, real), {"__module__": real.__module__, "__doc__": real.__doc__})


def wear_face(meta: PreTrainedModel, pipeline: Pipeline, parts: ModelParts, *, owns_cluster: bool) -> ShardedCausalLM:
    """Turn a model on the meta device into one that runs in a pipeline.

    Parameters
    ----------
    meta : PreTrainedModel
        The whole model on the meta device: names, shapes and dtypes, no memory.
    pipeline : Pipeline
        Where its layers are.
    parts : ModelParts
        Their names.
    owns_cluster : bool
        Whether the cluster ends with the model.

    Returns
    -------
    ShardedCausalLM
        The same object; its submodules refuse to be called.
    """
    num_positions = learned_positions(meta)
    for module in meta.modules():
        if module is not meta:
            module.register_forward_pre_hook(_refuse_call)
    model: Any = meta.eval()
    model.__class__ = face_class(type(meta))
    model._pipeline, model._parts = pipeline, parts
    model._owns_cluster, model._num_positions = owns_cluster, num_positions
    return cast("ShardedCausalLM", model)
