"""What the marker of the pytest plugin may say, and how those of a test, its class and its module add up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lingualinked as ll
from lingualinked.testing.setup import Setup, setups_of

NEAR, FAR = ll.Device(name="near"), ll.Device(name="far")


def mark(*args: object, **kwargs: object) -> Any:
    return SimpleNamespace(args=args, kwargs=kwargs)


def read(*marks: Any) -> list[Setup]:
    """Read markers, the nearest first, as pytest lists them."""
    item: Any = SimpleNamespace(nodeid="test_it", iter_markers=lambda name: marks)
    return setups_of(item)


@pytest.mark.parametrize(
    ("devices", "expected", "labels"),
    [
        (3, [3], ["devices=3"]),
        ([1, 2, 4], [1, 2, 4], ["devices=1", "devices=2", "devices=4"]),
        ([NEAR, FAR], [(NEAR, FAR)], ["devices=near+far"]),
        ([1, [NEAR, FAR], (FAR,)], [1, (NEAR, FAR), (FAR,)], ["devices=1", "devices=near+far", "devices=far"]),
    ],
)
def test_devices(devices: object, expected: list[object], labels: list[str]) -> None:
    setups = read(mark(devices=devices))
    assert [each.devices for each in setups] == expected
    assert [each.label for each in setups] == labels
    assert {each.scope for each in setups} == {"function"}


def test_nearer_markers_add_to_others() -> None:
    setups = read(
        mark(dtype="float32", devices=1),
        mark(devices=2, scope="module", model="path", timeout_s=3),
    )
    arguments = {"model": "path", "dtype": "float32"}
    assert setups == [Setup(devices=1, cluster_arguments={"timeout_s": 3}, model_arguments=arguments, scope="module")]


def test_without_a_marker() -> None:
    assert read() == [Setup()]


@pytest.mark.parametrize("devices", [0, -1, True, None, [], [[]], [NEAR, 2], [0], 1.5])
def test_what_are_no_devices(devices: object) -> None:
    with pytest.raises(pytest.UsageError, match=r"test_it: devices=.* of @pytest\.mark\.lingualinked: give a positive"):
        read(mark(devices=devices))


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (mark(3), "arguments without names"),
        (mark(scope="test"), "scope='test'"),
        (mark(cluster=None), "describe the cluster by devices="),
    ],
)
def test_what_else_is_refused(wrong: Any, complaint: str) -> None:
    with pytest.raises(pytest.UsageError, match=complaint):
        read(wrong)


def test_a_cluster_file_is_read_before_any_test_runs(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text("[[devices]]\nname = 'near'\n")
    setups = read(mark(devices=[str(path), 2, path]))
    assert [each.devices for each in setups] == [str(path), 2, path]
    assert [each.label for each in setups] == [f"devices={path}", "devices=2", f"devices={path}"]
    assert [each.devices for each in read(mark(devices=str(path)))] == [str(path)]
    path.write_text("[[devices]]\nnam = 'near'\n")
    with pytest.raises(pytest.UsageError, match=r"test_it: .*unknown field 'nam': did you mean 'name'"):
        read(mark(devices=path))
