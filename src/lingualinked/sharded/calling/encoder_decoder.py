"""An encoder-decoder model of two pipelines: its encoder, which can be called by itself, and the ``forward`` around both.

Knows transformers' calls and outputs; each pipeline runs the layers of one stack.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from lingualinked.cluster.steps.step_extras import StepExtras
from lingualinked.errors import ArgumentError, ClosedError, UnsupportedOperationError
from lingualinked.model.context import SOURCE, SOURCE_MASK
from lingualinked.sharded.calling.forward import ShardedCausalLM, make_sharded
from lingualinked.sharded.calling.inputs import check_tensor
from lingualinked.sharded.calling.outputs import IGNORED
from lingualinked.sharded.sealed.stand_in_class import make_stand_in
from lingualinked.sharded.sealed.unsupported import refusal

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from lingualinked.cluster.pipeline import Pipeline
    from lingualinked.device import Device, Links
    from lingualinked.model.cutting.model_parts import ModelParts
    from lingualinked.planning.plan import Plan
    from lingualinked.sharded.calling.stepping import CheckedStep
    from lingualinked.sharded.loading.model_code import ModelCode
    from lingualinked.telemetry.decisions import Decision

_OF_BOTH = ("output_hidden_states",)


class Stacked(NamedTuple):
    """One stack of a model, loaded into its pipeline."""

    meta: PreTrainedModel
    pipeline: Pipeline
    parts: ModelParts
    code: ModelCode


class CallableEncoder:
    """Mixin for the class of an encoder's module, which runs in its pipeline if it is called."""

    if TYPE_CHECKING:
        _encoder_model: weakref.ref[Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the encoder in the workers; hooks run there, too, where they are."""
        return self.forward(*args, **kwargs)

    @property
    def plan(self) -> Plan:
        """Which device holds which of the encoder's layers."""
        return self._model().plan  # type: ignore[no-any-return]

    def rebalance(self, plan: Plan | None = None, *, dry_run: bool = False) -> Decision:
        """Move the encoder's layers, as `ShardedModel.rebalance` does those of the decoder."""
        return self._model().rebalance(plan, dry_run=dry_run)  # type: ignore[no-any-return]

    def _model(self) -> Any:
        model = self._encoder_model()
        if model is None:
            raise ClosedError("the model of this encoder is closed: load it again with from_pretrained")
        return model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Run the encoder over a source ``[rows, tokens]``; return what transformers' encoder does."""
        model = self._model()
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            return_dict=True,
            **kwargs,
        )
        result = BaseModelOutput(
            last_hidden_state=output.logits, hidden_states=output.hidden_states, attentions=output.attentions
        )
        as_dict = getattr(model.config, "return_dict", True) if return_dict is None else return_dict
        return result if as_dict else result.to_tuple()


class ShardedEncoderDecoder(ShardedCausalLM):
    """The overrides of the class of a sharded encoder-decoder model, whose pipeline is the decoder's."""

    if TYPE_CHECKING:  # transformers evaluates the annotations of its subclasses
        _encoder_model: Any
        get_encoder: Any
        base_model: Any

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encode the source, unless that is done, and run one step of the decoder, with transformers' arguments and result.

        Raises what `ShardedCausalLM.forward` does.
        """
        # 1) find out what the decoder is to read
        self._check_callable()
        if kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)):
            raise UnsupportedOperationError(
                "output_attentions of a sharded encoder-decoder model is not supported: leave it out, or call get_encoder() with it"
            )
        targets = None if labels is None else check_tensor("labels", labels).long()
        if targets is not None and "use_cache = False" in _source_of(self):
            use_cache = False
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self._shifted(input_ids, targets)
        # 2) encode the source
        if encoder_outputs is None:
            both = {name: kwargs[name] for name in _OF_BOTH if name in kwargs}
            encoder_outputs = self.get_encoder()(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                return_dict=True,
                **both,
            )
        elif not isinstance(encoder_outputs, ModelOutput):
            names = ("last_hidden_state", "hidden_states", "attentions")
            encoder_outputs = BaseModelOutput(**dict(zip(names, encoder_outputs, strict=False)))
        # 3) run the step of the decoder
        step = self._check_step(
            decoder_input_ids, decoder_inputs_embeds, decoder_attention_mask, None, past_key_values, kwargs
        )
        step = dataclasses.replace(step, extras=self._source(step, encoder_outputs[0], attention_mask))
        asks_for_kv = bool(getattr(self.config, "use_cache", True) if use_cache is None else use_cache)
        result = self._run_step(step, keep=0, use_cache=use_cache, keeps_kv=step.past is not None or asks_for_kv)
        if step.extras is not None and SOURCE_MASK in step.extras.for_all:
            result.cache.source_mask = step.extras.for_all[SOURCE_MASK]
        # 4) compute the loss here, and return the class's own output
        loss = None
        if targets is not None and result.output is not None:
            loss = torch.nn.functional.cross_entropy(
                result.output.flatten(0, 1), targets.flatten(), ignore_index=IGNORED
            )
        output: Any = self._output_class(
            loss=loss,
            logits=result.output,
            past_key_values=result.cache if asks_for_kv or step.past is not None else None,
            decoder_hidden_states=result.recorded.get("hidden_states"),
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=encoder_outputs.get("hidden_states"),
            encoder_attentions=encoder_outputs.get("attentions"),
        )
        as_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _source(self, step: CheckedStep, states: object, mask: object) -> StepExtras | None:
        """Check what the encoder has made and its mask; return what of them the stages do not have."""
        source = check_tensor("encoder_outputs", states)
        width = self._embedding_shape[1]
        if source.ndim != 3 or source.shape[::2] != (step.shape.rows, width) or not source.shape[1]:
            raise ArgumentError(
                f"encoder_outputs of shape {tuple(source.shape)} must be {(step.shape.rows, 'tokens', width)}: as many rows "
                "as the decoder's text"
            )
        given: dict[str, Tensor] = {} if step.shape.past else {SOURCE: source}
        known = getattr(step.past, "source_mask", None) if step.shape.past else None
        if mask is not None:
            checked = check_tensor("attention_mask", mask)
            if checked.shape != source.shape[:2]:
                raise ArgumentError(
                    f"attention_mask of shape {tuple(checked.shape)} must be {tuple(source.shape[:2])}: that of the source"
                )
            if known is None or not torch.equal(known, checked):
                given[SOURCE_MASK] = checked
        elif known is not None:
            given[SOURCE_MASK] = torch.ones(source.shape[:2], dtype=torch.long)
        return StepExtras(for_all=given) if given else None

    def _shifted(self, input_ids: Tensor | None, labels: Tensor | None) -> Tensor:
        """Return the ids that the class makes for the decoder where none are given."""
        ids = labels
        base = self.base_model
        if ids is None and base is not self and "shift_tokens_right(" in _source_of(base):
            ids = None if input_ids is None else check_tensor("input_ids", input_ids)
        if ids is None:
            raise ArgumentError("give decoder_input_ids, decoder_inputs_embeds or labels: what the decoder is to read")
        own = getattr(self, "prepare_decoder_input_ids_from_labels", None)
        if own is not None:
            return own(ids)  # type: ignore[no-any-return]
        shift = vars(sys.modules[type(self).__module__])["shift_tokens_right"]
        return shift(ids, self.config.pad_token_id, self.config.decoder_start_token_id)  # type: ignore[no-any-return]

    def _prepare_cache_for_generation(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> None:
        """Refuse a static KV cache by name, and open a session where transformers would make a cache."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise UnsupportedOperationError(
                f"cache_implementation={generation_config.cache_implementation!r} of a sharded encoder-decoder model is not "
                "supported: leave it out"
            )
        super()._prepare_cache_for_generation(generation_config, *args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate token ids as `ShardedGeneration.generate` does; all rows go through the stages together."""
        if kwargs.pop("num_microbatches", None) not in (None, 1):
            raise UnsupportedOperationError(
                "num_microbatches of a sharded encoder-decoder model is not supported: leave it out"
            )
        return super().generate(*args, **kwargs)

    def _choose_sizes(self, *_: Any) -> tuple[int, ...]:
        """Return no sizes of microbatches."""
        return ()

    load_adapter = refusal("load_adapter", "an adapter of an encoder-decoder model is not supported")

    def rebalance(self, plan: Plan | None = None, *, dry_run: bool = False) -> Decision:
        """Move the decoder's layers, as `ShardedModel.rebalance`; without a plan those of the encoder, too, if that pays."""
        if plan is None:
            self._encoder_model.rebalance(None, dry_run=dry_run)
        return super().rebalance(plan, dry_run=dry_run)  # type: ignore[misc, no-any-return]

    def release(self, device: str) -> Decision:
        """Move all layers of both stacks off a device, as `ShardedModel.release`; return the decision about the decoder."""
        self._encoder_model.release(device)
        return super().release(device)  # type: ignore[misc, no-any-return]

    def admit(self, device: Device | str, *, links: Links | None = None) -> Decision:
        """Use a device for both stacks, as `ShardedModel.admit`; return the decision about the decoder."""
        decision: Decision = super().admit(device, links=links)  # type: ignore[misc]
        self._encoder_model.admit(device if isinstance(device, str) else device.name)
        return decision

    def close(self) -> None:
        """Free the stages of both stacks, and close the model's private cluster if it has one."""
        self._encoder_model.close()
        super().close()  # type: ignore[misc]


def make_encoder_decoder(
    encoder: Stacked, decoder: Stacked, *, base: type, owns_cluster: bool
) -> ShardedEncoderDecoder:
    """Make the model of two stacks, each described and loaded into its pipeline; it is also an instance of ``base``.

    The encoder's module is that of a model of its own, whose pipeline runs it. ``owns_cluster`` says whether closing the
    model closes its cluster.
    """
    # 1) the encoder, whose module can be called
    encoder_model = make_sharded(*encoder, base=base, owns_cluster=False)
    path = encoder.parts.layers.rpartition(".")[0]
    module: Any = encoder_model.get_submodule(path)  # a PreTrainedModel by its real class
    kind = type(module)
    object.__setattr__(module, "__class__", make_stand_in(vars(kind)["_stands_for"], (CallableEncoder, kind), {}))
    vars(module)["_encoder_model"] = weakref.ref(encoder_model)
    # 2) the whole, of the class from which that of the decoder was derived
    real = type(decoder.meta).__bases__[0]
    model: Any = make_sharded(*decoder, base=base, owns_cluster=owns_cluster, real=real, own=ShardedEncoderDecoder)
    parent, _, name = path.rpartition(".")
    dict.__setitem__(vars(model.get_submodule(parent))["_modules"], name, module)
    vars(model)["_encoder_model"] = encoder_model
    return cast("ShardedEncoderDecoder", model)


def _source_of(module: Any) -> str:
    """Return the code of the forward of a module's real class."""
    return inspect.getsource(vars(type(module))["_stands_for"].forward)
