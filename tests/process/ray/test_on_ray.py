"""A cluster on the nodes of a Ray cluster: where its workers are, what they answer, and that nothing is left of them."""

from __future__ import annotations

import importlib.util
import re
import signal
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from process.ray.conftest import Nodes

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None,
        reason="Ray is not installed: `make test-ray` installs it beside the environment",
    ),
]

PAGE = Path(__file__).parents[3] / "docs" / "howto" / "ray.md"

LOADED = """
import ray
import torch
from transformers import AutoModelForCausalLM

import lingualinked as ll

torch.set_num_threads(1)
ids = torch.tensor([[1, 17, 93, 54, 8]])
expected = AutoModelForCausalLM.from_pretrained(ll.sample_model()).generate(ids, max_new_tokens=8, do_sample=False)

def generates(cluster):
    with ll.ShardedModel.from_pretrained(ll.sample_model(), cluster=cluster, plan="even", progress=False) as model:
        return len(model.plan.stages) > 1 and torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)

def hosts(cluster):
    return sorted(device.address.split(":")[1].strip("/") for device in cluster.devices)
"""


def test_workers_on_both_nodes_give_the_tokens_of_the_uncut_model(nodes: Nodes) -> None:
    code = """
    with ll.Cluster.on_ray(2, resources={"CPU": 1, "memory": "2GiB"}) as cluster:
        say(hosts(cluster))
        say([(device.name[-2:], device.threads, device.memory_bytes) for device in cluster.devices])
        say(generates(cluster))
        say(len(cluster.pids))
        say(ray.available_resources()["CPU"])
    """
    with nodes.run(LOADED + textwrap.dedent(code)) as program:
        assert program.hear() == ["127.0.0.2", "127.0.0.3"]
        assert program.hear() == [["-0", 1, 2 << 30], ["-1", 1, 2 << 30]]
        assert program.hear() is True
        assert program.hear() == 2
        assert program.hear() == 2  # of four: the others are lent
        assert program.wait() == 0
    nodes.wait_until_free()


def test_nothing_is_left_when_the_driver_is_killed(nodes: Nodes) -> None:
    code = """
    cluster = ll.Cluster.on_ray(2)
    say(generates(cluster))
    import signal; signal.pause()
    """
    with nodes.run(LOADED + textwrap.dedent(code)) as program:
        assert program.hear() is True
        assert len(nodes.processes("lingualinked.worker")) == 2
        program.process.kill()
        assert program.wait() == -signal.SIGKILL
        nodes.wait_until_free()


def test_ray_frees_the_devices_when_the_driver_leaves_it(nodes: Nodes) -> None:
    code = """
    cluster = ll.Cluster.on_ray(2)
    cluster.wait()
    ray.shutdown()
    try:
        generates(cluster)
    except ll.WorkerDiedError as error:
        say(str(error))
    cluster.close()
    say(ray.is_initialized())
    """
    with nodes.run(LOADED + textwrap.dedent(code)) as program:
        assert "the worker on device" in program.hear()
        assert program.hear() is False  # and closing the cluster does not start Ray again
        assert program.wait() == 0
    nodes.wait_until_free()


@pytest.mark.parametrize("num_above", [0, 2, 3], ids=["worker", "daemon", "actor"])
def test_what_has_died_is_started_again_and_can_be_added(nodes: Nodes, num_above: int) -> None:
    code = """
    cluster = ll.Cluster.on_ray(2)
    first, second = (device.name for device in cluster.devices)
    with ll.ShardedModel.from_pretrained(ll.sample_model(), cluster=cluster, plan="even", progress=False) as model:
        say(cluster.pids[second])
        try:
            while True:
                model.generate(ids, max_new_tokens=8)
        except ll.WorkerDiedError as error:
            say(error.device == second)
    device = cluster.ray.restart(second)
    cluster.add(device)
    say(device.name == second + ".2")
    plan = ll.Plan.from_spans([(first, 0, 4), (device.name, 4, 8)])
    with ll.ShardedModel.from_pretrained(ll.sample_model(), cluster=cluster, plan=plan, progress=False) as model:
        say(torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected))
    cluster.close()
    """
    with nodes.run(LOADED + textwrap.dedent(code)) as program:
        worker = psutil.Process(program.hear())
        [worker, *worker.parents()][num_above].kill()
        assert program.hear() is True
        assert program.hear() is True
        assert program.hear() is True
        assert program.wait() == 0
    nodes.wait_until_free()


def test_the_page_runs(nodes: Nodes) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    with nodes.run(
        code.replace("print(cluster.devices)", "say([device.name for device in cluster.devices])")
    ) as program:
        assert [name[-2:] for name in program.hear()] == ["-0", "-1"]
        assert program.wait() == 0
    nodes.wait_until_free()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ('2, resources={"CPU": 3}', "Ray can't place 2 devices with .*CPU.*3.* each .*: its nodes have .*127.0.0.3"),
        ('2, resources={"fast_disk": 1}', "Ray can't place 2 devices with .*fast_disk"),
        ('1, resources={"GPU": 1}', "Ray can't place 1 device with .*GPU"),
    ],
)
def test_what_ray_can_not_place_is_named_and_leaves_nothing(nodes: Nodes, arguments: str, message: str) -> None:
    code = f"""
    import lingualinked as ll
    try:
        ll.Cluster.on_ray({arguments})
    except ll.ResourceError as error:
        say(str(error))
    import ray
    say(ray.available_resources()["CPU"])
    """
    with nodes.run(code) as program:
        assert re.search(message, program.hear())
        assert program.hear() == 4
        assert program.wait() == 0
    nodes.wait_until_free()
