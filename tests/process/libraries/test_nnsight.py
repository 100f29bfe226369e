"""Traces of nnsight read and change on a sharded model what they read and change on the uncut one, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import lingualinked as ll
from process.conftest import load_unsharded
from process.libraries.conftest import Compare, make_compare

nnsight = pytest.importorskip("nnsight")

pytestmark = [
    pytest.mark.process,
    pytest.mark.equality,
    pytest.mark.filterwarnings("ignore:LanguageModel is deprecated"),
]

PROMPT = "the quick brown fox"
OTHER = "jack packs my box"

Models = tuple[ll.ShardedModel, PreTrainedModel]


@pytest.fixture(scope="module")
def models(shared_cluster: ll.Cluster, tiny_llama: str) -> Iterator[Models]:
    """Models of their own: nnsight leaves its controllers in them."""
    plan = ll.Plan.from_spans([("a", 0, 1), ("b", 1, 3), ("c", 3, 4)])
    with ll.ShardedModel.from_pretrained(tiny_llama, cluster=shared_cluster, plan=plan, progress=False) as model:
        yield model, load_unsharded(tiny_llama)


@pytest.fixture
def traced(models: Models, tokenizer: PreTrainedTokenizerFast) -> Callable[[Callable[[Any], Any]], None]:
    """Compare what a script returns that is given a ``LanguageModel`` around each."""
    compare = make_compare(*models)
    return lambda script: compare(lambda model: script(nnsight.LanguageModel(model, tokenizer=tokenizer)))


def test_inputs_and_outputs_are_saved(traced: Compare) -> None:
    def script(model: Any) -> Any:
        with model.trace(PROMPT):
            hidden = model.model.layers[1].mlp.input.save()
            attention = model.model.layers[2].self_attn.output[0].save()
            layer = model.model.layers[3].output.save()
            logits = model.lm_head.output.save()
            result = model.output.logits.save()
        return hidden, attention, layer, logits, result

    traced(script)


def test_outputs_are_replaced_and_changed_in_place(traced: Compare) -> None:
    def script(model: Any) -> Any:
        with model.trace(PROMPT):
            model.model.layers[0].input = model.model.layers[0].input * 1.5
            model.model.layers[1].mlp.output = model.model.layers[1].mlp.output * 0
            model.model.layers[2].self_attn.output[0][:, -1] = 0
            logits = model.output.logits.save()
        return logits

    traced(script)


def test_activations_are_patched_from_one_prompt_into_another(traced: Compare) -> None:
    def script(model: Any) -> Any:
        with model.trace() as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke(PROMPT):
                clean = model.model.layers[1].output[:, -1].clone()
                barrier()
            with tracer.invoke(OTHER):
                barrier()
                model.model.layers[1].output[:, -1] = clean
                logits = model.lm_head.output.save()
        return logits

    traced(script)


def test_one_trace_of_a_session_uses_what_another_has_read(traced: Compare) -> None:
    def script(model: Any) -> Any:
        with model.session():
            with model.trace(PROMPT):
                hidden = model.model.layers[1].output
            with model.trace(PROMPT):
                model.model.layers[1].output = hidden * 2
                logits = model.output.logits.save()
        return logits

    traced(script)


def test_a_batch_of_prompts_is_changed_row_by_row(traced: Compare) -> None:
    def script(model: Any) -> Any:
        with model.trace() as tracer:
            with tracer.invoke(PROMPT):
                plain = model.lm_head.output[:, -1].save()
            with tracer.invoke("jack packs my box with five"):
                model.model.layers[1].mlp.output[:] = 0
                ablated = model.lm_head.output[:, -1].save()
        return plain, ablated

    traced(script)


def test_steps_of_generate_are_changed_one_by_one(traced: Compare) -> None:
    def script(model: Any) -> Any:
        with model.generate(PROMPT, max_new_tokens=4, do_sample=False) as tracer:
            logits = [].save()
            for _ in tracer.iter[:3]:
                model.model.layers[1].mlp.output[:] = model.model.layers[1].mlp.output * 0.5
                logits.append(model.lm_head.output[:, -1])
        with model.generate(PROMPT, max_new_tokens=4, do_sample=False) as tracer:
            for _ in tracer.iter[2]:
                model.model.layers[2].output[:] = 0
            ids = tracer.result.save()
        return logits, ids

    traced(script)


def test_a_layer_is_skipped(traced: Compare) -> None:
    def script(model: Any) -> Any:
        with model.trace(PROMPT):
            model.model.layers[1].skip(model.model.layers[0].output)
            logits = model.output.logits.save()
        return logits

    traced(script)


def test_a_logit_lens_applies_modules_inside_a_trace(traced: Compare) -> None:
    def script(model: Any) -> Any:
        with model.trace(PROMPT):
            logits = [model.lm_head(model.model.norm(layer.output)) for layer in model.model.layers].save()
        return logits

    traced(script)


def test_a_trace_stops_early_and_the_next_runs(traced: Compare) -> None:
    def script(model: Any) -> Any:
        with model.trace(PROMPT) as tracer:
            hidden = model.model.layers[1].output.save()
            tracer.stop()
        with model.trace(PROMPT):
            logits = model.output.logits.save()
        return hidden, logits

    traced(script)


def test_gradients_of_activations(traced: Compare) -> None:
    def script(model: Any) -> Any:
        with model.trace(PROMPT):
            hidden = model.model.layers[1].output
            hidden.requires_grad_(True)
            with model.output.logits.sum().backward():
                gradient = hidden.grad.save()
        return gradient

    traced(script)


def test_modules_are_cached_and_edits_last(traced: Compare) -> None:
    def script(model: Any) -> Any:
        with model.edit():
            model.model.layers[1].mlp.output[:] = 0
        with model.trace(PROMPT) as tracer:
            cache = tracer.cache(modules=[model.model.layers[1], model.model.layers[2].mlp]).save()
        model.clear_edits()
        return [cache[f"model.model.layers.{path}"].output for path in ("1", "2.mlp")]

    traced(script)


def test_no_step_stops_outside_of_a_trace(models: Models, tokenizer: PreTrainedTokenizerFast) -> None:
    sharded, unsharded = models
    nnsight.LanguageModel(sharded, tokenizer=tokenizer)
    assert not sharded._hooked_modules
    ids = torch.tensor([[1, 17, 93]])
    assert torch.equal(sharded(ids).logits, unsharded(ids).logits)


def test_scanning_is_refused_since_no_stage_computes_shapes(models: Models, tokenizer: PreTrainedTokenizerFast) -> None:
    model = nnsight.LanguageModel(models[0], tokenizer=tokenizer)
    with (
        pytest.raises(ll.UnsupportedOperationError, match="FakeTensorMode would not reach"),
        model.scan(PROMPT),
    ):
        model.model.layers[2].output.shape.save()


# Last, since nnsight leaves a module's source instrumented.
def test_values_inside_a_module_are_read_and_changed(traced: Compare) -> None:
    def script(model: Any) -> Any:
        with model.trace(PROMPT, use_cache=False):
            model.model.layers[0].mlp.source.self_act_fn_0.output *= 2
            attention = model.model.layers[1].self_attn.source.attention_interface_1.output[0].save()
            logits = model.output.logits.save()
        return attention, logits

    traced(script)


def test_values_inside_attention_are_refused_while_it_writes_kv(
    models: Models, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = nnsight.LanguageModel(models[0], tokenizer=tokenizer)
    with (
        pytest.raises(ll.UnsupportedOperationError, match=r"KV cache: only the workers write KV.*use_cache=False"),
        model.trace(PROMPT),
    ):
        model.model.layers[1].self_attn.source.attention_interface_1.output[0].save()
