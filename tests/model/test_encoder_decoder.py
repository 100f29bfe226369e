"""Both stacks of an encoder-decoder model, cut into stages that are chained in this process, give the unsharded model's bits."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from conversations import Cut, assert_equal, extend, load_stages, prompt
from encoder_decoders import FAMILIES, NUM_LAYERS, reference, save_tiny, sources
from lingualinked.model.cutting.parts import build_meta, find_parts
from lingualinked.model.cutting.stacks import Stack
from lingualinked.model.spec import ModelSpec
from lingualinked.model.weights.checkpoint import resolve_dtype, resolve_files
from moves import Moving

pytestmark = [pytest.mark.equality, pytest.mark.slow]

Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folders: dict[tuple[str, torch.dtype], Path] = {}

    def folder(family: str, dtype: torch.dtype = torch.float32) -> Path:
        key = family, dtype
        if key not in folders:
            folders[key] = save_tiny(family, dtype, tmp_path_factory.mktemp(family))
        return folders[key]

    return folder


def spec_of(folder: Path, stack: Stack) -> ModelSpec:
    config, files = AutoConfig.from_pretrained(folder), resolve_files(folder)
    return ModelSpec(
        class_name=config.architectures[0],
        config_json=config.to_json_string(use_diff=False),
        dtype=resolve_dtype("auto", config, files),
        attn_implementation=None,
        load_format="safetensors",
        files=files,
        stack=stack,
    )


class WholeDecoder:
    """A conversation with the unsharded decoder about a source."""

    def __init__(self, model: PreTrainedModel, source: Tensor, mask: Tensor | None) -> None:
        self.model, self.source, self.mask = model, source, mask
        self.cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))

    @torch.no_grad()
    def step(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        return self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=self.source),
            attention_mask=self.mask,
            decoder_input_ids=tokens,
            decoder_attention_mask=mask,
            past_key_values=self.cache,
        ).logits

    def reorder(self, rows: Tensor) -> None:
        self.cache.reorder_cache(rows)

    def crop(self, num_tokens: int) -> None:
        self.cache.crop(-num_tokens)


class CutDecoder:
    """The same conversation with stages; only the first step is given what the encoder has made."""

    def __init__(self, cut: Cut, source: Tensor, mask: Tensor | None) -> None:
        self.cut, self.mask = cut, mask
        cut.source = {"encoder_hidden_states": source}

    def step(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if self.mask is not None:
            self.cut.source["encoder_attention_mask"] = self.mask
        logits = self.cut.step(tokens, mask, None)
        self.cut.source.pop("encoder_hidden_states", None)
        return logits

    def reorder(self, rows: Tensor) -> None:
        self.cut.reorder(rows)

    def crop(self, num_tokens: int) -> None:
        self.cut.crop(num_tokens)


def beams_and_back(conversation: WholeDecoder | CutDecoder) -> list[Tensor]:
    """Say the beginning of a text to three rows, decode with rows reordered as beams are, crop, and go on; give all logits."""
    tokens = prompt(3, 4)
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    logits = [conversation.step(tokens, mask)]
    for rows in ([0, 0, 2], [2, 2, 1], [1, 0, 2]):
        conversation.reorder(torch.tensor(rows))
        assert conversation.mask is not None
        mask, conversation.mask = extend(mask[rows], 1), conversation.mask[rows]
        logits.append(conversation.step(logits[-1][rows, -1:].argmax(-1), mask))
    conversation.crop(2)
    mask = extend(mask[:, :-2], 3)
    logits.append(conversation.step(prompt(3, 3), mask))
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_stacks_cut_anywhere_are_exact(family: str, dtype: torch.dtype, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family, dtype)
    model = reference(folder)
    tokens, mask = sources(3, 11)
    with torch.no_grad():
        source = model.get_encoder()(input_ids=tokens, attention_mask=mask).last_hidden_state
    said = beams_and_back(WholeDecoder(model, source, mask))
    for num_stages in (1, 2, 3):
        encoder = load_stages(spec_of(folder, "encoder"), num_stages, NUM_LAYERS["encoder"])
        assert_equal([Cut(encoder, keeps_kv=False).step(tokens, mask, None)], [source])
        decoder = load_stages(spec_of(folder, "decoder"), num_stages, NUM_LAYERS["decoder"])
        assert_equal(beams_and_back(CutDecoder(Cut(decoder), source, mask)), said)


@pytest.mark.parametrize("family", ["t5", "bart", "m2m-100"])
def test_moves_in_the_middle_of_a_text_are_exact(family: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family)
    model = reference(folder)
    source, mask = torch.randn(3, 300, 32), torch.ones(3, 300, dtype=torch.long)
    said = beams_and_back(WholeDecoder(model, source, mask))
    for seed in range(4):
        moving = Moving(spec_of(folder, "decoder"), random.Random(seed))
        assert_equal(beams_and_back(CutDecoder(moving, source, mask)), said)


def test_a_pass_without_kv_and_masks_is_exact(checkpoint: Checkpoint) -> None:
    folder = checkpoint("t5")
    model = reference(folder)
    source, tokens = torch.randn(2, 7, 32), prompt(2, 5)
    cut = Cut(load_stages(spec_of(folder, "decoder"), 2, NUM_LAYERS["decoder"]), keeps_kv=False)
    cut.source = {"encoder_hidden_states": source}
    with torch.no_grad():
        logits = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=source), decoder_input_ids=tokens, use_cache=False
        ).logits
    assert_equal([cut.step(tokens, None, None)], [logits])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stack_holds_nothing_of_the_other(family: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family)
    whole = sum(parameter.nbytes for parameter in reference(folder).parameters())
    stacks = [find_parts(build_meta(spec_of(folder, stack))) for stack in ("encoder", "decoder")]
    assert [parts.num_layers for parts in stacks] == list(NUM_LAYERS.values())
    encoder, decoder = (parts.span_bytes(0, parts.num_layers) for parts in stacks)
    words = 97 * 32 * 4
    assert (
        whole <= encoder + decoder <= whole + words + 97 * 4
    )  # the embeddings are in both, and a bias of logits is a buffer
