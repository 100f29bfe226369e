"""Which links are measured at the same time: none that share a party, or the network of a machine."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, strategies as st

from lingualinked.cluster.measuring.link_probing import all_pairs, rounds


@given(st.integers(2, 9))
def test_every_pair_occurs_once(num_parties: int) -> None:
    names = [f"p{index}" for index in range(num_parties)]
    assert {frozenset(pair) for pair in all_pairs(names)} == {frozenset(p) for p in itertools.combinations(names, 2)}
    assert len(all_pairs(names)) == num_parties * (num_parties - 1) // 2


@given(st.integers(2, 9), st.integers(1, 4))
def test_no_place_is_in_two_pairs_of_a_round(num_parties: int, num_places: int) -> None:
    places = {f"p{index}": str(index % num_places) for index in range(num_parties)}
    pairs = [pair for pair in all_pairs(list(places)) if places[pair[0]] != places[pair[1]]]
    found = list(rounds(pairs, places))
    assert sorted(pair for pairs in found for pair in pairs) == sorted(pairs)
    for disjoint in found:
        seats = [places[name] for pair in disjoint for name in pair]
        assert len(seats) == len(set(seats))


@pytest.mark.parametrize(("num_parties", "num_rounds"), [(4, 3), (5, 5), (8, 7)])
def test_parties_with_places_of_their_own_need_no_more_rounds_than_a_tournament(
    num_parties: int, num_rounds: int
) -> None:
    places = {f"p{index}": f"p{index}" for index in range(num_parties)}
    assert len(list(rounds(all_pairs(list(places)), places))) == num_rounds
