"""Measures the rates of devices, in about a second: operations and bytes per second in layers of a model of no one's.

Knows clusters and made-up models; not what is planned with the rates.
"""

from __future__ import annotations

import dataclasses
import functools
import threading

from transformers.models.llama import LlamaConfig

from lingualinked.cluster.cluster import Cluster
from lingualinked.cluster.measuring.profiling import measure_models
from lingualinked.device import Device
from lingualinked.device_specs import DeviceSpecs
from lingualinked.model.cutting.footprint import Footprint
from lingualinked.model.spec import ModelSpec
from lingualinked.planning.estimate import LayerOperations, roofline_specs
from lingualinked.sharded.loading.describing import describe_spec
from lingualinked.workload import Workload


@dataclasses.dataclass(frozen=True, slots=True)
class _Size:
    """The size of the made-up layers, and of the prompt that keeps a device busy with them."""

    width: int
    prompt_tokens: int


_PROCESSOR = _Size(1024, 128)  # 23 MB a layer in bfloat16
_GPU = _Size(4096, 2048)  # smaller ones would show the time of launching kernels
_NUM_LAYERS = 2
_VOCABULARY = 1024
_counting = threading.Lock()  # operations are counted by a mode that is torch's, not a thread's


def measure_rates(cluster: Cluster, device: Device, dtype: str) -> DeviceSpecs:
    """Make a device measure its rates in a dtype; raises like the measuring of a model there."""
    size = _PROCESSOR if device.accelerator == "cpu" else _GPU
    with _counting:
        footprint, operations = _made_up(size, dtype)
    workload = Workload(prompt_tokens=size.prompt_tokens, new_tokens=1)
    (answer,) = measure_models(cluster, [device], footprint, workload, lambda _device, _num_done: None)
    return roofline_specs(footprint.profile, operations, answer.layers[0], cluster.as_it_behaves(device).slowdown)


@functools.cache
def _made_up(size: _Size, dtype: str) -> tuple[Footprint, LayerOperations]:
    config = LlamaConfig(
        hidden_size=size.width,
        intermediate_size=11 * size.width // 4,
        num_hidden_layers=_NUM_LAYERS,
        num_attention_heads=size.width // 64,
        num_key_value_heads=size.width // 256,
        vocab_size=_VOCABULARY,
    )
    config.dtype = dtype
    spec = ModelSpec(
        class_name="LlamaForCausalLM",
        config_json=config.to_json_string(use_diff=False),
        dtype=dtype,
        attn_implementation=None,
        load_format="blank",
        files=(),
    )
    described = describe_spec(spec)
    footprint = described.footprint()
    (operations,) = described.operations(footprint.profile)
    return footprint, operations
