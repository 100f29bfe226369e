"""``lingualinked demo``: runs the bundled model in worker processes, and compares it with the unsharded one.

Knows the public API; prints.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from typing import Any

import lingualinked as ll
from lingualinked.cli.devices_option import read_devices
from lingualinked.console import new_console
from lingualinked.display.plan_view import plan_rows
from lingualinked.display.telemetry_view import telemetry_rows
from lingualinked.quantities import bytes_text, count_text
from lingualinked.sharded.loading.arguments import LoadArguments
from lingualinked.sharded.loading.placing import find_or_fit_plan

PROMPT = "Once upon a time there lived"


def run_demo(devices: str, max_new_tokens: int, *, progress: bool) -> None:
    """Show the plan, streamed tokens, speed, bytes per hop, memory, and whether the unsharded model gives the same tokens."""
    asked = read_devices(devices)
    console = new_console()
    path = ll.sample_model()
    console.print(f"[bold]Sample model[/] {path}\n", soft_wrap=True)
    started = time.perf_counter()
    # 1) limit the memory of each device, so that the model has to be cut
    from lingualinked.sharded.loading.describing import describe  # imports torch

    if devices.isdecimal():
        memory = _memory_of_each(describe(LoadArguments.of(path)).footprint().profile, len(asked.devices))
        limited = tuple(dataclasses.replace(each, memory=memory) for each in asked.devices)
        asked = dataclasses.replace(asked, devices=limited)
        if len(limited) > 1:
            console.print(f"Each device has {bytes_text(memory)} of memory, so that none can hold the whole model.\n")
    with ll.Cluster(asked) as cluster:
        # 2) measure, solve and load
        arguments = LoadArguments.of(path, cluster=cluster)
        plan = find_or_fit_plan(describe(arguments), arguments)
        console.print(plan_rows(plan))
        model = ll.ShardedModel.from_pretrained(path, cluster=cluster, plan=plan, progress=progress)

        # 3) generate a first token
        import torch
        from transformers import AutoTokenizer, TextStreamer

        tokenizer = AutoTokenizer.from_pretrained(path)
        inputs = tokenizer(PROMPT, return_tensors="pt")
        model.generate(**inputs, max_new_tokens=1)
        console.print(f"\ntime to the first token, start included: {time.perf_counter() - started:.1f} s\n")

        # 4) stream an answer, and show what it took
        before = model.telemetry
        streamer = TextStreamer(tokenizer, skip_special_tokens=True)
        decode_started = time.perf_counter()
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
        elapsed_s = time.perf_counter() - decode_started
        after = model.telemetry
        num_new = tokens.shape[1] - inputs["input_ids"].shape[1]
        console.print(f"\n{count_text(num_new, 'token')}, {num_new / elapsed_s:.1f} tokens/s")
        console.print(_bytes_per_hop(before, after, num_new))
        console.print()
        console.print(telemetry_rows(after))

        # 5) compare with the unsharded model on as many threads
        torch.set_num_threads(cluster.devices[0].threads or 1)
        expected = unsharded(path).generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        equal = torch.equal(tokens, expected)
        verdict = "[green]equal[/] to" if equal else "[red]NOT equal[/] to"
        console.print(
            f"\nTokens are {verdict} the unsharded model's (both on {count_text(torch.get_num_threads(), 'thread')})."
        )
    if not equal:
        raise ll.LingualinkedError("the tokens differ from the unsharded model's: please report this")


def _memory_of_each(model: ll.ModelProfile, num_devices: int) -> int:
    """Return the bytes that each device needs for its share of the layers, and 10 % more."""
    workload = model.fit_workload(None)
    num_layers = math.ceil(model.num_layers / num_devices)
    layer_bytes = max(model.layer_weight_bytes) + max(model.layer_kv_bytes) * workload.num_tokens
    layer_bytes += max(model.layer_state_bytes)
    ends_bytes = model.prologue_bytes + model.epilogue_bytes
    if num_devices > 1:
        ends_bytes = max(model.prologue_bytes, model.epilogue_bytes)
    stage_bytes = workload.prompt_tokens * model.working_bytes + model.logits_bytes
    return math.ceil(1.1 * (num_layers * layer_bytes + ends_bytes + stage_bytes))


def _bytes_per_hop(before: ll.Telemetry, after: ll.Telemetry, num_tokens: int) -> str:
    """Return the bytes per hop of a decode step: the total less two prefills, of which ``before`` holds one."""
    lines = []
    stages = zip(before.stages, after.stages, strict=True)
    for (old, new), (_, following) in itertools.pairwise(stages):
        decoded = new.sent_bytes - 2 * old.sent_bytes
        lines.append(f"{new.device} -> {following.device}: {bytes_text(decoded / max(num_tokens - 1, 1))} per token")
    return "\n".join(lines)


def unsharded(path: str, dtype: str = "auto") -> Any:
    """Load the unsharded model into this process, its weights in aligned memory as in the workers."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model
