"""A text draws architectures; each is drawn by some, and tests of a few architectures are never left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from drawn_families import NUM_DRAWN, NUM_OF_KIND, OTHER_KINDS, USUAL, drawn, drawn_of_kind, not_drawn
from families import FAMILIES


def item(test: str, **params: Any) -> Any:
    class Item(SimpleNamespace):
        __hash__ = object.__hash__

    return Item(nodeid=f"{test}[{params}]", callspec=SimpleNamespace(params=params))


def test_every_architecture_is_drawn_by_some_text() -> None:
    draws = [drawn(str(number)) for number in range(60)]
    assert frozenset().union(*draws) == FAMILIES.keys()
    assert all(each > USUAL and len(each) == len(USUAL) + NUM_DRAWN for each in draws)
    assert drawn("a commit") == drawn("a commit") != drawn("another")


def test_a_test_of_all_architectures_goes_through_those_that_are_drawn() -> None:
    of_all = [item("all", case=(family, "dtype")) for family in FAMILIES]
    of_few = [item("few", family=family) for family in ("llama", "stablelm", "phi3")]
    without = [item("none", number=1), SimpleNamespace(nodeid="plain")]
    left_out = not_drawn([*of_all, *of_few, *without], "a commit")  # type: ignore[list-item]
    assert {each.callspec.params["case"][0] for each in left_out} == FAMILIES.keys() - drawn("a commit")


def test_a_test_of_all_models_of_another_kind_goes_through_a_few() -> None:
    for kind in OTHER_KINDS:
        of_all = [item("all", case=name) for name in kind]
        left_out = not_drawn(of_all, "a commit")  # type: ignore[arg-type]
        assert {each.callspec.params["case"] for each in left_out} == set(kind) - drawn_of_kind("a commit", kind)
        assert len(of_all) - len(left_out) == NUM_OF_KIND
        assert frozenset().union(*(drawn_of_kind(str(number), kind) for number in range(60))) == set(kind)
