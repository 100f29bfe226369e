"""Gates have the bits of the modules that they replace, and are used only where a module is found to multiply them so."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXMLP
from transformers.models.llama.modeling_llama import LlamaMLP

from lingualinked.kernels import gated
from lingualinked.model.exact import exact_gate
from lingualinked.model.exact.exact_gate import FasterGate, find_parts, find_table, speed_up_gates

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "gelu_new", "quick_gelu")

needs_kernel = pytest.mark.skipif(not gated.is_available(), reason="this processor does not run the kernel")


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield
    torch.set_num_threads(1)


def made(activation: str, dtype: torch.dtype, size: int = 200) -> LlamaMLP:
    config = LlamaConfig(hidden_size=64, intermediate_size=size, hidden_act=activation, mlp_bias=True)
    return LlamaMLP(config).to(dtype).eval()


def faster(module: nn.Module) -> nn.Module:
    twin = copy.deepcopy(module)
    speed_up_gates(twin)
    return twin


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
    assert torch.equal(found.isnan(), expected.isnan())
    found, expected = (each.masked_fill(each.isnan(), 7) for each in (found, expected))
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@needs_kernel
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bits_are_the_modules(activation: str, dtype: torch.dtype, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    for size in (200, 256):
        module = made(activation, dtype, size)
        twin = faster(module)
        assert isinstance(twin, FasterGate)
        assert isinstance(twin, LlamaMLP)
        for shape in ((1, 1, 64), (3, 7, 64), (2, 1, 64), (40, 64)):
            for scale in (1, 30, 1e30, float("inf")):
                states = (scale * torch.randn(shape)).to(dtype)
                assert_equal(twin(states), module(states))


@needs_kernel
def test_the_kernel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[bool] = []
    own = gated.gate
    monkeypatch.setattr(gated, "gate", lambda *args: used.append(True) or own(*args))
    module = faster(made("silu", torch.bfloat16))
    module(torch.randn(2, 3, 64).bfloat16())
    assert used


@needs_kernel
def test_hooks_of_parts_see_what_the_module_calls() -> None:
    module, seen = made("silu", torch.bfloat16), []
    twin = faster(module)
    states = torch.randn(2, 3, 64).bfloat16()
    twin.act_fn.register_forward_hook(lambda *_: seen.append("activation"))  # type: ignore[union-attr, operator]
    twin.up_proj.register_forward_hook(lambda _module, _args, output: seen.append("up") or 2 * output)  # type: ignore[union-attr, operator]
    module.up_proj.register_forward_hook(lambda _module, _args, output: 2 * output)
    assert_equal(twin(states), module(states))
    assert seen == ["activation", "up"]


def test_parts_are_found_by_what_a_module_computes() -> None:
    class Other(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * (1 + self.up_proj(x)))

    class Limited(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=7) * self.up_proj(x))

    class Swapped(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.gate_proj(self.act_fn(self.down_proj(x)) * self.up_proj(x))

    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2)

    class InFloat32(LlamaMLP):
        def forward(self, states: Tensor) -> Tensor:
            gate, up = self.gate_proj(states), self.up_proj(states)
            return self.down_proj((self.act_fn(gate.float()) * up.float()).to(gate.dtype))

    assert find_parts(InFloat32(config).eval()) is None
    assert find_parts(LlamaMLP(config).eval()) == ("gate_proj", "up_proj", "down_proj", "act_fn")
    assert find_parts(Swapped(config).eval()) == ("down_proj", "up_proj", "gate_proj", "act_fn")
    assert find_parts(Other(config).eval()) is None
    assert find_parts(Limited(config).eval()) is None
    assert find_parts(nn.Linear(3, 3)) is None
    neox: Any = GPTNeoXMLP
    assert (
        find_parts(
            neox(LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2, hidden_act="gelu")).eval()
        )
        is None
    )


@needs_kernel
def test_activations_have_one_table_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_gate, "_tables", {})
    first, second = (find_table(ACT2FN["silu"].eval(), torch.bfloat16, size) for size in (200, 256))
    other = find_table(ACT2FN["gelu"].eval(), torch.bfloat16, 256)
    assert first is second
    assert first is not other
    assert find_table(ACT2FN["silu"].eval(), torch.float32, 256) is None
    assert find_table(nn.Dropout(0.5).eval(), torch.bfloat16, 256) is None
    assert find_table(nn.PReLU().bfloat16().eval(), torch.bfloat16, 256) is None


def test_nothing_is_kept_that_needs_gradients() -> None:
    module = faster(made("silu", torch.bfloat16))
    with torch.inference_mode(False):
        states = torch.randn(1, 3, 64).bfloat16()
        module = faster(made("silu", torch.bfloat16))
        module(states).sum().backward()
        assert module.gate_proj.weight.grad is not None  # type: ignore[union-attr]


@needs_kernel
@pytest.mark.parametrize("flushes_first", [False, True])
def test_denormals_may_be_flushed_at_any_time(flushes_first: bool) -> None:
    module = made("silu", torch.bfloat16)
    for parameter in module.parameters():
        parameter.data.zero_()
    module.gate_proj.bias.data.fill_(
        2.0**-125
    )  # half of which is the smallest normal number: silu's own way there flushes
    module.gate_proj.bias.data.view(torch.int16)[:] -= 1
    module.up_proj.bias.data.fill_(1)
    module.down_proj.weight.data[:, :64] = 2.0**100 * torch.eye(64)
    exact_gate._tables.clear()
    twin, states = faster(module), torch.ones(2, 64, dtype=torch.bfloat16)
    try:
        for flushes in (flushes_first, not flushes_first):
            if not torch.set_flush_denormal(flushes):
                pytest.skip("this processor can't flush denormals")
            assert_equal(twin(states), module(states))
    finally:
        torch.set_flush_denormal(False)
        exact_gate._tables.clear()
