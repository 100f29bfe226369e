"""Transformers' loop of greedy decoding and sampling, in which the stages choose tokens and go on with them by themselves.

Knows transformers' loop, its processors and criteria; neither messages nor how a session runs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AsyncTextIteratorStreamer,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMixin
from transformers.utils import ModelOutput

from lingualinked.cluster.runs.run_request import RunRequest
from lingualinked.cluster.sessions.session import Session
from lingualinked.cluster.sessions.split_session import SplitSession
from lingualinked.model.process.torch_settings import read_torch_settings
from lingualinked.model.sampling.processor_data import ProcessorSpec
from lingualinked.model.sampling.processors import describe_processors
from lingualinked.sharded.calling.cache import ShardedCache, ShardedDynamicCache
from lingualinked.sharded.generating.asked_run import AskedRun, asking
from lingualinked.sharded.generating.random_loans import RandomLoan

_MOST_STEPS = 64  # of one run, so that room for KV is not held for long
_STREAMERS = (TextStreamer, TextIteratorStreamer, AsyncTextIteratorStreamer, type(None))
_KNOWN_TO_STAGES = (MaxLengthCriteria, EosTokenCriteria)
_OWN_CRITERIA = (*_KNOWN_TO_STAGES, MaxTimeCriteria, StopStringCriteria)
_OF_A_STEP = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
_OF_A_DECODERS_STEP = {
    "attention_mask",
    "decoder_attention_mask",
    "decoder_input_ids",
    "encoder_outputs",
    "past_key_values",
    "use_cache",
}


@dataclasses.dataclass(slots=True, kw_only=True)
class LoopArguments:
    """The arguments of transformers' ``_sample``."""

    input_ids: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    streamer: Any
    model_kwargs: dict[str, Any]


class TokenLoop:
    """One call's loop; `of` finds out whether the stages can take a part in it."""

    def __init__(self, model: Any, given: LoopArguments, specs: tuple[ProcessorSpec, ...], cache: ShardedCache) -> None:
        self._model, self._given, self._specs, self._cache = model, given, specs, cache
        self._ids, self._kwargs = given.input_ids, given.model_kwargs
        self._num_rows = len(self._ids)
        self._has_source = bool(model.config.is_encoder_decoder)
        self._unfinished = torch.ones(self._num_rows, dtype=torch.long)
        eos = [each.eos_token_id.flatten() for each in given.criteria if type(each) is EosTokenCriteria]
        self._eos = torch.cat(eos) if eos else torch.empty(0, dtype=torch.long)
        self._pads = any(hasattr(each, "eos_token_id") for each in given.criteria)
        pad = given.config._pad_token_tensor  # noqa: SLF001 - as transformers' loop
        self._pad = 0 if pad is None else int(pad)
        self._max_length = min(
            (each.max_length for each in given.criteria if type(each) is MaxLengthCriteria), default=None
        )
        self._calls_user = type(given.streamer) not in _STREAMERS or not all(
            type(each) in _OWN_CRITERIA for each in given.criteria
        )
        self._loan: RandomLoan | None = None  # while a loop that samples runs
        self._can_undo = _can_undo(cache)
        self._state: object = None  # of the model, as the run in progress knows it

    @classmethod
    def of(cls, model: Any, given: LoopArguments) -> TokenLoop | None:
        """Return the loop of a call; None if all of it has to run in this process, as transformers has it."""
        config, cache = given.config, given.model_kwargs.get("past_key_values")
        if not isinstance(cache, ShardedCache) or not config.use_cache or not _calls_own_methods(model):
            return None
        if not isinstance(cache.session, Session | SplitSession):
            return None
        if config.return_dict_in_generate and model.config.is_encoder_decoder:
            return None  # it returns another class, with what the encoder has recorded
        records = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
        if config.return_dict_in_generate and any(getattr(config, name) for name in records):
            return None
        specs = describe_processors(given.processors) if type(given.processors) is LogitsProcessorList else None
        if specs is None or type(given.criteria) is not StoppingCriteriaList:
            return None
        loop = cls(model, given, specs, cache)
        if loop._pads and (not len(loop._eos) or config._pad_token_tensor is None):  # noqa: SLF001
            return None
        if loop._pads and not 0 <= loop._pad < model.config.get_text_config().vocab_size:
            return None  # it is no token that a stage may send
        is_split = isinstance(cache.session, SplitSession) and len(cache.session.microbatches) > 1
        needs_undo = (
            config.do_sample
            or loop._calls_user
            or (is_split and len(loop._eos) > 0)  # a microbatch does not know when all rows have met one
            or any(type(each) not in _KNOWN_TO_STAGES for each in given.criteria)
        )
        return None if needs_undo and not loop._can_undo else loop

    def run(self) -> GenerateDecoderOnlyOutput | Tensor:
        """Run the loop; return what transformers' loop returns."""
        model, config, streamer = self._model, self._given.config, self._given.streamer
        try:
            if config.do_sample:
                self._loan = RandomLoan(self._num_rows, model.config.get_text_config().vocab_size)
            # 1) the prompt
            asked = self._ask(self._prompt_length())
            with asking(asked):
                outputs = model._prefill(  # noqa: SLF001 - transformers' loop calls it so
                    self._ids, config, self._kwargs, is_first_iteration=not config.is_assistant
                )
            # 2) one token after the other: chosen here, or by the stages as long as they go on
            while self._take_tokens(outputs, asked):
                asked = self._ask(self._cache.get_seq_length() + 1)
                inputs = model.prepare_inputs_for_generation(self._ids, next_sequence_length=1, **self._kwargs)
                with asking(asked):
                    outputs = model(**inputs, return_dict=True)
        finally:
            if self._loan is not None:
                self._loan.close()
        if streamer is not None:
            streamer.end()
        if config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=self._ids, past_key_values=self._kwargs.get("past_key_values"))  # type: ignore[arg-type]
        return self._ids

    def _prompt_length(self) -> int:
        """Return how many tokens the KV will hold behind the prompt."""
        if self._has_source:  # whose mask is not that of the text
            return self._ids.shape[1]
        embeddings = self._kwargs.get("inputs_embeds")
        mask = self._kwargs.get("attention_mask")
        length = int(self._given.config._mask_length or 0) if mask is None else mask.shape[1]  # noqa: SLF001 - transformers sets it
        return length if embeddings is None else max(length, embeddings.shape[1])

    def _ask(self, num_tokens: int) -> AskedRun | None:
        """Return the run that the next step is to begin, which ends with so many tokens; None if it can't begin one."""
        if self._loan is not None and not self._loan.may_lend():
            return None
        upcoming = self._upcoming()
        if upcoming is None:
            return None
        self._state = self._model_state() if self._calls_user else None
        left = _MOST_STEPS if self._max_length is None else self._max_length - self._ids.shape[1]

        def make(num_steps: int) -> RunRequest:
            return RunRequest(
                num_steps=num_steps,
                processors=self._specs,
                input_ids=self._ids,
                random_state=None if self._loan is None else self._loan.lend(),
                unfinished=tuple(map(bool, self._unfinished.tolist())),
                eos_token_ids=tuple(self._eos.tolist()),
                pad_token_id=self._pad,
                upcoming=upcoming,
                can_undo=self._can_undo,
            )

        return AskedRun(self._model, num_tokens, make, max(1, min(left, _MOST_STEPS)))

    def _upcoming(self) -> tuple[tuple[Tensor | None, Tensor | None], ...] | None:
        """Return the masks and positions of the two steps behind the next one; None if they take other arguments too."""
        ids, kwargs, found = self._ids, self._kwargs, []
        for _ in range(2):
            ids = torch.cat([ids, ids.new_zeros(self._num_rows, 1)], dim=-1)
            kwargs = self._updated(kwargs)
            inputs = self._model.prepare_inputs_for_generation(ids, next_sequence_length=1, **kwargs)
            known = _OF_A_DECODERS_STEP if self._has_source else _OF_A_STEP
            others = {name for name, value in inputs.items() if value is not None and name not in known}
            if others and not self._model._further.are_unused(others):  # noqa: SLF001 - within the room
                return None
            mask = inputs.get("decoder_attention_mask" if self._has_source else "attention_mask")
            found.append((mask, inputs.get("position_ids")))
        return tuple(found)

    def _updated(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the model behind one more token."""
        outputs = ModelOutput(past_key_values=self._cache)
        updated: dict[str, Any] = self._model._update_model_kwargs_for_generation(outputs, dict(kwargs))  # noqa: SLF001
        updated.pop("inputs_embeds", None)  # of the prompt alone
        return updated

    def _take_tokens(self, outputs: Any, asked: AskedRun | None) -> bool:
        """Take the token behind a step, or those of the run that it has begun; return whether the loop goes on."""
        update = self._model._update_model_kwargs_for_generation  # noqa: SLF001
        run = None if asked is None else asked.flight
        if run is None:
            self._kwargs = update(outputs, self._kwargs)
            return self._choose(outputs.logits)
        stage_unfinished = self._unfinished
        try:
            while run.await_tokens():
                if self._loan is not None and run.has_chosen and not self._loan.receive_token():
                    break
                chosen = run.take_tokens()
                self._kwargs = update(outputs, self._kwargs)
                if chosen.tokens is None:
                    assert chosen.logits is not None
                    return self._choose(chosen.logits)
                stage_unfinished = stage_unfinished & ~torch.isin(chosen.tokens, self._eos)
                if not self._append(chosen.tokens):
                    return False
                if self._pads and not torch.equal(stage_unfinished, self._unfinished):
                    break
                if run.is_finished or (self._calls_user and self._model_state() != self._state):
                    break
        finally:
            run.finish()
        return True

    def _choose(self, logits: Tensor) -> bool:
        """Choose a token of each row here; return whether the loop goes on."""
        scores = self._given.processors(self._ids, logits[:, -1].to(copy=True, dtype=torch.float32))  # type: ignore[arg-type]
        if self._loan is None:
            tokens = torch.argmax(scores, dim=-1)
        else:
            tokens = self._loan.draw(torch.nn.functional.softmax(scores, dim=-1))
        if self._pads:
            tokens = tokens * self._unfinished + self._pad * (1 - self._unfinished)
        return self._append(tokens)

    def _append(self, tokens: Tensor) -> bool:
        """Append a token to each row, and stream it; return whether a row is not finished."""
        self._ids = torch.cat([self._ids, tokens[:, None]], dim=-1)
        self._unfinished = self._unfinished & ~self._given.criteria(self._ids, None)
        if self._given.streamer is not None:
            self._given.streamer.put(tokens.cpu())
        return bool(self._unfinished.max())

    def _model_state(self) -> tuple[object, ...]:
        """Return what a user's own code can change between two tokens, and the steps of a run do not see."""
        model = self._model
        return (
            model._pipeline.edits.revision,  # noqa: SLF001 - within the room
            bool(model._hooked_modules),  # noqa: SLF001
            bool(model._open_blocks),  # noqa: SLF001
            model._use_adapters(None, self._num_rows),  # noqa: SLF001
            read_torch_settings(),
            _calls_own_methods(model),
        )


def _can_undo(cache: ShardedCache) -> bool:
    """Return whether tokens can be dropped from the end of a KV cache, whatever its length."""
    return isinstance(cache, ShardedDynamicCache) and cache.can_crop


def _calls_own_methods(model: Any) -> bool:
    """Return whether a step is what it seems to be: no hooks on the whole model, and no methods but transformers' and ours."""
    own = vars(model)
    if any(name in own for name in ("forward", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")):
        return False
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return False
    # Phi-3 has one of its own, which forgets the KV at a length.
    names = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
    bases = [each for each in type(model).__mro__[1:] if not each.__module__.startswith("lingualinked.")]
    return all(name not in vars(base) for base in bases for name in names if base is not GenerationMixin)
