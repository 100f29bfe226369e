"""One conversation with a model, whole or cut into stages in this process, and what tests let it say.

Both sides are called as transformers' ``generate`` would call a model; knows no workers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, DynamicCache, PreTrainedModel, StaticCache

import accelerators
from architectures import spec_of_config
from families import VOCABULARY, tiny_config
from lingualinked.cluster.steps.step_extras import StepExtras
from lingualinked.model.cutting.architectures import check_architecture
from lingualinked.model.cutting.tasks import class_of_task
from lingualinked.model.hf_internals.cache_arguments import cache_argument, supports_cache
from lingualinked.model.process.torch_settings import TorchSettings
from lingualinked.model.spec import ModelSpec
from lingualinked.model.stages.chaining import run_chained
from lingualinked.model.stages.stage import Stage
from lingualinked.model.stages.stage_data import StageInputs
from lingualinked.model.weights.checkpoint import resolve_dtype, resolve_files


def spec_of(
    folder: Path, *, dtype: str = "auto", attn_implementation: str | None = None, **config_attributes: object
) -> ModelSpec:
    """Describe a checkpoint as the caller's side does."""
    config = AutoConfig.from_pretrained(folder, **config_attributes)
    files = resolve_files(folder)
    return ModelSpec(
        class_name=class_of_task(config, None, check_architecture(config)),
        config_json=config.to_json_string(use_diff=False),
        dtype=resolve_dtype(dtype, config, files),
        attn_implementation=attn_implementation,
        load_format="safetensors",
        files=files,
    )


def dummy_spec(family: str, dtype: str, **config_attributes: object) -> ModelSpec:
    """Describe a tiny model of a family, of random weights that lie in no file."""
    config = tiny_config(family)
    config.update(config_attributes)
    return spec_of_config(config, dtype)


def load_stages(spec: ModelSpec, num_stages: int, num_layers: int) -> list[Stage]:
    """Load a model in so many stages of about the same depth."""
    ends = [round(index * num_layers / num_stages) for index in range(num_stages + 1)]
    return [load_stage(spec, start, end) for start, end in itertools.pairwise(ends)]


def load_stage(spec: ModelSpec, start: int, end: int, shared: Sequence[Stage] = ()) -> Stage:
    """Load one stage, where the tests' models compute."""
    return Stage.load(spec, start, end, accelerator=accelerators.chosen, shared=shared)


NO_EXTRAS = StepExtras()


class Whole:
    """A conversation with the unsharded model; its KV cache is static if it has a length."""

    def __init__(
        self, model: PreTrainedModel, *, keeps_kv: bool = True, records_past: bool = False, max_cache_len: int = 0
    ) -> None:
        self.model = model
        self.max_cache_len = max_cache_len
        self._keeps_own = keeps_kv and not supports_cache(type(model))
        self.cache = DynamicCache(config=model.config) if keeps_kv and not self._keeps_own else None
        if max_cache_len:
            self.cache = StaticCache(config=model.config, max_cache_len=max_cache_len)
        if records_past:
            self.cache.activate_past_recording()

    @torch.no_grad()
    def step(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        keep: int | Tensor = 0,
        **others: Tensor,
    ) -> Tensor:
        """Return the logits of new tokens."""
        which = "inputs_embeds" if tokens.is_floating_point() else "input_ids"
        name = cache_argument(type(self.model)) or "past_key_values"
        output = self.model(
            **{which: tokens},
            attention_mask=mask,
            **{name: self.cache},
            use_cache=self.cache is not None or self._keeps_own,
            logits_to_keep=keep,
            **({} if positions is None else {"position_ids": positions}),
            **others,
        )
        if self._keeps_own:
            self.cache = output.get(name)
        return output.logits  # type: ignore[no-any-return]

    def reorder(self, rows: Tensor) -> None:
        """Reorder the KV cache."""
        self.cache.reorder_cache(rows)

    def crop(self, num_tokens: int) -> None:
        """Remove tokens at the end of the KV cache."""
        self.cache.crop(-num_tokens)  # transformers' sign


class Cut:
    """A conversation with stages, chained."""

    def __init__(
        self, stages: Sequence[Stage], *, keeps_kv: bool = True, records_past: bool = False, max_cache_len: int = 0
    ) -> None:
        self.stages = stages
        self.max_cache_len = max_cache_len
        self.torch_settings: TorchSettings = {}  # of the caller
        self.source: dict[str, Tensor] = {}  # further arguments of all stages and steps
        self.caches = [stage.new_cache(max_cache_len=max_cache_len) if keeps_kv else None for stage in stages]
        if records_past:
            for cache in self.caches:
                cache.record_past(True)

    def step(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        keep: int | Tensor = 0,
        *,
        wants_logits: bool = True,
        extras: StepExtras = NO_EXTRAS,
    ) -> Tensor:
        """Return the logits of new tokens, or an empty tensor; only a stage's output reaches the next one."""
        inputs = StageInputs(
            tensors=(tokens,),
            layout=None,
            attention_mask=mask,
            position_ids=positions,
            logits_to_keep=keep,
            wants_logits=wants_logits,
            torch_settings=self.torch_settings,
            extras={**self.source, **extras.for_all},
            picture_copies=extras.picture_copies,
        )
        tensors = run_chained(self.stages, self.caches, inputs, extras.for_first)
        if not wants_logits:
            assert not tensors
            return torch.empty(0)
        (logits,) = tensors
        return logits

    def reorder(self, rows: Tensor) -> None:
        """Reorder every stage's KV cache."""
        for cache in self.caches:
            cache.reorder(rows)

    def crop(self, num_tokens: int) -> None:
        """Remove tokens at the end of every stage's KV cache."""
        for cache in self.caches:
            cache.crop(num_tokens)


def prompt(num_rows: int, num_tokens: int) -> Tensor:
    """Make token ids [rows, tokens], always the same."""
    generator = torch.Generator().manual_seed(num_rows * 1000 + num_tokens)
    return torch.randint(3, VOCABULARY, (num_rows, num_tokens), generator=generator)


def positions_of(mask: Tensor, num_new: int) -> Tensor:
    """Count positions in a padding mask [rows, tokens], as ``generate`` does."""
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)[:, -num_new:]


def extend(mask: Tensor, num_new: int) -> Tensor:
    """Add new tokens to a padding mask."""
    return torch.cat([mask, mask.new_ones(len(mask), num_new)], dim=1)


def greedy(conversation: Whole | Cut, num_new: int = 16) -> list[Tensor]:
    """Prefill one row and decode greedily; return all logits."""
    tokens = prompt(1, 9)
    mask = torch.ones_like(tokens)
    logits = [conversation.step(tokens, mask, positions_of(mask, 9))]
    for _ in range(num_new):
        mask = extend(mask, 1)
        logits.append(conversation.step(logits[-1][:, -1:].argmax(-1), mask, positions_of(mask, 1), 1))
    return logits


def in_chunks(conversation: Whole | Cut, mask_width: int = 0) -> list[Tensor]:
    """Prefill a left-padded batch in chunks, and decode; give the logits of the last chunk and of the token behind it.

    A cut model computes no other logits. Masks are filled up to a width, if there is one.
    """
    tokens = prompt(3, 12)
    logits = []
    for end in (5, 10, 12, 13):
        chunk = tokens[:, :end][:, 5 * ((end - 1) // 5) :] if end < 13 else prompt(3, 1)
        mask = torch.ones(3, end, dtype=torch.long)
        mask[1, :3] = mask[2, :7] = 0
        wide = torch.nn.functional.pad(mask, (0, max(0, mask_width - end)))
        silent = {"wants_logits": False} if isinstance(conversation, Cut) and end < 12 else {}
        logits.append(conversation.step(chunk, wide, positions_of(mask, chunk.shape[1]), 1, **silent))
    return logits[2:]


def beam_and_back(conversation: Whole | Cut) -> list[Tensor]:
    """Prefill a left-padded batch, decode, reorder, crop, continue with several tokens; give all logits.

    The conversation has to record the past.
    """
    tokens = prompt(3, 9)
    mask = torch.ones_like(tokens)
    mask[1, :3] = mask[2, :7] = 0
    logits = [conversation.step(tokens, mask, positions_of(mask, 9))]
    for rows in ([0, 0, 2], [1, 2, 2], [0, 1, 2]):
        mask = extend(mask, 1)
        logits.append(conversation.step(logits[-1][:, -1:].argmax(-1), mask, positions_of(mask, 1)))
        conversation.reorder(torch.tensor(rows))
        mask = mask[rows]
        conversation.crop(0)
    for num_removed in (2, 1):
        mask = extend(mask, 3)
        logits.append(conversation.step(prompt(3, 3), mask, positions_of(mask, 3)))
        conversation.crop(num_removed)
        mask = mask[:, :-num_removed]
    mask = extend(mask, 1)
    logits.append(conversation.step(prompt(3, 1), mask, positions_of(mask, 1), torch.tensor([0])))
    return logits


def beams(conversation: Whole | Cut, lengths: Sequence[int] = (1, 1, 1, 4, 1), mask_width: int = 0) -> list[Tensor]:
    """Prefill a left-padded batch, and continue by steps of so many tokens, with other rows before each; give all logits.

    Masks are filled up to a width, if there is one.
    """
    mask = torch.ones(3, 0, dtype=torch.long)
    logits = []
    for index, num_new in enumerate((9, *lengths)):
        mask = extend(mask, num_new)
        if index == 0:
            mask[1, :3] = mask[2, :7] = 0
        else:
            rows = torch.tensor([[0, 0, 2], [1, 2, 2], [0, 1, 2]][index % 3])
            conversation.reorder(rows)
            mask = mask[rows]
        wide = torch.nn.functional.pad(mask, (0, max(0, mask_width - mask.shape[1])))
        logits.append(conversation.step(prompt(3, num_new), wide, positions_of(mask, num_new)))
    return logits


def assert_equal(cut: list[Tensor], whole: list[Tensor]) -> None:
    """Compare the logits of a conversation's steps, bit for bit."""
    for step, (ours, theirs) in enumerate(zip(cut, whole, strict=True)):
        assert torch.equal(ours, theirs), f"step {step} differs by up to {(ours.float() - theirs.float()).abs().max()}"
