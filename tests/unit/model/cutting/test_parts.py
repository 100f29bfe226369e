import dataclasses

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.utils import ModelOutput

from architectures import default_config, spec_of_config
from families import FAMILIES, tiny_config
from lingualinked.errors import ArgumentError, UncuttableModelError
from lingualinked.model.cutting.parts import build_meta, find_parts, learned_positions, parts_of
from lingualinked.model.hf_internals import building
from lingualinked.model.spec import ModelSpec


def meta_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family), dtype=dtype)


def llama_spec() -> ModelSpec:
    return ModelSpec(
        class_name="LlamaForCausalLM",
        config_json=tiny_config("llama").to_json_string(use_diff=False),
        dtype="float32",
        attn_implementation=None,
        load_format="dummy",
        files=(),
    )


def test_the_parts_of_a_llama() -> None:
    parts = find_parts(meta_model("llama", torch.bfloat16))
    assert (parts.layers, parts.num_layers) == ("model.layers", 4)
    assert parts.prologue == ("model.embed_tokens",)
    assert parts.epilogue == ("model.norm", "lm_head")
    attention, mlp, norms = (32 + 16 + 16 + 32) * 32, 3 * 32 * 48, 2 * 32
    assert parts.weights.layers == (2 * (attention + mlp + norms),) * 4
    assert (parts.weights.prologue, parts.weights.epilogue, parts.weights.tied) == (2 * 97 * 32, 2 * (97 * 32 + 32), 0)


@pytest.mark.parametrize(
    ("family", "prologue"),
    [
        ("gpt2", {"transformer.wte", "transformer.wpe"}),
        ("bloom", {"transformer.word_embeddings", "transformer.word_embeddings_layernorm"}),
        ("opt-350m", {f"model.decoder.{name}" for name in ("embed_tokens", "embed_positions", "project_in")}),
        ("phi3", {"model.embed_tokens"}),
    ],
)
def test_what_runs_before_the_layers_is_prologue(family: str, prologue: set[str]) -> None:
    assert set(find_parts(meta_model(family)).prologue) == prologue


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_are_the_whole(family: str) -> None:
    model = meta_model(family)
    before = [name for name, _ in model.named_modules()]
    parts = find_parts(model)
    assert parts.span_bytes(0, parts.num_layers) == sum(parameter.nbytes for parameter in model.parameters())
    halves = parts.span_bytes(0, 2) + parts.span_bytes(2, 4)
    assert halves == parts.span_bytes(0, 4) + parts.weights.tied
    assert parts.weights.of_span(1, 4) == parts.span_bytes(1, 4)
    assert [name for name, _ in model.named_modules()] == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_tied_embedding_counts_in_both_ends() -> None:
    parts = find_parts(meta_model("llama-tied"))
    assert parts.weights.tied == parts.weights.prologue == 4 * 97 * 32


@pytest.mark.parametrize(("start", "end"), [(0, 5), (-1, 2), (2, 2), (3, 1)])
def test_what_is_no_span_is_refused(start: int, end: int) -> None:
    with pytest.raises(ArgumentError, match=rf"\[{start}, {end}\) is not a span of a model of 4 layers"):
        find_parts(meta_model("llama")).span_bytes(start, end)


def test_parts_are_plain_data() -> None:
    parts = find_parts(meta_model("llama"))
    assert dataclasses.replace(parts) == parts


@pytest.mark.parametrize(
    ("family", "num_positions"), [("gpt2", 64), ("opt", 64), ("llama", None), ("bloom", None), ("gptj", None)]
)
def test_learned_positions(family: str, num_positions: int | None) -> None:
    assert learned_positions(meta_model(family)) == num_positions


def test_a_model_without_a_list_of_its_layers_is_refused() -> None:
    model = meta_model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(UncuttableModelError, match=r"LlamaForCausalLM .* no module list holds its 7 decoder layers"):
        find_parts(model)


def test_parameters_of_the_model_itself_are_in_every_stage() -> None:
    model = meta_model("llama")
    model.model.bias = nn.Parameter(torch.empty(3, device="meta"))
    parts = find_parts(model)
    assert parts.weights.everywhere == 3 * 4
    assert parts.span_bytes(1, 2) == parts.weights.layers[1] + 3 * 4


def test_a_forward_pass_that_fails_is_refused_with_its_error() -> None:
    model = building.build_on_meta(LlamaForCausalLM, tiny_config("llama"), torch.float32, None)
    model.model.rotary_emb = None
    with pytest.raises(UncuttableModelError, match=r"forward pass without weights failed .*NoneType"):
        find_parts(model)


@pytest.mark.parametrize("attn_implementation", ["nonsense", "flash_attention_2"])
def test_an_attention_implementation_that_can_not_be_had_is_refused(attn_implementation: str) -> None:
    spec = dataclasses.replace(llama_spec(), attn_implementation=attn_implementation)
    with pytest.raises(ArgumentError, match=f"attn_implementation='{attn_implementation}' can't be used"):
        build_meta(spec)


def test_a_class_that_can_not_be_cut_is_never_looked_up() -> None:
    with pytest.raises(UncuttableModelError, match="BertModel"):
        build_meta(dataclasses.replace(llama_spec(), class_name="BertModel"))


class Unreached(LlamaForCausalLM):
    def forward(self, input_ids: torch.Tensor, **_kwargs: object) -> ModelOutput:
        return ModelOutput(logits=self.model.embed_tokens(input_ids))


def test_a_forward_pass_that_does_not_come_to_the_layers_is_refused() -> None:
    model = building.build_on_meta(Unreached, tiny_config("llama"), torch.float32, None)
    with pytest.raises(UncuttableModelError, match="it runs none of its 4 layers"):
        find_parts(model)


def test_persistent_buffers_are_weights() -> None:
    config = default_config("minimax")
    spec = spec_of_config(config, "bfloat16")
    model = build_meta(spec)
    layer, parts = model.get_submodule("model.layers.1"), parts_of(spec, model)
    buffers = sum(buffer.nbytes for buffer in layer.buffers())
    assert buffers > 2**22
    assert parts.weights.layers[1] == buffers + sum(parameter.nbytes for parameter in layer.parameters())
