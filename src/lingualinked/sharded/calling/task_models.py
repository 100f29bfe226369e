"""Calls of models that do not generate: with the head of a task, such as sentiment, or without any head (embeddings).

The workers send what the head gives for each token. All that the class does with it, such as pooling and the loss, its own forward does in
this process, around a step in place of the base model. Knows transformers' calls and outputs; a pipeline runs the layers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from lingualinked.errors import ArgumentError
from lingualinked.model.cutting.heads import cache_argument_of
from lingualinked.model.hf_internals.cache_arguments import cache_argument
from lingualinked.sharded.adapters.model_adapters import Adapters
from lingualinked.sharded.calling.inputs import check_tensor
from lingualinked.sharded.calling.outputs import LOSS_ARGUMENTS, base_output_class
from lingualinked.sharded.calling.stepping import ShardedSteps
from lingualinked.sharded.sealed.conversions import Conversions
from lingualinked.sharded.sealed.sealing import SealedModel
from lingualinked.sharded.sealed.unsupported import UnsupportedOperations, refusal
from lingualinked.sharded.weights.saving import Saving

if TYPE_CHECKING:
    pass

_LABELS = ("labels", "start_positions", "end_positions")
_OF_THE_STEP = (
    "attention_mask",
    "input_ids",
    "inputs_embeds",
    "past_key_values",
    "position_ids",
    "use_cache",
)


if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ShardedTaskModel(SealedModel, Adapters, Conversions, Saving, UnsupportedOperations, ShardedSteps):
    """The overrides of the class of a sharded model that does not generate; comes before the transformers class."""

    if TYPE_CHECKING:  # transformers evaluates the annotations of its subclasses
        _real_class: Any
        base_model: Any
        base_model_prefix: str

    def forward(self, **arguments: Any) -> Any:
        """Run one step through all stages, with the arguments and the result of the model's own class.

        Parameters
        ----------
        **arguments
            Those of the class: ``input_ids`` or ``inputs_embeds``, ``attention_mask``, ``position_ids``, ``past_key_values``,
            ``use_cache`` and ``return_dict``, where it has them, as in a sharded causal LM; its labels (``labels``, or
            ``start_positions`` and ``end_positions``) and what its loss takes; ``output_hidden_states``, ``output_attentions``.

        Returns
        -------
        ModelOutput or tuple
            As the class does: logits of each text, of each token, or of the start and the end of an answer; or the last hidden
            states. With ``loss`` if labels are given, computed in this process by the class.

        Raises
        ------
        ArgumentError
            If ids are missing, empty, outside the vocabulary or exceed the learned positions; if another tensor has the wrong
            shape or no data; if the class has no such argument.
        UnsupportedOperationError
            If an argument has no sharded counterpart, or the model was changed in a way that would have no effect.
        ClosedError, WorkerError
            If the model is closed, or a stage failed.
        """
        self._check_callable()
        if self._cache_name is not None and "past_key_values" in arguments:
            arguments[self._cache_name] = arguments.pop("past_key_values")
        forward = self._real_class.forward
        parameters = inspect.signature(forward).parameters
        for name, value in arguments.items():
            if name not in parameters and not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
                raise ArgumentError(
                    f"unknown argument {name!r} of forward of {self._real_class.__name__}: leave it out"
                )
            if name in _LABELS and value is not None:
                arguments[name] = check_tensor(name, value)
        if self._parts.head is None:
            return self._run_headless(**arguments)
        ids, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
        if (ids is None) == (embeddings is None):
            raise ArgumentError("give exactly one: input_ids or inputs_embeds")
        return forward(CalledByClass(self, self._parts.head, self._answer_base), **arguments)

    generate = refusal(
        "generate", "it has the head of another task, or none; load the checkpoint with task='text-generation'"
    )
    generate_batch = refusal("generate_batch", "load the checkpoint with task='text-generation'")

    def _run_headless(self, *, return_dict: bool | None = None, **arguments: Any) -> Any:
        """Run a model without a head."""
        output, _ = self._answer_base(**arguments)
        as_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _answer_base(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Run a step for a call of the base model by the class's forward; return its output, and what the head gave."""
        names = list(inspect.signature(_real_class_of(self.base_model).forward).parameters)[1:]
        kwargs.pop("return_dict", None)  # a ModelOutput can be indexed like a tuple
        arguments = dict(zip(names, args, strict=False), **kwargs)
        if self._base_cache_name in arguments:
            arguments["past_key_values"] = arguments.pop(self._base_cache_name)
        return self._run_as_base(**arguments)

    def _run_as_base(self, **arguments: Any) -> tuple[Any, Tensor]:
        """Run a step with the arguments of the base model; return its output, and what is given for each token."""
        given = {name: arguments.pop(name, None) for name in _OF_THE_STEP}
        others = {name: value for name, value in arguments.items() if name not in LOSS_ARGUMENTS}
        step = self._check_step(
            given["input_ids"],
            given["inputs_embeds"],
            given["attention_mask"],
            given["position_ids"],
            given["past_key_values"],
            others,
        )
        use_cache = given["use_cache"]
        keeps_kv = step.past is not None or (self._asks_for_kv(use_cache) and self._takes_kv)
        result = self._run_step(step, keep=0, use_cache=use_cache, keeps_kv=keeps_kv)
        assert result.output is not None
        output = states = result.output
        if self._parts.head is not None:  # only the stages have the real ones
            width = self.config.get_text_config().hidden_size
            states = states.new_zeros(()).expand(*states.shape[:2], width)
        past = {self._base_cache_name or "": result.cache} if keeps_kv else {}
        return self._base_output(last_hidden_state=states, **past, **result.recorded), output

    @functools.cached_property
    def _base_cache_name(self) -> str | None:
        return cache_argument(_real_class_of(self.base_model))

    @functools.cached_property
    def _takes_kv(self) -> bool:
        """Whether the class can be given KV; else each call of the base model makes its own, and nobody gets it."""
        return cache_argument_of(cast("PreTrainedModel", self)) is not None

    @functools.cached_property
    def _base_output(self) -> type[Any]:
        real = self._real_class if self._parts.head is None else _real_class_of(self.base_model)
        return base_output_class(real)


class CalledByClass:
    """A model as its class's own forward sees it: a step stands for the base model, and what it gave for the head.

    All other modules with weights run in the last stage, before the head.
    """

    def __init__(self, model: Any, head: str, answer_base: Callable[..., tuple[Any, Tensor]]) -> None:
        self._model, self._head, self._answer_base = model, head, answer_base
        self._output: Tensor | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # for super() in the code of the class
        return type(self._model)

    def __getattr__(self, name: str) -> Any:
        if name == self._model.base_model_prefix:
            return self._run_base
        if name == self._head:
            return self._return_output
        if name in vars(self._model)["_modules"]:
            return _return_input
        return getattr(self._model, name)

    def _run_base(self, *args: Any, **kwargs: Any) -> Any:
        output, self._output = self._answer_base(*args, **kwargs)
        return output

    def _return_output(self, *_: Any, **__: Any) -> Tensor:
        assert self._output is not None
        return self._output


def _return_input(first: Any, *_: Any, **__: Any) -> Any:
    return first


def _real_class_of(sealed: Any) -> Any:
    """Return the class of transformers that the class of a sealed module was made from."""
    return vars(type(sealed)).get("_stands_for", type(sealed))
