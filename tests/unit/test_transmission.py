"""A transmission map says what crosses boundaries beside hidden states, and which boundaries a model forbids."""

from __future__ import annotations

from typing import Any

import pytest

import lingualinked as ll
from lingualinked.transmission import Shortcut, Transmission

EMBEDDING = Shortcut(name="model.embed_tokens", made_at=0, used_at=(2, 5), token_bytes=64, part_bytes=9000)
SKIP = Shortcut(name="layer 3", made_at=3, used_at=(5, 8), token_bytes=64)


def test_a_shortcut_is_sent_to_stages_that_use_it_and_do_not_make_it() -> None:
    assert not EMBEDDING.is_ids
    assert EMBEDDING.shows_text
    assert Shortcut(name="input_ids", made_at=0, used_at=(4,), token_bytes=8).is_ids
    assert SKIP.is_of_layer
    assert not EMBEDDING.is_of_layer
    assert [EMBEDDING.is_sent_to(*span, 8) for span in [(0, 3), (3, 5), (5, 8), (1, 3)]] == [False, False, True, True]
    # layer 3 lies in the stage that makes it; 8 stands for what runs after the last layer
    assert [SKIP.is_sent_to(*span, 8) for span in [(0, 8), (3, 6), (4, 6), (6, 7), (6, 8)]] == [
        False,
        False,
        True,
        False,
        True,
    ]


def test_a_plain_model_has_an_empty_map() -> None:
    assert Transmission() == Transmission(shortcuts=(), items=(), forbidden_cuts=(), held=())
    Transmission().check_layers(4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "a shortcut needs a name"),
        ({"used_at": ()}, r"used at \(\)"),
        ({"used_at": (5, 2)}, "in order"),
        ({"made_at": 3}, "none before it is made"),
        ({"made_at": -1}, "made at layer -1"),
        ({"token_bytes": -1}, "token_bytes=-1 of shortcut 'model.embed_tokens'"),
        ({"part_bytes": 2**60}, "part_bytes"),
    ],
)
def test_a_shortcut_that_can_not_be_is_refused(fields: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"name": "model.embed_tokens", "made_at": 0, "used_at": (2, 5), "token_bytes": 64}
    with pytest.raises(ll.ArgumentError, match=message):
        Shortcut(**given | fields)


def test_a_map_that_can_not_be_is_refused() -> None:
    with pytest.raises(ll.ArgumentError, match="different names"):
        Transmission(shortcuts=(SKIP, SKIP))
    for cuts in ((0,), (3, 2), (2, 2)):
        with pytest.raises(ll.ArgumentError, match="forbidden_cuts"):
            Transmission(forbidden_cuts=cuts)
    for given, message in (
        (Transmission(items=(None,) * 3), "items of a transmission map are of 3 layers, the model has 8"),
        (Transmission(forbidden_cuts=(8,)), "forbidden cut 8"),
        (Transmission(shortcuts=(Shortcut(name="layer 8", made_at=8, used_at=(9,), token_bytes=1),)), "'layer 8'"),
    ):
        with pytest.raises(ll.ArgumentError, match=message):
            given.check_layers(8)
