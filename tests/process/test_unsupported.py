"""Every method of a transformers model works on a sharded one or is refused by name; none does something half."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import lingualinked as ll
from lingualinked.sharded.unsupported import UnsupportedOperations

pytestmark = pytest.mark.process

REFUSED = {name for name in vars(UnsupportedOperations) if not name.startswith("_")}

# What works, grouped by why. A method that is new in transformers belongs here or among the refused.
WORKING = {
    "tells what the model is": """base_model_prefix can_generate config_class extra_repr get_correct_attn_implementation
        get_correct_experts_implementation get_experts_implementation get_extra_state get_memory_footprint
        is_backend_compatible is_custom_code is_remote_code num_parameters register_for_auto_class
        warn_if_padding_and_no_attention_mask""",
    "gives modules, shapes and dtypes, on the meta device": """buffers children get_buffer get_decoder get_encoder
        get_expanded_tied_weights_keys get_input_embeddings get_output_embeddings get_parameter get_parameter_or_buffer
        get_position_embeddings get_submodule modules named_buffers named_children named_modules
        named_non_persistent_buffers named_parameters parameters retrieve_modules_from_names""",
    "runs it": """adjust_generation_fn compute_transition_scores eval forward from_pretrained generate heal_tokens
        load_custom_generate prepare_inputs_for_generation""",
    "is called with what passes through the whole model": """register_backward_hook register_forward_hook
        register_forward_pre_hook register_full_backward_hook register_full_backward_pre_hook
        register_load_state_dict_post_hook register_load_state_dict_pre_hook register_state_dict_post_hook
        register_state_dict_pre_hook""",
    "changes what a sharded model does not look at": """activation_checkpointing_disable add_model_tags add_module
        destroy_cached_continuous_batching_manager gradient_checkpointing_disable register_buffer register_module
        register_parameter""",
    "is a step of building or loading": """barrier_after_gathered_checkpoint_save can_record_outputs
        generation_config_class get_init_context init_parallel_plans is_distributed_loading_by_transformers
        mark_tied_weights_as_initialized post_init prepare_distribute_model should_save_on_this_rank""",
}


def test_each_method_is_accounted_for() -> None:
    set_by_transformers_on_every_module = {"smart_apply"}
    public = {name for name in dir(LlamaForCausalLM) if not name.startswith("_")} - set_by_transformers_on_every_module
    methods = {name for name in public if callable(getattr(LlamaForCausalLM, name))}
    working = {name for names in WORKING.values() for name in names.split()}
    assert methods - working - REFUSED == set()
    assert methods >= REFUSED
    assert working & REFUSED == set()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_by_name(sharded: Any, name: str) -> None:
    with pytest.raises(ll.UnsupportedOperationError, match=rf"^{name}\(\) of a sharded model: \w"):
        getattr(sharded, name)()


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.to("cpu"),
        lambda model: model.to(dtype=torch.float16),
        lambda model: model.save_pretrained("folder"),
        lambda model: model.load_state_dict({}, strict=False),
        lambda model: model.resize_token_embeddings(200),
        lambda model: model.generate_batch([[1, 2]]),
        lambda model: model.type(torch.float16),
        lambda model: model.requires_grad_(True),
    ],
)
def test_refused_with_arguments(sharded: Any, use: Callable[[Any], Any]) -> None:
    with pytest.raises(ll.UnsupportedOperationError):
        use(sharded)
