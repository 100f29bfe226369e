"""Norms have the bits of the modules that they replace, whichever of the two computes them, and stay these modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings, strategies as st
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from conversations import dummy_spec
from kernel_checks import run_elsewhere
from lingualinked.kernels import norm
from lingualinked.kernels.norm import Kind
from lingualinked.model.exact.exact_norm import FasterNorm, speed_up_norms
from lingualinked.model.exact.norm_probe import NormShape, find_kind
from lingualinked.model.process.torch_settings import torch_settings
from lingualinked.model.stages.stage import Stage

KINDS: dict[type[nn.Module], Kind] = {
    LlamaRMSNorm: Kind.ROUNDED_AND_WEIGHTED,
    Olmo2RMSNorm: Kind.WEIGHTED,
    GemmaRMSNorm: Kind.WEIGHTED_BY_ONE_MORE,
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SPECIAL = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-40, 1e-7, -3e38, 65504.0)
SCRIPT = """
import test_exact_norm as tests
for dtype in tests.DTYPES:
    tests.test_the_kernel_is_used_for_all_kinds(dtype)
    tests.check_sizes(dtype, (768, 1000))
"""

needs_kernel = pytest.mark.skipif(not norm.is_available(), reason="this processor does not run the kernel")


@pytest.fixture(autouse=True)
def fresh_probes() -> Iterator[None]:
    find_kind.cache_clear()
    with torch.inference_mode():
        yield
    find_kind.cache_clear()
    torch.set_num_threads(1)


def made(module_class: type[nn.Module], size: int, dtype: torch.dtype, epsilon: float = 1e-6) -> nn.Module:
    module = module_class(size, eps=epsilon).to(dtype).eval()
    nn.init.uniform_(module.get_parameter("weight"), -2, 2)
    return module


def faster(module: nn.Module) -> nn.Module:
    twin = copy.deepcopy(module)
    speed_up_norms(twin)
    return twin


def assert_equal(module: nn.Module, twin: nn.Module, states: Tensor) -> None:
    found, expected = twin(states), module(states)
    assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
    assert torch.equal(found.isnan(), expected.isnan())
    found, expected = (each.masked_fill(each.isnan(), 7) for each in (found, expected))
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def shape_of(module_class: type[nn.Module], dtype: torch.dtype, num_rows: int, size: int) -> NormShape:
    name = "eps" if module_class is GemmaRMSNorm else "variance_epsilon"
    return NormShape(module_class, name, dtype, num_rows, size, torch.get_num_threads())


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_is_used_for_all_kinds(dtype: torch.dtype) -> None:
    for module_class, kind in KINDS.items():
        for num_rows, size in ((1, 768), (16, 96), (3, 1000)):
            found = find_kind(shape_of(module_class, dtype, num_rows, size))
            same = {Kind.WEIGHTED, Kind.ROUNDED_AND_WEIGHTED} if dtype is torch.float32 else {kind}
            assert found is kind or {found, kind} <= same
    assert find_kind(shape_of(CohereLayerNorm, dtype, 1, 768)) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_the_modules(dtype: torch.dtype) -> None:
    check_sizes(dtype, (1, 7, 8, 100, 768, 8421))


def check_sizes(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    for module_class in KINDS:
        for size in sizes:
            module = made(module_class, size, dtype)
            twin = faster(module)
            for shape in ((size,), (1, size), (2, 3, size), (16, size), (0, size)):
                states = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-9, 5, shape)
                assert_equal(module, twin, states.to(dtype))


@given(
    module_class=st.sampled_from(list(KINDS)),
    dtype=st.sampled_from(DTYPES),
    size=st.one_of(st.integers(1, 8193), st.integers(1, 80), st.sampled_from([512, 768, 2048, 4096])),
    num_rows=st.integers(1, 16),
    epsilon=st.sampled_from([0.0, 1e-12, 1e-6, 1e-5, 0.37]),
    power=st.integers(-50, 30),
    spread=st.integers(1, 20),
    num_threads=st.integers(1, 3),
    special=st.lists(st.sampled_from(SPECIAL)),
    seed=st.integers(0, 1 << 32),
)
@settings(max_examples=60)
def test_bits_in_all_sizes_and_magnitudes(
    module_class: type[nn.Module],
    dtype: torch.dtype,
    size: int,
    num_rows: int,
    epsilon: float,
    power: int,
    spread: int,
    num_threads: int,
    special: list[float],
    seed: int,
) -> None:
    torch.set_num_threads(num_threads)
    generator = torch.Generator().manual_seed(seed)
    module = made(module_class, size, dtype, epsilon)
    twin = faster(module)
    states = torch.randn(num_rows, size, generator=generator)
    states *= 2.0 ** (power + torch.randint(-spread, spread, states.shape, generator=generator))
    for value in special:
        states[torch.randint(num_rows, (1,), generator=generator), torch.randint(size, (1,), generator=generator)] = (
            value
        )
    event(f"computed by the kernel: {type(twin) is not type(module)}")
    with torch.inference_mode():
        assert_equal(module, twin, states.to(dtype))
        assert_equal(module, twin, states.to(dtype)[:1])


@needs_kernel
def test_another_instruction_set() -> None:
    run_elsewhere(SCRIPT, Path(__file__).parent, ATEN_CPU_CAPABILITY="avx2")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_denormals_are_flushed_where_torch_flushes_them(dtype: torch.dtype) -> None:
    for module_class in KINDS:
        module = made(module_class, 100, dtype, 1e-30)
        twin = faster(module)
        with torch_settings({"flush_denormal": True}):
            for power in (-126, -70, -20, -14):
                states = 2.0**power * torch.randn(3, 100)
                assert_equal(module, twin, states.to(dtype))


@dataclass(frozen=True, kw_only=True)
class Order:
    """How a norm is computed, slowly: as torch does, if nothing is said."""

    lanes: int = 8
    turns: int = 4
    step: int = 16
    levels: int = 3
    rest: str = "first"  # what is left over of turns: all to the first register, or in turn
    lane_sum: str = "in order"  # or "tree"
    tail: str = "before lanes"  # or "after lanes"
    total: str = "rounded"  # or "exact"
    mean: str = "divided"  # or "multiplied" with the inverse
    root: str = "divided"  # or "next", which is the next value
    rounding: str = "even"  # or "truncated", "away"

    def sum_squares(self, states: Tensor) -> Tensor:
        squares = states.float().pow(2)
        if self.total == "exact":
            return squares.double().sum(-1).float()
        width = self.lanes * self.turns
        num_rounds, size = squares.shape[-1] // width, squares.shape[-1]
        rounds = squares[:, : num_rounds * width].unflatten(-1, (num_rounds, self.turns, self.lanes))
        level = [torch.zeros(len(states), self.turns, self.lanes) for _ in range(self.levels)]
        for index in range(num_rounds):
            level[0] += rounds[:, index]
            left = index + 1
            for upper in range(1, self.levels):
                if left % self.step:
                    break
                level[upper] += level[upper - 1]
                level[upper - 1].zero_()
                left //= self.step
        for upper in level[1:]:
            level[0] += upper
        registers = level[0]
        at = num_rounds * width
        for turn in range((size - at) // self.lanes):
            registers[:, turn if self.rest == "in turn" else 0] += squares[:, at : at + self.lanes]
            at += self.lanes
        lanes = registers[:, 0].clone()
        for turn in range(1, self.turns):
            lanes += registers[:, turn]
        total = torch.zeros(len(states))
        tail = [squares[:, place] for place in range(at, size)]
        if self.lane_sum == "tree":
            while lanes.shape[1] > 1:
                lanes = lanes[:, : lanes.shape[1] // 2] + lanes[:, lanes.shape[1] // 2 :]
        columns = list(lanes.unbind(1))
        for each in tail + columns if self.tail == "before lanes" else columns + tail:
            total = total + each
        return total

    def round(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        if self.rounding == "even" or dtype is torch.float32:
            return values.to(dtype)
        away = 0x8000 if dtype is torch.bfloat16 else 0x1000
        bits = values.view(torch.int32) + (away if self.rounding == "away" else 0)
        return (bits & -2 * away).view(torch.float32).to(dtype)

    def mean_square(self, states: Tensor) -> Tensor:
        sums, size = self.sum_squares(states), torch.tensor(float(states.shape[-1]))
        return sums / size if self.mean == "divided" else sums * (1 / size)

    def normalise(self, states: Tensor, weight: Tensor, kind: Kind, epsilon: float) -> Tensor:
        root = (self.mean_square(states) + epsilon).rsqrt()
        if self.root == "next":
            root = root.nextafter(torch.tensor(torch.inf))
        values = states.float() * root[:, None]
        if kind is Kind.ROUNDED_AND_WEIGHTED:
            values = self.round(values, states.dtype).float()
        factor = weight.float() + 1 if kind is Kind.WEIGHTED_BY_ONE_MORE else weight.float()
        return self.round(values * factor, states.dtype)


RIGHT = Order()
WRONG = (
    replace(RIGHT, lanes=16),
    replace(RIGHT, lanes=4),
    replace(RIGHT, lanes=1, turns=1),
    replace(RIGHT, turns=1),
    replace(RIGHT, turns=2),
    replace(RIGHT, turns=8),
    replace(RIGHT, step=8),
    replace(RIGHT, step=32),
    replace(RIGHT, levels=1),
    replace(RIGHT, levels=2),
    replace(RIGHT, rest="in turn"),
    replace(RIGHT, lane_sum="tree"),
    replace(RIGHT, tail="after lanes"),
    replace(RIGHT, total="exact"),
    replace(RIGHT, mean="multiplied"),
    replace(RIGHT, root="next"),
)
SIZE = 16957  # three levels, whole registers that are left over, and values that fill none


def refuse(order: Order, dtype: torch.dtype, num_rows: int, size: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(norm, "normalise", order.normalise)
    monkeypatch.setattr(norm, "is_available", lambda: True)
    find_kind.cache_clear()
    found = {module_class: find_kind(shape_of(module_class, dtype, num_rows, size)) for module_class in KINDS}
    return set(found.values()) == {None}


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_probe_refuses_other_orders(dtype: torch.dtype, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not refuse(RIGHT, dtype, num_rows, SIZE, monkeypatch)
    for order in WRONG:
        assert refuse(order, dtype, num_rows, SIZE, monkeypatch), order


@pytest.mark.parametrize("size", [9, 64, 100, 776])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_probe_refuses_other_orders_of_few_squares(
    dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not refuse(RIGHT, dtype, 1, size, monkeypatch)
    generator = torch.Generator().manual_seed(size)
    states = torch.randn(500, size, generator=generator) * 2.0 ** torch.randint(-9, 3, (500, size), generator=generator)
    states = states.to(dtype)
    for order in WRONG:
        if order.root == "next" or not torch.equal(order.mean_square(states), RIGHT.mean_square(states)):
            assert refuse(order, dtype, 1, size, monkeypatch), order


@pytest.mark.parametrize("size", [32, 768])
@pytest.mark.parametrize("rounding", ["truncated", "away"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_probe_refuses_other_roundings(
    dtype: torch.dtype, rounding: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for num_rows in (1, 16):
        assert refuse(replace(RIGHT, rounding=rounding), dtype, num_rows, size, monkeypatch)


@needs_kernel
def test_a_module_stays_what_it_was() -> None:
    model = nn.ModuleDict({"norm": made(LlamaRMSNorm, 96, torch.bfloat16), "other": nn.LayerNorm(96)})
    module, other, plain = model["norm"], model["other"], copy.deepcopy(model["norm"])
    parameters, seen = dict(model.named_parameters()), []
    module.register_forward_hook(lambda *_: seen.append(True))
    speed_up_norms(model)
    assert model["norm"] is module
    assert type(other) is nn.LayerNorm
    assert isinstance(module, LlamaRMSNorm)
    assert type(module) is not LlamaRMSNorm
    assert (type(module).__name__, type(module).__module__) == (LlamaRMSNorm.__name__, LlamaRMSNorm.__module__)
    assert repr(module) == repr(plain)
    assert dict(model.named_parameters()) == parameters
    assert copy.deepcopy(module).variance_epsilon == plain.variance_epsilon
    before = type(module)
    speed_up_norms(model)  # a stage that shares the layer
    assert type(module) is before
    module.variance_epsilon = plain.variance_epsilon = 0.25
    assert_equal(plain, module, torch.randn(1, 96).bfloat16())
    assert seen


@needs_kernel
def test_the_norms_of_a_stage_are_replaced() -> None:
    norms = [
        each
        for each in Stage.load(dummy_spec("llama", "bfloat16"), 0, 2)._model.modules()
        if isinstance(each, LlamaRMSNorm)
    ]
    assert len(norms) == 4
    assert all(isinstance(each, FasterNorm) for each in norms)


def changed_forward(module: nn.Module, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "forward", lambda states: states + 1)


def changed_class(_: nn.Module, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LlamaRMSNorm, "forward", lambda _self, states: states + 1)


@pytest.mark.parametrize("change", [changed_forward, changed_class])
def test_another_forward_is_called(
    change: Callable[[nn.Module, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = faster(made(LlamaRMSNorm, 96, torch.bfloat16))
    states = torch.randn(1, 96).bfloat16()
    change(module, monkeypatch)
    assert torch.equal(module(states), states + 1)


def test_a_subclass_of_a_users_is_left_alone() -> None:
    class Louder(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return 2 * super().forward(hidden_states)

    module = made(Louder, 96, torch.bfloat16)
    speed_up_norms(module)
    assert type(module) is Louder


def test_what_the_kernel_does_not_compute_is_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    module = made(LlamaRMSNorm, 96, torch.bfloat16)
    twin: Any = faster(module)
    monkeypatch.setattr(norm, "normalise", lambda *_: pytest.fail("the norm is not the module's"))
    assert_equal(module, twin, torch.randn(96, 2).bfloat16().T)
    assert_equal(module, twin, torch.randn(2, 96))
    assert_equal(module, twin, torch.randn(5500, 96).bfloat16())
    states = torch.randn(2, 96).bfloat16()
    with torch.autocast("cpu", torch.float16):
        assert_equal(module, twin, states)
    with torch.inference_mode(False), torch.enable_grad():
        learning = faster(made(LlamaRMSNorm, 96, torch.bfloat16))
        learning(torch.randn(2, 96).bfloat16()).sum().backward()
        assert learning.get_parameter("weight").grad is not None
    twin.variance_epsilon = module.variance_epsilon = torch.tensor(0.5)
    assert_equal(module, twin, states)
    twin.variance_epsilon = 1e-6
    assert twin(hidden_states=states).shape == states.shape
    twin.train()
    twin(states)
    with pytest.raises(RuntimeError):
        twin(torch.randn(2, 95).bfloat16())
