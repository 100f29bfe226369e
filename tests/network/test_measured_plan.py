"""A plan from measurements of a slow device, and one of a slow link, beat the even plan by what was predicted."""

from __future__ import annotations

from pathlib import Path

import pytest

from network.hosts import Host, Network
from network.lab import log
from network.machines import Caller, Daemon, own_key
from network.uncut import PROMPT, Uncut

pytestmark = pytest.mark.lengthy(compares_durations=True)

WITHIN = 0.15
"""Of what was predicted."""

COMPARE = """
import statistics, time, torch
workload = ll.Workload(prompt_tokens=len(prompt), new_tokens=num_new)
cluster = ll.Cluster([{devices}])
for _ in range(3):  # other programs may disturb a measurement, which it then says
    profile = ll.profile_model(path, cluster, workload=workload)
    if not profile.doubt:
        break
plans = {{
    "even": ll.baseline(profile, "even", workload=workload),
    "measured": ll.solve(profile, workload=workload, objective="latency"),
}}
models = {{
    name: ll.ShardedModel.from_pretrained(path, cluster=cluster, plan=plan, progress=False) for name, plan in plans.items()
}}
inputs = torch.tensor([prompt])
seconds = {{name: [] for name in plans}}
tokens = {{}}
for turn in range(8):
    for name, model in models.items():  # in turns: what else the machine does hits both
        began_s = time.perf_counter()
        generated = model.generate(inputs, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False)
        if turn:  # the first one warms up
            seconds[name].append(time.perf_counter() - began_s)
        tokens[name] = generated[0].tolist()
result = {{
    name: {{
        "seconds": statistics.median(seconds[name]),
        "predicted": plan.predicted.request_s,
        "spans": [(stage.device, stage.start, stage.end) for stage in plan.stages],
        "tokens": tokens[name],
    }}
    for name, plan in plans.items()
}}
for model in models.values():
    model.close()
cluster.close()
"""


def test_with_a_slow_device(network: Network, large_checkpoint: Path, uncut_large: Uncut) -> None:
    laptop, fast, slow = (network.add(name) for name in ("laptop", "desk-pc", "attic-nas"))
    fields = {fast: {"memory": "45MiB"}, slow: {"memory": "45MiB", "slowdown": 4.0}}
    compare(laptop, fields, large_checkpoint, uncut_large, PROMPT, 40)


def test_with_a_slow_link(network: Network, large_checkpoint: Path, uncut_large: Uncut) -> None:
    laptop, *near = (network.add(name) for name in ("laptop", "desk-pc", "sofa-laptop"))
    far = network.add("attic-nas", rate="5mbit")
    fields: dict[Host, dict[str, object]] = {host: {"memory": "45MiB"} for host in (*near, far)}
    compare(
        laptop, fields, large_checkpoint, uncut_large, [token % 1000 + 3 for token in range(7, 7 + 17 * 256, 17)], 4
    )


def compare(
    laptop: Host,
    fields: dict[Host, dict[str, object]],
    checkpoint: Path,
    uncut: Uncut,
    prompt: list[int],
    num_new: int,
) -> None:
    """Measure both plans on the devices of daemons with these fields, and compare what was gained with what was predicted."""
    daemons = {host: Daemon(host, clients=[own_key(laptop)]) for host in fields}
    caller = Caller(laptop)
    for daemon in daemons.values():
        daemon.wait()
    devices = ", ".join(daemon.device(**fields[host]) for host, daemon in daemons.items())
    found = caller.run(COMPARE.format(devices=devices), path=str(checkpoint), prompt=prompt, num_new=num_new)
    for name, figures in found.items():
        log.info(f"{name}: {figures['spans']}: {figures['predicted']:.3f} s predicted, {figures['seconds']:.3f} s seen")
        assert figures.pop("tokens") == uncut.tokens(num_new, prompt)
    predicted, seen = (found["even"][what] / found["measured"][what] for what in ("predicted", "seconds"))
    log.info(f"the measured plan is {seen:.2f} times as fast as the even one; {predicted:.2f} was predicted")
    assert predicted > 1.2
    assert abs(seen / predicted - 1) < WITHIN
