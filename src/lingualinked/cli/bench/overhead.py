"""``lingualinked bench overhead``: what a step costs beside the compute, and what crosses the sockets.

Knows the timings of steps; models whose layers compute next to nothing leave the fixed cost.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import torch

from lingualinked.cli.bench.measurement import Measurement
from lingualinked.cli.bench.models import BenchModels
from lingualinked.cli.bench.timing import decode_tokens_per_s
from lingualinked.quantities import count_text
from lingualinked.telemetry.samples import StepSample

_TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 256,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": None,
}
"""A Llama whose layers compute next to nothing, but for their number."""

_MOST_HOP_US = 150.0
_NUM_WARM = 50
_NUM_CALLS = 5


@dataclasses.dataclass(slots=True)
class _Parts:
    """Microseconds of a hop by where they go, step by step: a step of N stages has N + 1 hops."""

    whole: list[float] = dataclasses.field(default_factory=list)
    transport: list[float] = dataclasses.field(default_factory=list)  # sockets and encryption, to and between stages
    waiting: list[float] = dataclasses.field(default_factory=list)  # in workers' queues
    codec: list[float] = dataclasses.field(default_factory=list)  # encoding and decoding in workers
    rest: list[float] = dataclasses.field(
        default_factory=list
    )  # the way back to the caller, its thread, workers' loops
    caller: list[float] = dataclasses.field(default_factory=list)  # of the step, in `forward` before and after it

    def add(self, step: StepSample, elapsed_s: float) -> None:
        """Count a step's times."""
        stages, num_hops = step.stages, len(step.stages) + 1
        compute, transport, waiting, codec = (
            sum(getattr(stage, name) for stage in stages) for name in ("compute_s", "hop_s", "wait_s", "codec_s")
        )
        whole = step.total_s - compute
        times = {"whole": whole, "transport": transport, "waiting": waiting, "codec": codec}
        times["rest"] = whole - transport - waiting - codec
        for name, value in times.items():
            getattr(self, name).append(value * 1e6 / num_hops)
        self.caller.append((elapsed_s - step.total_s) * 1e6)


def write_tiny(folder: str, num_layers: int) -> None:
    """Write the config of a model whose layers compute next to nothing."""
    (Path(folder) / "config.json").write_text(json.dumps({**_TINY, "num_hidden_layers": num_layers}), encoding="utf-8")


def measure_overhead(models: BenchModels, num_steps: int) -> list[Measurement]:
    """Measure the fixed cost of a hop, by its parts, and the bytes of a decode step."""
    model = models.sharded
    ids = models.draw_ids(1, 16)
    parts = _Parts()
    sent: list[list[float]] = []
    with torch.inference_mode():
        past = model(ids, logits_to_keep=1).past_key_values
        for number in range(_NUM_WARM + num_steps):
            began_s = time.perf_counter()
            model(ids[:, -1:], past_key_values=past)
            elapsed_s = time.perf_counter() - began_s
            if number >= _NUM_WARM:
                parts.add(past.session.last_step, elapsed_s)
                sent.append([float(stage.sent_bytes) for stage in past.session.last_step.stages])
    num_stages = len(sent[0])
    state_bytes = model.dtype.itemsize * model.config.get_text_config().hidden_size
    notes = [
        (
            f"Of a step of {count_text(num_stages, 'stage')}, all that is compute in no stage, by its {count_text(num_stages + 1, 'hop')}; "
            "the caller's checks that nothing has been changed that a stage would have to know are apart, since they are once a step."
        ),
        f"Of the hops: median and quartiles of {count_text(num_steps, 'step')}.",
        f"A hidden state has {count_text(state_bytes, 'byte')}.",
    ]
    measurements = [
        Measurement(
            what="fixed cost of a hop",
            unit="µs",
            values={"whole": _quiet(parts.whole)},
            at_most=_MOST_HOP_US,
            notes=tuple(notes),
        )
    ]
    for name, what in (
        ("transport", "sockets and encryption"),
        ("waiting", "waiting in the workers' queues"),
        ("codec", "encoding and decoding in workers"),
        ("rest", "the way back to the caller, its thread, and the workers' loops"),
    ):
        measurements.append(Measurement(what=f"  {what}", unit="µs", values={"part": _quiet(getattr(parts, name))}))
    caller = Measurement(what="the caller's own work", unit="µs", values={"a step": _quiet(parts.caller)})
    measurements.append(caller)
    if num_stages > 1:
        measurements.append(
            Measurement(
                what="bytes of a hop beside the hidden state",
                unit="bytes",
                values={"the last hop between stages": [step[-2] - state_bytes for step in sent[:1]]},
                at_most=256.0 + 32 * num_stages,
            )
        )
    return [*measurements, *_measure_sampling(models, num_steps)]


def _measure_sampling(models: BenchModels, num_steps: int) -> list[Measurement]:
    """Measure what a sampled token costs beyond compute, and what the last stage sends to the caller for it."""
    model, ids = models.sharded, models.draw_ids(1, 16)
    beyond, sent = [], []
    for _ in range(_NUM_CALLS):
        new_tokens = max(8, num_steps // _NUM_CALLS)
        token_s = 1 / decode_tokens_per_s(model, ids, new_tokens, do_sample=True)
        steps = [step for step in model.telemetry.steps[-new_tokens:] if step.is_decode]
        compute_s = sum(stage.compute_s for step in steps for stage in step.stages) / len(steps)
        beyond.append((token_s - compute_s) * 1e6)
        sent.append(sum(step.stages[-1].sent_bytes for step in steps) / len(steps))
    return [
        Measurement(what="a sampled token, all that is compute in no stage", unit="µs", values={"generate": beyond}),
        Measurement(
            what="bytes back to the caller for a sampled token",
            unit="bytes",
            values={"from the last stage": sent},
            at_most=256.0,
        ),
    ]


def _quiet(values: list[float]) -> list[float]:
    """Return the quartiles: single steps of a busy machine may wait for a core."""
    ordered = sorted(values)
    return [ordered[len(ordered) * quarter // 4] for quarter in (1, 2, 3)]
