"""Stages give one model's bits where nothing that shifts them differs; the reason names what does, and where."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

import lingualinked as ll
from lingualinked.device import CALLER
from lingualinked.environment import Environment, describe_difference, inexact_because, rounding_key
from lingualinked.rounding import Rounding, describe_difference as describe_rounding
from lingualinked.versions import Versions

HERE = Environment(
    host="here",
    host_id="0",
    machine="0",
    versions=Versions(lingualinked="0.1.0", torch="2.13.0+cpu", transformers="5.23.0", python="3.12.3"),
    processor="EPYC",
    cpu_capability="AVX2",
    accelerator="",
    threads=2,
)
GPU = msgspec.structs.replace(
    HERE, versions=HERE.versions._replace(torch="2.13.0+cu130"), accelerator="H100", threads=8
)


def other(
    torch: str = HERE.versions.torch, transformers: str = HERE.versions.transformers, **changed: object
) -> Environment:
    versions = HERE.versions._replace(torch=torch, transformers=transformers)
    return msgspec.structs.replace(HERE, host="there", machine="1", versions=versions, **changed)


def test_equal_environments_are_exact_whatever_their_hosts_and_processors_are_called() -> None:
    assert describe_difference({CALLER: HERE, "a": HERE, "b": other(processor="another")}) == ""


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"torch": "2.12.0+cpu"}, "versions of torch differ (2.12.0+cpu on 'b', 2.13.0+cpu on 'a')"),
        ({"torch": "2.13.0+cu130"}, "versions of torch differ (2.13.0+cpu on 'a', 2.13.0+cu130 on 'b')"),
        ({"transformers": "5.22.0"}, "versions of transformers differ (5.22.0 on 'b', 5.23.0 on 'a' and 'caller')"),
        ({"cpu_capability": "AVX512"}, "mixed instruction sets (AVX2 on 'a', AVX512 on 'b')"),
        ({"threads": 4}, "mixed thread counts (2, 4)"),
        ({"accelerator": "H100"}, "mixed accelerators (H100 on 'b', cpu on 'a')"),
    ],
)
def test_what_shifts_bits_between_stages_is_named(changed: dict[str, Any], reason: str) -> None:
    assert reason in describe_difference({"a": HERE, "b": other(**changed), CALLER: HERE})


def test_gpus_of_another_name_differ_and_their_machines_threads_do_not_count() -> None:
    assert describe_difference({"a": GPU, "b": msgspec.structs.replace(GPU, threads=16, cpu_capability="AVX512")}) == ""
    assert "A100 on 'b'" in describe_difference({"a": GPU, "b": msgspec.structs.replace(GPU, accelerator="A100")})


def test_the_caller_needs_the_release_of_torch_but_neither_its_build_nor_its_processor() -> None:
    assert describe_difference({CALLER: other(cpu_capability="NEON", threads=1), "a": GPU}) == ""
    assert "2.12.0 on 'caller'" in describe_difference({CALLER: other(torch="2.12.0+cpu"), "a": HERE})


def test_devices_without_a_worker_yet_count_by_what_they_state() -> None:
    one, two = ll.Device(name="a", threads=1), ll.Device(name="b", threads=2)
    assert "1, 2" in inexact_because([one, two])
    assert inexact_because([one, two], {"a": HERE, "b": other()}) == "", "the daemon has given both as many"
    assert "torch" in inexact_because([one, two], {"a": HERE, "b": other(torch="2.12.0"), "c": other()})


def test_the_balancer_tells_apart_what_rounds_differently() -> None:
    device = ll.Device(name="a", threads=2)
    assert rounding_key(device, HERE) == rounding_key(device, other())
    assert rounding_key(device, HERE) != rounding_key(device, other(processor="another"))
    assert rounding_key(ll.Device(name="a", accelerator="cuda:0"), GPU) != rounding_key(device, HERE)


def test_processors_that_differ_have_to_show_that_they_round_alike() -> None:
    known, unknown = Rounding("x", 2), Rounding("", 0)
    alike, apart = {"a": "EPYC", "b": "EPYC"}, {"a": "EPYC", "b": "Xeon"}
    assert describe_rounding({"a": known, "b": known}, apart) == ""
    assert describe_rounding({"a": known, "b": unknown}, alike) == ""
    assert "'b' had no memory to find out" in describe_rounding({"a": known, "b": unknown}, apart)
