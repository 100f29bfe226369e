from __future__ import annotations

import dataclasses

import msgspec
import pytest
import zmq

from lingualinked.errors import ArgumentError, ProtocolError
from lingualinked.public_key import raw_key
from lingualinked.transport.keys.keys import KeyPair, authorise, generate_keypair


def test_pairs_are_new_each_time_and_hide_the_secret() -> None:
    one, other = generate_keypair(), generate_keypair()
    assert len({one.public, one.secret, other.public, other.secret}) == 4
    assert one.secret not in repr(one)
    assert one.public in repr(one)
    assert len(raw_key(one.public)) == 32


def test_pairs_travel_as_messages_and_do_not_change() -> None:
    keys = generate_keypair()
    assert msgspec.json.decode(msgspec.json.encode(keys), type=KeyPair) == keys
    with pytest.raises(dataclasses.FrozenInstanceError):
        keys.public = ""  # type: ignore[misc]


@pytest.mark.parametrize(
    "secret",
    ["", "short", "\N{SNOWMAN}" * 40, "~" * 40, generate_keypair().secret],
    ids=["empty", "short", "not ASCII", "not Z85", "another pair's"],
)
def test_halves_that_do_not_fit_are_an_error_that_keeps_the_secret(secret: str) -> None:
    public = generate_keypair().public
    with pytest.raises(ArgumentError, match="does not belong to the public key") as caught:
        KeyPair(public, secret)
    assert not secret or secret not in str(caught.value)


@pytest.mark.parametrize("text", ["", "short", "a" * 35, "a" * 45, "a" * 39 + "\N{SNOWMAN}", "~" * 40, "#" * 40])
def test_what_is_no_public_key_is_an_error(text: str) -> None:
    with pytest.raises(ArgumentError, match="is not a public key"):
        raw_key(text)


def test_without_curve_there_are_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq, "has", lambda _: False)
    with pytest.raises(ProtocolError, match="built without CURVE"):
        generate_keypair()


def test_a_key_is_added_and_takes_its_name_from_another() -> None:
    a, b, c = (generate_keypair().public for _ in range(3))
    authorised = {a: "a"}
    assert authorise(authorised, "b", b) is None
    assert authorise(authorised, "b", b) is None
    assert authorise(authorised, "a", c) == a
    assert authorised == {b: "b", c: "a"}
    with pytest.raises(ArgumentError, match="is authorised as 'b': 'c' needs a key of its own"):
        authorise(authorised, "c", b)
    with pytest.raises(ArgumentError, match="is not a public key"):
        authorise(authorised, "c", "c")
