"""Code of a model that was replaced in the caller is found, before the load or after it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel, masking_utils, modeling_rope_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama

import lingualinked as ll
from families import FAMILIES, tiny_config
from lingualinked.sharded.loading.model_code import ModelCode, check_observers


def make(family: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family))


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return make("llama")


def replacement(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


@pytest.mark.parametrize("family", FAMILIES)
def test_the_installed_code_passes(family: str) -> None:
    model = make(family)
    ModelCode(model).check(model.config)


PATCHES: dict[str, tuple[Any, str, Any]] = {
    "attention": (modeling_llama.LlamaAttention, "forward", replacement),
    "norm, as another package wraps it": (
        modeling_llama.LlamaRMSNorm,
        "forward",
        functools.wraps(modeling_llama.LlamaRMSNorm.forward)(replacement),
    ),
    "norm, under no_grad": (modeling_llama.LlamaRMSNorm, "forward", torch.no_grad()(replacement)),
    "norm of another architecture": (modeling_llama.LlamaRMSNorm, "forward", GemmaRMSNorm.forward),
    "initialiser": (modeling_llama.LlamaMLP, "__init__", replacement),
    "method that was inherited": (modeling_llama.LlamaMLP, "__call__", replacement),
    "the whole model": (modeling_llama.LlamaForCausalLM, "forward", replacement),
    "rotary embedding": (modeling_llama, "apply_rotary_pos_emb", replacement),
    "eager attention": (modeling_llama, "eager_attention_forward", replacement),
    "masks": (masking_utils, "create_causal_mask", replacement),
    "linear of torch": (nn.Linear, "forward", replacement),
    "attention of torch": (nn.functional, "scaled_dot_product_attention", replacement),
    "partial": (nn.functional, "silu", functools.partial(replacement, 1)),
}


@pytest.mark.parametrize(("owner", "name", "value"), PATCHES.values(), ids=PATCHES)
def test_a_patch_is_refused(
    monkeypatch: pytest.MonkeyPatch, llama: PreTrainedModel, owner: Any, name: str, value: Any
) -> None:
    code = ModelCode(llama)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, value)
        with pytest.raises(
            ll.UnsupportedOperationError, match=rf"\.{name} has been replaced since the model was loaded: \w"
        ):
            code.check(llama.config)
        with pytest.raises(ll.UnsupportedOperationError, match=rf"\.{name} has been replaced by "):
            ModelCode(llama)
    code.check(llama.config)


def test_a_replaced_attention_is_refused(monkeypatch: pytest.MonkeyPatch, llama: PreTrainedModel) -> None:
    code = ModelCode(llama)
    llama.config._attn_implementation = "sdpa"
    with monkeypatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS, "another", replacement)
        code.check(llama.config)
        patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", replacement)
        with pytest.raises(ll.UnsupportedOperationError, match=r"AttentionInterface\['sdpa'\] has been replaced"):
            code.check(llama.config)
    with monkeypatch.context() as patch:
        patch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, "sdpa", replacement)
        with pytest.raises(ll.UnsupportedOperationError, match=r"AttentionMaskInterface\['sdpa'\] has been replaced"):
            code.check(llama.config)
    with monkeypatch.context() as patch:
        patch.setitem(modeling_rope_utils.ROPE_INIT_FUNCTIONS, "linear", replacement)
        with pytest.raises(ll.UnsupportedOperationError, match=r"ROPE_INIT_FUNCTIONS\['linear'\] has been replaced"):
            ModelCode(llama)


def test_what_is_no_code_may_change(monkeypatch: pytest.MonkeyPatch, llama: PreTrainedModel) -> None:
    code = ModelCode(llama)
    monkeypatch.setattr(modeling_llama, "a_note", 1, raising=False)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "a_note", 1, raising=False)
    assert modeling_llama.LlamaMLP.__annotations__ is not None
    code.check(llama.config)


class Counter(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Logger(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("make_mode", "name"),
    [
        (Counter, "Counter"),
        (Logger, "Logger"),
        (lambda: FlopCounterMode(display=False), "global module hooks|FlopCounterMode"),
        (lambda: torch.device("meta"), "DeviceContext"),
    ],
)
def test_a_mode_that_watches_operations_is_refused(make_mode: Callable[[], Any], name: str) -> None:
    with make_mode(), pytest.raises(ll.UnsupportedOperationError, match=name):
        check_observers()
    check_observers()


def test_the_cpu_by_default_is_what_holds() -> None:
    with torch.device("cpu"):
        check_observers()


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
        nn.modules.module.register_module_parameter_registration_hook,
    ],
)
def test_a_hook_of_all_modules_is_refused(register: Callable[..., Any]) -> None:
    with (
        register(replacement),
        pytest.raises(ll.UnsupportedOperationError, match=r"global module hooks \(_global_\w+_hooks\)"),
    ):
        check_observers()
    check_observers()
