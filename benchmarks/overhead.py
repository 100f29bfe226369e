"""``python -m benchmarks overhead``: what sharding costs a single stream, and what watching it for rebalancing adds.

Knows the public face and the unsharded model with the same weights; alternates the two in one process.
"""

from __future__ import annotations

import functools
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lingualinked as ll
from lingualinked.cli.repeats import Repeats, ratios
from lingualinked.console import new_console
from lingualinked.model.span_loading import load_span
from lingualinked.model.spec import ModelSpec
from lingualinked.tables import Rows

VOCABULARY = 32000
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": None,
}
"""A Llama of about 160 million parameters."""

_WATCH_ONLY = ll.RebalancePolicy(margin=1e9)
_WATCHED_TOKENS = 256


def run_overhead(contexts: tuple[int, ...], new_tokens: int, repeats: int) -> None:
    """Print decode speed of both sides at each context length, the ratio, the time of a hop, and what watching costs."""
    torch.set_num_threads(1)
    console = new_console()
    plan = ll.Plan.from_spans([("worker-0", 0, 6), ("worker-1", 6, 12)])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE))
        with ll.Cluster([ll.Device(name=name, threads=1) for name in plan.devices]) as cluster:
            load = functools.partial(
                ll.ShardedModel.from_pretrained,
                folder,
                cluster=cluster,
                plan=plan,
                load_format="dummy",
                progress=False,
            )
            with load() as sharded:
                unsharded = unsharded_dummy(folder)
                for context in contexts:
                    console.print(_measure(sharded, unsharded, context, new_tokens, repeats))
                with load(rebalance=_WATCH_ONLY) as watched:
                    console.print(_measure_watching(sharded, watched, contexts[0], repeats))


def unsharded_dummy(folder: str, dtype: str = "bfloat16") -> Any:
    """Make the unsharded transformers model with the weights that ``load_format="dummy"`` fills."""
    config = AutoConfig.from_pretrained(folder)
    spec = ModelSpec(
        class_name=config.architectures[0],
        config_json=config.to_json_string(use_diff=False),
        dtype=dtype,
        attn_implementation=None,
        load_format="dummy",
        files=(),
    )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.load_state_dict(load_span(spec, 0, config.num_hidden_layers).model.state_dict())
    return model.eval()


def _measure(sharded: Any, unsharded: Any, context: int, new_tokens: int, repeats: int) -> Rows:
    torch.manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (1, context))
    tokens = [model.generate(ids, max_new_tokens=new_tokens, do_sample=False) for model in (unsharded, sharded)]
    if not torch.equal(*tokens):
        raise ll.LingualinkedError("the tokens differ from the unsharded model's: please report this")
    speeds: dict[str, list[float]] = {"unsharded": [], "sharded": []}
    hops_us: list[float] = []
    for _ in range(repeats):
        speeds["unsharded"].append(tokens_per_s(unsharded, ids, new_tokens))
        speeds["sharded"].append(tokens_per_s(sharded, ids, new_tokens))
        hops_us.append(_hop_us(sharded, ids))
    ours, theirs = Repeats(speeds["sharded"]), Repeats(speeds["unsharded"])
    return Rows(
        f"Decode at context {context}, 2 workers x 1 thread against 1 thread, median of {repeats}",
        ("what", "measured"),
        [
            ("unsharded, tokens/s", theirs.text()),
            ("sharded, tokens/s", ours.text()),
            ("ratio", ratios(ours, theirs).text(3)),
            ("one of 3 hops", Repeats(hops_us).text(0, " µs")),
        ],
    )


def _measure_watching(plain: Any, watched: Any, context: int, repeats: int) -> Rows:
    """Compare decode speed with a balancer that is told of every step, looks at the devices and moves nothing."""
    ids = torch.randint(3, VOCABULARY, (1, context))
    speeds: dict[str, list[float]] = {"plain": [], "watched": []}
    shares = []
    for model in (plain, watched):
        tokens_per_s(model, ids, 8)
    for repeat in range(2 * repeats):
        sides = [("plain", plain), ("watched", watched)]
        for name, model in sides if repeat % 2 else reversed(sides):
            used_s, began_s = _control_s(), time.perf_counter()
            speeds[name].append(tokens_per_s(model, ids, _WATCHED_TOKENS))
            if model is watched:
                shares.append(100 * (_control_s() - used_s) / (time.perf_counter() - began_s))
    with_it, without = Repeats(speeds["watched"]), Repeats(speeds["plain"])
    return Rows(
        f"Decode watched for rebalancing against not, {_WATCHED_TOKENS} tokens, median of {2 * repeats}",
        ("what", "measured"),
        [
            ("not watched, tokens/s", without.text()),
            ("watched, tokens/s", with_it.text()),
            ("ratio", ratios(with_it, without).text(3)),
            ("processor time of the thread that decides", Repeats(shares).text(2, " %")),
        ],
    )


def _control_s() -> float:
    """Seconds of processor time that threads which decide on rebalancing have used so far."""
    deciding = {thread.native_id for thread in threading.enumerate() if thread.name == "lingualinked-control"}
    return sum(each.user_time + each.system_time for each in psutil.Process().threads() if each.id in deciding)


def tokens_per_s(model: Any, ids: torch.Tensor, max_new_tokens: int, **arguments: Any) -> float:
    """Return the decode speed without the prefill: the clock starts when the first token is out."""
    clock = _Clock()
    model.generate(ids, max_new_tokens=max_new_tokens, streamer=clock, **{"do_sample": False, **arguments})
    return (max_new_tokens - 1) / (clock.times[-1] - clock.times[1])


def _hop_us(sharded: Any, ids: torch.Tensor) -> float:
    """Microseconds of a hop: a decode step's time that is compute in no stage, over caller -> 0 -> 1 -> caller."""
    past = sharded(ids, logits_to_keep=1).past_key_values
    hops = []
    for _ in range(20):
        started = time.perf_counter()
        sharded(ids[:, -1:], past_key_values=past)
        elapsed_us = (time.perf_counter() - started) * 1e6
        computed_us = [stage.compute_s * 1e6 for stage in past.session.last_step.stages]
        hops.append((elapsed_us - sum(computed_us)) / (len(computed_us) + 1))
    return Repeats(hops).median


class _Clock:
    """A streamer that notes when tokens come: the prompt first, then one by one."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002 - the time is all that counts
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""
