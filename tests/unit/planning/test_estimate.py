"""Stated specs give a profile by the roofline model, whose times are those that a person works out by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given, strategies as st
from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig

import lingualinked as ll
from families import FAMILIES, tiny_config
from lingualinked.model.cutting.architectures import check_architecture
from lingualinked.model.spec import ModelSpec
from lingualinked.planning.estimate import LayerOperations, _num_attended, roofline_profile
from lingualinked.sharded.loading.describing import Described, describe_spec
from profiles import MIB, model_profile

SLOW_MEMORY = ll.DeviceSpecs(flops="1PFLOP/s", memory_bandwidth=10 * MIB)
SLOW_COMPUTE = ll.DeviceSpecs(flops=10 * MIB / 2, memory_bandwidth="1TB/s")
NO_ATTENTION = (LayerOperations(attention_flops=0.0),)

STAGE_S = 1e-3  # of a stage besides its layers, in any step
HOPS_S = 2 * 5e-4  # of the messages from the caller and back


def described(config: PreTrainedConfig, dtype: str) -> Described:
    return describe_spec(
        ModelSpec(
            class_name=check_architecture(config),
            config_json=config.to_json_string(use_diff=False),
            dtype=dtype,
            attn_implementation=None,
            load_format="dummy",
            files=(),
            seed=0,
        )
    )


def predicted(config: PreTrainedConfig, specs: ll.DeviceSpecs, workload: ll.Workload, dtype: str) -> Any:
    profile = described(config, dtype).estimate([ll.Device(name="gpu")], {"gpu": specs}, None, workload)
    return ll.Plan.from_spans([("gpu", 0, config.num_hidden_layers)], profile=profile, workload=workload).predicted


def llama_3_8b() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
        max_position_embeddings=8192,
    )


@pytest.mark.parametrize("prompt", [128, 8000])
def test_llama_3_8b_on_one_gpu_by_hand(prompt: int) -> None:
    """80 TFLOP/s and 900 GB/s, bfloat16: a long prompt is bound by operations, a token by reading the weights."""
    gpu = ll.DeviceSpecs(flops="80TFLOP/s", memory_bandwidth="900GB/s")
    workload = ll.Workload(prompt_tokens=prompt, new_tokens=192)
    seen = predicted(llama_3_8b(), gpu, workload, "bfloat16")

    # q and o: 4096 x 4096; k and v: 4096 x 1024; gate, up and down: 4096 x 14336; two norms of 4096.
    layers = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096)
    head = 128_256 * 4096 + 4096  # and the last norm
    # 32 query heads of 128: q k^T and p v, 2 operations each, for every token and all tokens up to itself.
    attention_flops = 32 * (2 * 2 * 32 * 128) * prompt * (prompt + 1) / 2
    head_s = 2 * head / 900e9
    compute_s = (2 * layers * prompt + attention_flops) / 80e12
    assert seen.first_token_s == pytest.approx(compute_s + head_s + STAGE_S + HOPS_S, rel=1e-6)
    # 8 KV heads of 128, keys and values, 2 bytes each.
    context = prompt + 190 / 2
    read = 2 * (layers + head) + 32 * (2 * 8 * 128 * 2) * (context + 1)
    assert seen.step_s == pytest.approx(read / 900e9 + STAGE_S + HOPS_S, rel=1e-6)
    # The same with rounded figures, as one would on paper: 7.0 G parameters in the layers, 0.53 G in the head.
    on_paper = 2 * 7.0e9 * prompt / 80e12 + 17e12 * (prompt / 8000) ** 2 / 80e12 + 1.05e9 / 900e9 + 2e-3
    assert seen.first_token_s == pytest.approx(on_paper, rel=0.01)
    assert seen.first_token_s == pytest.approx({128: 25.6e-3, 8000: 1.61}[prompt], rel=0.01)


def test_other_prompts_than_the_profile_was_made_for() -> None:
    """A profile for prompts of 128 tokens predicts one of 8,000: neither the constant part nor attention goes astray."""
    gpu = {"gpu": ll.DeviceSpecs(flops="80TFLOP/s", memory_bandwidth="900GB/s")}
    profile = described(llama_3_8b(), "bfloat16").estimate([ll.Device(name="gpu")], gpu, None, None)
    plan = ll.Plan.from_spans([("gpu", 0, 32)], profile=profile)
    other = plan.predict(ll.Workload(prompt_tokens=8000, new_tokens=192))
    assert other.first_token_s == pytest.approx(1.61, rel=0.02)
    assert plan.predict(ll.Workload(prompt_tokens=8, new_tokens=1)).first_token_s == pytest.approx(
        2 * 7.5e9 / 900e9 + STAGE_S + HOPS_S, rel=0.01
    )


def test_two_stages_take_their_constant_part_once_each() -> None:
    workload = ll.Workload(prompt_tokens=4000, new_tokens=2)
    specs = dict.fromkeys("ab", ll.DeviceSpecs(flops="80TFLOP/s", memory_bandwidth="900GB/s"))
    profile = described(llama_3_8b(), "bfloat16").estimate(
        [ll.Device(name=name) for name in "ab"], specs, None, workload
    )
    one, two = (
        ll.Plan.from_spans(spans, profile=profile, workload=workload).predicted
        for spans in ([("a", 0, 32)], [("a", 0, 16), ("b", 16, 32)])
    )
    assert two.first_token_s - one.first_token_s == pytest.approx(STAGE_S + HOPS_S / 2, rel=1e-6)
    assert two.step_s - one.step_s == pytest.approx(STAGE_S + HOPS_S / 2, rel=1e-6)


def test_a_tied_head_is_read_for_every_token_on_a_cpu() -> None:
    """50 GFLOP/s and 20 GB/s, float32, 4 rows; the head is the embedding, and costs what a head costs."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=32_000,
        tie_word_embeddings=True,
    )
    workload = ll.Workload(prompt_tokens=100, new_tokens=2, batch_size=4)
    seen = predicted(config, ll.DeviceSpecs(flops="50GFLOP/s", memory_bandwidth="20GB/s"), workload, "float32")
    layers = 2 * (4 * 512 * 512 + 3 * 512 * 1024 + 2 * 512)
    head = 32_000 * 512 + 512
    # A prefill: 400 tokens, each with 8 heads of 64, and the logits of 4 positions: 131 M operations in 2.6 ms, while
    # reading the head's 66 MB takes 3.3 ms.
    attention = 2 * (2 * 2 * 8 * 64) * 4 * 100 * 101 / 2
    head_s = 4 * head / 20e9
    assert 4 * 2 * head / 50e9 < head_s
    assert seen.first_token_s == pytest.approx(
        (2 * layers * 400 + attention) / 50e9 + head_s + STAGE_S + HOPS_S, rel=1e-6
    )
    read = 4 * layers + 2 * 4 * (2 * 8 * 64 * 4) * (100 + 1)  # weights, and 4 rows' keys and values of 101 tokens
    assert seen.step_s == pytest.approx(read / 20e9 + head_s + STAGE_S + HOPS_S, rel=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_mixture_of_experts_by_hand(dtype: str) -> None:
    """Mixtral's shape: a token goes through 2 of 8 experts, and a prompt's tokens together through all of them."""
    config = MixtralConfig(
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=1000,
        sliding_window=None,
    )
    workload = ll.Workload(prompt_tokens=500, new_tokens=2)
    gpu = ll.DeviceSpecs(flops="10TFLOP/s", memory_bandwidth="500GB/s")
    seen = predicted(config, gpu, workload, dtype)
    item = {"bfloat16": 2, "float32": 4}[dtype]
    dense = 2 * 1024 * 1024 + 2 * 1024 * 256 + 8 * 1024 + 2 * 1024  # attention, router, norms
    expert = 3 * 1024 * 3584
    head_s = item * (1000 * 1024 + 1024) / 500e9
    attention = 2 * (2 * 2 * 16 * 64) * 500 * 501 / 2
    compute_s = (2 * 2 * (dense + 2 * expert) * 500 + attention) / 10e12
    read_s = item * 2 * (dense + 8 * expert) / 500e9
    assert compute_s > read_s  # all experts are read, in less time
    assert seen.first_token_s == pytest.approx(compute_s + head_s + STAGE_S + HOPS_S, rel=1e-6)
    read = item * 2 * (dense + 2 * expert) + 2 * (2 * 4 * 64 * item) * 501
    assert seen.step_s == pytest.approx(read / 500e9 + head_s + STAGE_S + HOPS_S, rel=1e-6)


@pytest.mark.parametrize("tokens", [1, 2, 3, 100])
def test_more_tokens_touch_more_experts(tokens: int) -> None:
    model = model_profile(1)
    operations = (LayerOperations(attention_flops=0.0, expert_bytes=8 * MIB, expert_share=0.25),)
    workload = ll.Workload(prompt_tokens=tokens, new_tokens=1)
    profile = roofline_profile(model, operations, [ll.Device(name="a")], {"a": SLOW_MEMORY}, workload=workload)
    # 2 MiB are dense; each token leaves 3 of 4 experts alone, and n of them together (3 / 4)^n of all.
    weights = 2 * MIB + 8 * MIB * (1 - 0.75**tokens)
    assert profile.devices[0].layers[0].seconds(1, tokens, 0) == pytest.approx((weights + tokens * 1024) / (10 * MIB))


def test_a_sliding_window_bounds_what_is_attended_to_and_read() -> None:
    model = dataclasses.replace(model_profile(1), layer_windows=(64,))
    operations = (LayerOperations(attention_flops=1e6),)
    workload = ll.Workload(prompt_tokens=1000, new_tokens=100)
    specs = {"m": SLOW_MEMORY, "c": SLOW_COMPUTE}
    profile = roofline_profile(model, operations, [ll.Device(name=each) for each in "mc"], specs, workload=workload)
    memory, compute = (each.layers[0] for each in profile.devices)
    # 10 MiB of weights and 64 + 1 tokens of 1 KiB, however long the text is.
    assert memory.seconds(1, 1, 1050) == pytest.approx(1 + 65 * 1024 / (10 * MIB))
    # 2.5 Mi parameters for 1,000 tokens; the first 64 attend to 1 up to 64 tokens, the others to 64 each.
    flops = 2 * 2.5 * MIB * 1000 + 1e6 * (64 * 65 / 2 + 936 * 64)
    assert compute.seconds(1, 1000, 0) == pytest.approx(flops / (5 * MIB))


@given(st.integers(1, 60), st.integers(0, 60), st.none() | st.integers(1, 60))
def test_the_tokens_attended_to_are_counted(tokens: int, context: int, window: int | None) -> None:
    each = (min(context + new + 1, window or math.inf) for new in range(tokens))
    assert _num_attended(tokens, context, window) == sum(each)


@pytest.mark.parametrize("family", ["llama", "gemma3", "falcon-7b", "gpt2", "mpt", "bloom", "qwen2-moe", "mixtral"])
def test_operations_are_counted_whatever_heads_are_called(family: str) -> None:
    """Queries of all heads meet all keys, then weigh all values: 4 x heads x size of a head, with shared KV heads as well."""
    config = tiny_config(family)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    model = described(config, "float32")
    operations = model.operations(model.footprint().profile)
    assert {each.attention_flops for each in operations} == {4 * config.num_attention_heads * head_dim}
    experts = FAMILIES[family][1].get("num_experts_per_tok")
    assert {each.expert_share for each in operations} == {1.0 if experts is None else 0.5}  # 2 of 4
    size = FAMILIES[family][1].get("moe_intermediate_size", 48)
    assert {each.expert_bytes for each in operations} == {0 if experts is None else 4 * 3 * 32 * size * 4}


def test_a_step_is_bound_by_memory_or_by_compute() -> None:
    model = model_profile(4)
    devices = [ll.Device(name="memory"), ll.Device(name="compute"), ll.Device(name="half", slowdown=2.0)]
    specs = {"memory": SLOW_MEMORY, "compute": SLOW_COMPUTE, "half": SLOW_MEMORY}
    workload = ll.Workload(prompt_tokens=100, new_tokens=10)
    profile = roofline_profile(model, NO_ATTENTION, devices, specs, workload=workload)
    memory, compute, half = (each.layers[0] for each in profile.devices)
    # 10 MiB of weights at 10 MiB/s, plus the KV that is read; twice as long on a device half as fast.
    assert memory.seconds(1, 1, 0) == pytest.approx(1.0, rel=0.02)
    assert half.seconds(1, 1, 0) == pytest.approx(2 * memory.seconds(1, 1, 0))
    assert memory.seconds(1, 100, 0) == pytest.approx(1.0, rel=0.02)
    # 2.5 M parameters (float32), two operations each, at 5.24 M operations a second; a prefill has 100 times as many.
    assert compute.seconds(1, 1, 0) == pytest.approx(1.0, rel=0.02)
    assert compute.seconds(1, 100, 0) == pytest.approx(100.0, rel=0.05)
    assert profile.versions == {}


def test_links_have_what_their_ends_say() -> None:
    devices = [ll.Device(name="a", bandwidth=1000.0), ll.Device(name="b", latency=0.5)]
    links = {("b", "a"): ll.Link(latency=3)}
    profile = roofline_profile(model_profile(2), NO_ATTENTION, devices, dict.fromkeys("ab", SLOW_MEMORY), links=links)
    assert profile.link("a", "b").bandwidth_bytes_per_s == 1000.0
    assert profile.link("a", "b").latency_s == pytest.approx(0.5, abs=0.01)
    assert profile.link("b", "a").latency_s == pytest.approx(3, abs=0.01)
    assert profile.link("b", "caller").bandwidth_bytes_per_s is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"flops": 0, "memory_bandwidth": 1}, "flops=0"),
        ({"flops": -1.0, "memory_bandwidth": 1}, "flops=-1.0"),
        ({"flops": math.nan, "memory_bandwidth": 1}, "flops=nan"),
        ({"flops": "much", "memory_bandwidth": 1}, "flops='much'"),
        ({"flops": True, "memory_bandwidth": 1}, "flops=True"),
        ({"flops": 1, "memory_bandwidth": "x"}, "memory_bandwidth='x'"),
    ],
)
def test_figures_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.ArgumentError, match=message):
        ll.DeviceSpecs(**fields)


def test_what_can_not_be_estimated() -> None:
    def estimate(devices: list[ll.Device], **specs: ll.DeviceSpecs) -> None:
        roofline_profile(model_profile(2), NO_ATTENTION, devices, specs)

    with pytest.raises(ll.ArgumentError, match="specs are missing for device 'b'"):
        estimate([ll.Device(name="a"), ll.Device(name="b")], a=SLOW_MEMORY)
    with pytest.raises(ll.ArgumentError, match="hold 'a' twice"):
        estimate([ll.Device(name="a")] * 2, a=SLOW_MEMORY)
    with pytest.raises(ll.ArgumentError, match="devices of a profile are empty"):
        estimate([])


def test_texts_that_are_too_long_are_refused_wherever_a_workload_meets_a_model() -> None:
    short, long = ll.Workload(prompt_tokens=16, new_tokens=16), ll.Workload(prompt_tokens=16, new_tokens=17)
    model = dataclasses.replace(model_profile(2), max_positions=32)
    devices, specs = [ll.Device(name="a")], {"a": SLOW_MEMORY}
    profile = roofline_profile(model, NO_ATTENTION, devices, specs, workload=short)
    plan = ll.solve(profile, workload=short)
    refusal = r"prompt_tokens=16 and new_tokens=17 of the workload exceed the 32 positions"
    for ask in (
        lambda: roofline_profile(model, NO_ATTENTION, devices, specs, workload=long),
        lambda: ll.solve(profile, workload=long),
        lambda: plan.predict(long),
        lambda: ll.simulate(plan, long),
        lambda: ll.Plan.from_spans([("a", 0, 2)], profile=profile, workload=long),
    ):
        with pytest.raises(ll.ArgumentError, match=refusal):
            ask()
    default = ll.Plan.from_spans([("a", 0, 2)], profile=profile)
    assert default.predicted.workload.num_tokens == 32  # the default workload is made to fit
    assert dataclasses.replace(default, workload=None).predicted == default.predicted
    assert default.compare(plan).predictions[0] == default.predicted
