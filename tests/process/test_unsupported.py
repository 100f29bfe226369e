"""Every method of a transformers model works on a sharded one or is refused by name; none does something half."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, LlamaForCausalLM
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

import lingualinked as ll
from lingualinked.sharded.sealed.conversions import Conversions
from lingualinked.sharded.sealed.sealing import SealedModel
from lingualinked.sharded.sealed.unsupported import UnsupportedOperations

pytestmark = pytest.mark.process

REFUSED = {name for mixin in (SealedModel, UnsupportedOperations) for name in vars(mixin) if not name.startswith("_")}
GRANTED = {name for name in vars(Conversions) if not name.startswith("_")}  # where nothing has to change

# What works, grouped by why. A method that is new in transformers belongs here or among the refused.
WORKING = {
    "tells what the model is": """base_model_prefix can_generate config_class extra_repr get_correct_attn_implementation
        get_correct_experts_implementation get_experts_implementation get_extra_state get_memory_footprint
        is_backend_compatible is_custom_code is_remote_code num_parameters register_for_auto_class
        warn_if_padding_and_no_attention_mask""",
    "gives modules, shapes and dtypes, on the meta device": """apply buffers children get_buffer get_decoder get_encoder
        get_expanded_tied_weights_keys get_input_embeddings get_output_embeddings get_parameter get_parameter_or_buffer
        get_position_embeddings get_submodule modules named_buffers named_children named_modules
        named_non_persistent_buffers named_parameters parameters retrieve_modules_from_names state_dict""",
    "runs it": """adjust_generation_fn compute_transition_scores continuous_batching_context_manager eval forward
        from_pretrained generate generate_batch heal_tokens init_continuous_batching load_custom_generate
        prepare_inputs_for_generation""",
    "writes files": "save_pretrained",
    "changes adapters, here and in the stages": """active_adapters add_adapter delete_adapter disable_adapters enable_adapters
        get_adapter_state_dict load_adapter set_adapter""",
    "is called with what passes through the whole model": "register_forward_hook register_forward_pre_hook",
    "changes what a sharded model does not look at": """activation_checkpointing_disable add_model_tags
        destroy_cached_continuous_batching_manager gradient_checkpointing_disable zero_grad""",
    "is a step of building or loading": """barrier_after_gathered_checkpoint_save can_record_outputs
        generation_config_class get_init_context init_parallel_plans is_distributed_loading_by_transformers
        mark_tied_weights_as_initialized post_init prepare_distribute_model should_save_on_this_rank""",
}

NEW: dict[str, tuple[str, Any]] = {  # what is registered already may be registered again
    "add_module": ("new", torch.nn.Identity()),
    "register_module": ("new", torch.nn.Identity()),
    "register_buffer": ("new", torch.zeros(1)),
    "register_parameter": ("new", torch.nn.Parameter(torch.zeros(1))),
}


def test_each_method_is_accounted_for() -> None:
    set_by_transformers_on_every_module = {"smart_apply"}
    public = {name for name in dir(LlamaForCausalLM) if not name.startswith("_")} - set_by_transformers_on_every_module
    methods = {name for name in public if callable(getattr(LlamaForCausalLM, name))}
    working = {name for names in WORKING.values() for name in names.split()}
    assert methods - working - REFUSED == set()
    assert methods >= REFUSED
    assert working & REFUSED == set()


@pytest.mark.parametrize("name", sorted(REFUSED - GRANTED))
def test_refused_by_name(sharded: Any, name: str) -> None:
    with pytest.raises(ll.UnsupportedOperationError, match=rf"^{name}\(\) of a sharded model: \w"):
        getattr(sharded, name)(*NEW.get(name, ()))


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.to("meta"),
        lambda model: model.to(dtype=torch.float16),
        lambda model: model.save_pretrained("folder", push_to_hub=True),
        lambda model: model.load_state_dict({}, strict=False),
        lambda model: model.resize_token_embeddings(200),
        lambda model: model.type(torch.float16),
        lambda model: model.requires_grad_(True),
    ],
)
def test_refused_with_arguments(sharded: Any, use: Callable[[Any], Any]) -> None:
    with pytest.raises(ll.UnsupportedOperationError):
        use(sharded)


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: model.to(),
        lambda model: model.to(model.device),
        lambda model: model.to(model.dtype),
        lambda model: model.to("cpu", torch.float32, non_blocking=True),
        lambda model: model.to(device=torch.device("cpu"), dtype=model.dtype),
        lambda model: model.to(torch.zeros(1)),
        lambda model: model.cpu(),
        lambda model: model.float(),
        lambda model: model.type(torch.float32),
        lambda model: model.type("torch.FloatTensor"),
        lambda model: model.eval(),
        lambda model: model.train(False),
        lambda model: model.tie_weights(),
        lambda model: model.zero_grad(),
        lambda model: model.zero_grad(set_to_none=False),
        lambda model: model.resize_token_embeddings() is model.get_input_embeddings(),
        lambda model: model.resize_token_embeddings(128, pad_to_multiple_of=64) is model.get_input_embeddings(),
        lambda model: model.set_attn_implementation("sdpa"),
    ],
)
def test_what_holds_already_is_granted(sharded: Any, unsharded: LlamaForCausalLM, ask: Callable[[Any], Any]) -> None:
    ours, theirs = ask(sharded), ask(unsharded)
    unsharded.requires_grad_(True)  # other tests compare with it, and without gradients it takes another kernel
    assert (ours is sharded) is (theirs is unsharded)
    assert ours is sharded or ours == theirs


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.to("cuda"),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to("cpu", torch.float64),
        lambda model: model.to(torch.zeros(1, dtype=torch.float16)),
        lambda model: model.to("no device"),
        lambda model: model.bfloat16(),
        lambda model: model.half(),
        lambda model: model.double(),
        lambda model: model.type("torch.DoubleTensor"),
        lambda model: model.type(None),
        lambda model: model.resize_token_embeddings(129),
        lambda model: model.resize_token_embeddings(pad_to_multiple_of=100),
        lambda model: model.set_attn_implementation("eager"),
        lambda model: model.tie_weights({"lm_head.weight"}),
    ],
)
def test_what_would_change_the_model_is_refused(sharded: Any, use: Callable[[Any], Any]) -> None:
    with pytest.raises(ll.UnsupportedOperationError, match=r"\(\) of a sharded model: \w"):
        use(sharded)


@pytest.mark.parametrize(
    ("use", "remedy"),
    [
        (lambda model: model.compile(), r"^compile\(\) of .*: its layers run uncompiled in the workers"),
        (lambda model: model.set_attn_implementation("eager"), "pass attn_implementation= to ShardedModel"),
        (lambda model: setattr(model, "use_kernels", True), "use the unsharded model for others"),
    ],
)
def test_the_remedy_is_one_that_works(sharded: Any, use: Callable[[Any], Any], remedy: str) -> None:
    with pytest.raises(ll.UnsupportedOperationError, match=remedy):
        use(sharded)


def test_bfloat16_of_a_bfloat16_model_names_what_transformers_would_round(
    place: Callable[..., Any], tiny_llama: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = place(tiny_llama, [("a", 0, 4)], dtype=torch.bfloat16)
    assert model.bfloat16() is model
    assert "rotary_emb.inv_freq" in caplog.text
    with pytest.raises(ll.UnsupportedOperationError, match=r"^float\(\)"):
        model.float()


def test_another_module_in_place_of_a_submodule_is_refused(sharded: Any) -> None:
    attention = sharded.model.layers[1].self_attn
    with pytest.raises(ll.UnsupportedOperationError, match=r"setting q_proj of "):
        attention.q_proj = torch.nn.Linear(32, 32, bias=False)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_compilation_is_refused_when_it_is_asked_for(sharded: Any) -> None:
    with pytest.raises(ll.UnsupportedOperationError, match=r"^torch\.compile\(\) of a sharded model: "):
        torch.compile(sharded)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_trace_would_record_what_the_workers_answer(sharded: Any) -> None:
    with pytest.raises(ll.UnsupportedOperationError, match=r"^torch\.jit\.trace\(\) of a sharded model"):
        torch.jit.trace(lambda ids: sharded(ids).logits, torch.tensor([[1, 17, 93]]), check_trace=False)


def test_a_manager_of_continuous_batching_is_refused_when_it_is_made(sharded: Any) -> None:
    with pytest.raises(ll.UnsupportedOperationError, match=r"call init_continuous_batching of the model$"):
        ContinuousBatchingManager(sharded, sharded.generation_config, ContinuousBatchingConfig())
