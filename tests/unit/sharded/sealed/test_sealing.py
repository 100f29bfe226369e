"""Submodules of a sharded model can be looked at as before; what would change what they compute is refused."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

import lingualinked as ll
from lingualinked.sharded.sealed.sealing import Seal, SealedModel, call_hooks_around
from lingualinked.sharded.weights.fetched_weights import FetchedWeights


class Model(SealedModel, LlamaForCausalLM):
    """Stands for the class of a sharded model, without workers."""


WEIGHTS = FetchedWeights(lambda name, shape, dtype: torch.full(shape, 0.5, dtype=dtype), lambda: None)


class Twice(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@pytest.fixture
def model() -> Any:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=128,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    vars(model)["seal"] = Seal(model, WEIGHTS)
    model.__class__ = Model
    return model


def mlp(model: Any) -> Any:
    return model.model.layers[3].mlp


FORWARD_HOOKS: dict[str, Callable[[Any], Any]] = {
    "forward": lambda module: module.register_forward_hook(print),
    "forward, always called": lambda module: module.register_forward_hook(print, always_call=True),
    "forward with kwargs": lambda module: module.register_forward_hook(print, with_kwargs=True, prepend=True),
    "before forward": lambda module: module.register_forward_pre_hook(print),
    "before forward with kwargs": lambda module: module.register_forward_pre_hook(print, with_kwargs=True),
}
OTHER_HOOKS: dict[str, Callable[[Any], Any]] = {
    "backward": lambda module: module.register_backward_hook(print),
    "full backward": lambda module: module.register_full_backward_hook(print),
    "before backward": lambda module: module.register_full_backward_pre_hook(print, prepend=True),
    "before state_dict": lambda module: module.register_state_dict_pre_hook(print),
    "after state_dict": lambda module: module.register_state_dict_post_hook(print),
    "before load_state_dict": lambda module: module.register_load_state_dict_pre_hook(print),
    "after load_state_dict": lambda module: module.register_load_state_dict_post_hook(print),
    "private, state_dict": lambda module: module._register_state_dict_hook(print),
    "private, load_state_dict": lambda module: module._register_load_state_dict_pre_hook(print),
    "by hand": lambda module: module._backward_hooks.update({1: print}),
}


@pytest.mark.parametrize("register", FORWARD_HOOKS.values(), ids=FORWARD_HOOKS)
@pytest.mark.parametrize("path", ["", "model", "model.layers.3.mlp", "lm_head"])
def test_forward_hooks_are_registered_and_removed(model: Any, path: str, register: Callable[[Any], Any]) -> None:
    module = model.get_submodule(path)
    handle = register(module)
    model.seal.check(model)
    assert len(module._forward_hooks) + len(module._forward_pre_hooks) == 1
    handle.remove()
    assert len(module._forward_hooks) + len(module._forward_pre_hooks) == 0


@pytest.mark.parametrize("register", OTHER_HOOKS.values(), ids=OTHER_HOOKS)
@pytest.mark.parametrize(
    "path", ["model", "model.layers", "model.layers.3.mlp", "model.layers.3.mlp.act_fn", "lm_head"]
)
def test_another_hook_on_a_submodule_is_refused_at_registration(
    model: Any, path: str, register: Callable[[Any], Any]
) -> None:
    with pytest.raises(ll.UnsupportedOperationError, match=rf"{path}[ ._].*of a sharded model: \w"):
        register(model.get_submodule(path))
    model.seal.check(model)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "replace a layer": lambda model: model.model.layers.__setitem__(2, nn.Identity()),
    "cut off layers": lambda model: setattr(model.model, "layers", model.model.layers[:2]),
    "delete a layer": lambda model: model.model.layers.__delitem__(1),
    "pop a layer": lambda model: model.model.layers.pop(1),
    "insert a layer": lambda model: model.model.layers.insert(1, nn.Identity()),
    "append a layer": lambda model: model.model.layers.append(nn.Identity()),
    "extend the layers": lambda model: model.model.layers.extend([nn.Identity()]),
    "set a submodule": lambda model: model.model.set_submodule("norm", nn.Identity()),
    "replace the head": lambda model: setattr(model, "lm_head", nn.Identity()),
    "delete the head": lambda model: delattr(model, "lm_head"),
    "add a module": lambda model: model.add_module("extra", nn.Identity()),
    "replace forward by no function": lambda model: setattr(mlp(model), "forward", 3),
    "register another module": lambda model: model.model.register_module("norm", nn.Identity()),
    "replace a class": lambda model: setattr(mlp(model), "__class__", Twice),
    "set a number": lambda model: setattr(model.model.layers[0].self_attn, "scaling", 3.0),
    "delete a number": lambda model: delattr(model.model.layers[0].self_attn, "scaling"),
    "set epsilon": lambda model: setattr(model.model.norm, "variance_epsilon", 1.0),
    "train a part": lambda model: mlp(model).train(),
    "train without a call": lambda model: setattr(model, "training", True),
    "set a number of the model": lambda model: setattr(model, "vocab_size", 64),
    "replace a weight": lambda model: setattr(mlp(model).up_proj, "weight", nn.Parameter(torch.zeros(64, 32))),
    "delete a weight": lambda model: delattr(mlp(model).up_proj, "weight"),
    "register a weight": lambda model: mlp(model).up_proj.register_parameter("bias", nn.Parameter(torch.zeros(64))),
    "register a buffer": lambda model: mlp(model).register_buffer("mask", torch.zeros(1)),
    "change weights in place": lambda model: mlp(model).up_proj.weight.data.zero_(),
    "apply": lambda model: mlp(model).apply(lambda each: each.weight.data.zero_() if hasattr(each, "weight") else None),
    "initialise": lambda model: nn.init.zeros_(model.lm_head.weight),
    "set data": lambda model: setattr(model.lm_head.weight, "data", torch.zeros(128, 32)),
    "change a buffer": lambda model: model.model.rotary_emb.inv_freq.mul_(2),
    "parametrize": lambda model: parametrize.register_parametrization(mlp(model).up_proj, "weight", Twice()),
    "prune": lambda model: prune.l1_unstructured(mlp(model).up_proj, "weight", 0.5),
    "mark for pruning": lambda model: prune.identity(mlp(model).up_proj, "weight"),
    "weight norm": lambda model: parametrizations.weight_norm(mlp(model).up_proj),
    "spectral norm": lambda model: nn.utils.spectral_norm(mlp(model).up_proj),
    "orthogonal": lambda model: parametrizations.orthogonal(mlp(model).up_proj),
    "load_state_dict": lambda model: mlp(model).load_state_dict({}, strict=False),
    "compile a part": lambda model: mlp(model).compile(),
    "convert a part": lambda model: mlp(model).half(),
    "move a part": lambda model: mlp(model).to("meta"),
    "empty a part": lambda model: mlp(model).to_empty(device="cpu"),
    "share a part": lambda model: mlp(model).share_memory(),
    "ask for gradients again": lambda model: mlp(model).requires_grad_(False).requires_grad_(True),
    "call another's weights": lambda model: torch.func.functional_call(
        model, {"lm_head.weight": torch.zeros(128, 32)}, (torch.tensor([[1]]),), tie_weights=False
    ),
    "a registry by hand": lambda model: model.model._modules.update(norm=nn.Identity()),
    "a registry of the model": lambda model: model._modules.pop("lm_head"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_refused_when_it_is_made(model: Any, change: Callable[[Any], Any]) -> None:
    before = repr(model)
    with torch.no_grad(), pytest.raises(ll.UnsupportedOperationError, match=r"of a sharded model: \w"):
        change(model)
    model.seal.check(model)
    assert repr(model) == before


BEHIND: dict[str, Callable[[Any], Any]] = {
    "model.layers.3.mlp.extra_repr": lambda model: vars(mlp(model)).update(extra_repr=print),
    "model.norm.variance_epsilon": lambda model: vars(model.model.norm).update(variance_epsilon=1.0),
    "model._modules": lambda model: vars(model.model).update(_modules={}),
    "lm_head._forward_hooks": lambda model: object.__setattr__(model.lm_head, "_forward_hooks", {1: print}),
    "lm_head.out_features": lambda model: vars(model.lm_head).pop("out_features"),
    "_buffers": lambda model: setattr(model, "_buffers", {}),
}


@pytest.mark.parametrize("name", BEHIND)
def test_a_change_behind_the_modules_backs_is_found(model: Any, name: str) -> None:
    BEHIND[name](model)
    with pytest.raises(
        ll.UnsupportedOperationError, match=rf"^{name} of a sharded model has been changed, .* set it back"
    ):
        model.seal.check(model)


def test_classes_equal_those_that_they_stand_for(model: Any) -> None:
    module = model.model.layers[2].mlp.up_proj
    assert type(module) is not nn.Linear
    assert type(module) == nn.Linear == type(module)  # noqa: E721 - as tables by class compare
    assert type(module) != nn.Embedding  # noqa: E721
    assert {nn.Linear: 1}[type(module)] == {type(module): 1}[nn.Linear] == 1

    class Own(type(module)):
        pass

    assert Own not in {nn.Linear, type(module)}
    assert isinstance(module, nn.Linear)
    with pytest.raises(ll.UnsupportedOperationError, match=r"fill_ of model\.layers\.0\.self_attn\.q_proj\.weight"):
        model.apply(lambda each: each.weight.data.fill_(0) if type(each) == nn.Linear else None)  # noqa: E721


def test_what_holds_already_is_granted(model: Any) -> None:
    part = mlp(model)
    assert part.eval() is part.to("cpu") is part.float() is part.cpu() is part.requires_grad_(False) is part
    assert not any(parameter.requires_grad for parameter in part.parameters())
    model.model.layers = model.model.layers
    model.model.layers[2] = model.model.layers[2]
    part.up_proj.weight = part.up_proj.weight
    model.add_module("model", model.model)
    model.model.register_module("norm", model.model.norm)
    part.up_proj.register_parameter("weight", part.up_proj.weight)
    model.model.norm.variance_epsilon = model.model.norm.variance_epsilon
    model.model.activation_checkpointing_disable()
    part.apply(lambda module: None)
    part.zero_grad()
    model.seal.check(model)


@torch.no_grad()
def test_another_forward_is_called_around_what_stands_for_the_modules_own(model: Any) -> None:
    part, x = mlp(model), torch.ones(1, 2, 32)
    own, expected = part.forward, part(x)
    part.forward = lambda hidden: own(hidden) + 1
    model.seal.check(model)
    assert torch.equal(part(x), expected + 1)  # in this process
    assert torch.equal(call_hooks_around(part, lambda hidden: hidden * 2, (x,), {}), x * 2 + 1)  # in a step
    part.forward = lambda hidden: own(hidden) + own(hidden)  # once in the step, once in this process
    assert torch.equal(call_hooks_around(part, lambda hidden: hidden * 2, (x,), {}), x * 2 + expected)
    part.forward = own
    assert "forward" not in vars(part)
    vars(part)["forward"] = lambda hidden: hidden
    model.seal.check(model)
    assert call_hooks_around(part, lambda hidden: 1 / 0, (x,), {}) is x
    del part.forward
    assert torch.equal(part(x), expected)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module, factor: float = 3) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs) * self.factor


@torch.no_grad()
def test_a_wrapper_is_called_around_what_stands_for_the_module(model: Any) -> None:
    layer, part, x = model.model.layers[3], mlp(model), torch.ones(1, 2, 32)
    expected = part(x)
    layer.mlp = Wrapper(part)
    model.seal.check(model)
    assert torch.equal(layer.mlp(x), expected * 3)  # in this process
    assert torch.equal(call_hooks_around(part, lambda hidden: hidden + 1, (x,), {}), (x + 1) * 3)  # in a step
    layer.mlp.forward = lambda hidden: hidden
    assert call_hooks_around(part, lambda hidden: 1 / 0, (x,), {}) is x
    layer.mlp = Wrapper(Wrapper(part, 2))
    assert torch.equal(call_hooks_around(part, lambda hidden: hidden, (x,), {}), x * 6)
    layer.mlp = part
    assert torch.equal(call_hooks_around(part, lambda hidden: hidden, (x,), {}), x)
    assert not model.seal.wrapped.wrapped


def test_wrappers_of_all_layers_come_as_a_list_which_must_not_change(model: Any) -> None:
    layers = [*model.model.layers]
    wrappers = nn.ModuleList(map(Wrapper, layers))
    model.model.layers = wrappers
    assert [*model.model.layers] == [*wrappers]
    assert len(model.seal.wrapped.wrapped) == 4
    model.seal.check(model)
    del wrappers[1]
    with pytest.raises(ll.UnsupportedOperationError, match=r"the list in place of model\.layers .* no effect"):
        model.seal.check(model)


@torch.no_grad()
def test_a_buffer_in_place_of_a_bias_makes_the_module_run_here(model: Any) -> None:
    head, x = model.lm_head, torch.ones(1, 2, 32)
    expected = head(x)
    del head.bias
    head.register_buffer("bias", torch.full((128,), 2.0))
    model.seal.check(model)
    assert torch.equal(call_hooks_around(head, lambda hidden: 1 / 0, (x,), {}), head(x))
    assert torch.allclose(head(x), expected + 2)


def test_notes_of_the_users_own_stay(model: Any) -> None:
    for name, module in model.named_modules():
        module.note = name
    mlp(model).note = "another"
    del model.lm_head.note
    assert mlp(model).note == "another"
    model.seal.check(model)


def test_other_hooks_of_the_whole_model_are_refused(model: Any) -> None:
    for register in (name for name in OTHER_HOOKS if name != "by hand"):
        with pytest.raises(ll.UnsupportedOperationError, match="of a sharded model"):
            OTHER_HOOKS[register](model)


def test_looks_as_before(model: Any) -> None:
    with torch.device("meta"):
        plain = LlamaForCausalLM(model.config).eval()
    assert repr(model).replace("Model(", "LlamaForCausalLM(", 1) == repr(plain)
    assert isinstance(mlp(model), LlamaMLP)
    assert isinstance(model.model.layers[0].self_attn, LlamaAttention)
    assert isinstance(model.lm_head, nn.Linear)
    assert type(model.lm_head).__qualname__ == "Linear"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = [(name, value.shape, value.dtype) for name, value in model.named_parameters()]
    assert names == [(name, value.shape, value.dtype) for name, value in plain.named_parameters()]
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in plain.named_buffers()]
    assert all(isinstance(value, nn.Parameter) for value in model.parameters())
    assert model.num_parameters() == plain.num_parameters()
    assert model.get_memory_footprint() == plain.get_memory_footprint()
    assert model.dtype == plain.dtype
    assert model.device == torch.device("cpu")
    assert len(model.model.layers[1:3]) == 2


@torch.no_grad()
def test_parts_compute_with_their_weights(model: Any) -> None:
    states = torch.rand(2, 32)
    for path in ("lm_head", "model.norm", "model.layers.3.mlp"):
        part = model.get_submodule(path)
        with torch.device("meta"):
            plain = LlamaForCausalLM(model.config).get_submodule(path)
        plain.to_empty(device="cpu")
        for parameter in plain.parameters():
            parameter.fill_(0.5)
        assert torch.equal(part(states), plain(states))
        assert torch.equal(part.forward(states), plain(states))
        assert list(part.state_dict()) == list(plain.state_dict())
        assert all(torch.equal(each, value) for each, value in zip(part.parameters(), plain.parameters(), strict=True))
    assert torch.equal(mlp(model).act_fn(states), nn.functional.silu(states))
    with pytest.raises(ll.UnsupportedOperationError, match=r"^calling model \(LlamaModel\).*output_hidden_states"):
        model.model(torch.tensor([[1]]))
    model.seal.check(model)


def test_a_copied_part_is_an_ordinary_module(model: Any) -> None:
    states = torch.linspace(-1, 1, 32)
    for part in (mlp(model), model.lm_head, model.model.layers):
        copied = copy.deepcopy(part)
        assert all(type(each).__module__.startswith(("torch.", "transformers.")) for each in copied.modules())
        assert not any(isinstance(each, type(part).__bases__[0]) for each in copied.modules())
        assert {type(each) for each in copied.parameters()} == {nn.Parameter}
        assert list(copied.state_dict()) == list(part.state_dict())
        with torch.device("meta"):
            original = LlamaForCausalLM(model.config).get_submodule(part._path)
        assert vars(copied).keys() == vars(original).keys()
    assert copied[0].self_attn.config is not model.config
    copied = copy.deepcopy(mlp(model))
    assert torch.equal(copied(states), mlp(model)(states))
    copied(states).sum().backward()
    copied.up_proj.weight.data.zero_()
    copied.down_proj = nn.Identity()
    assert not torch.equal(copied(states)[:32], mlp(model)(states))
    model.seal.check(model)


def test_what_is_more_than_a_part_is_not_copied(model: Any) -> None:
    for use in (
        lambda: copy.deepcopy(model.model),
        lambda: copy.copy(mlp(model)),
    ):
        with pytest.raises(ll.UnsupportedOperationError, match="in workers"):
            use()


def test_a_hook_may_keep_what_it_sees_on_its_module(model: Any) -> None:
    part = mlp(model)
    part.saved = torch.ones(3)
    assert torch.equal(part.saved, torch.ones(3))
    model.seal.check(model)
    for value in (nn.Parameter(torch.ones(3)), model.lm_head.weight):
        with pytest.raises(ll.UnsupportedOperationError, match="setting saved of"):
            part.saved = value
    del part.saved


def test_is_freed_without_the_collector(model: Any) -> None:
    with torch.device("meta"):
        one = LlamaForCausalLM(model.config)
    vars(one)["seal"] = Seal(one, WEIGHTS)
    freed = weakref.ref(one)
    gc.disable()
    try:
        del one
        assert freed() is None
    finally:
        gc.enable()
