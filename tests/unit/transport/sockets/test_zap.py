from __future__ import annotations

from collections import Counter

import pytest

from lingualinked.transport.sockets.zap import _answer_request
from lingualinked.transport.wire.refusals import Refusals

KEY = bytes(range(32))
GOOD = [b"1.0", b"7", b"lingualinked", b"127.0.0.1", b"", b"CURVE", KEY]


def test_a_known_key_is_let_in_under_its_user_id() -> None:
    refusals = Refusals("me")
    assert _answer_request(GOOD, {KEY: "user"}, Counter(), True, refusals) == [b"1.0", b"7", b"200", b"", b"user", b""]
    assert refusals.num == 0


@pytest.mark.parametrize(
    "request_",
    [
        [*GOOD[:-1], KEY[::-1]],
        [*GOOD[:5], b"NULL"],
        [*GOOD[:5], b"PLAIN", b"user", b"password"],
        [*GOOD[:5], b"NULL", KEY],
        [b"2.0", *GOOD[1:]],
        [*GOOD[:2], b"global", *GOOD[3:]],
        [*GOOD, KEY],
        GOOD[:2],
        [],
    ],
)
def test_everything_else_is_refused(request_: list[bytes]) -> None:
    refusals = Refusals("me")
    version, request_id, status, *_, user_id, _ = _answer_request(request_, {KEY: "user"}, Counter(), True, refusals)
    assert (version, request_id, status, user_id) == (b"1.0", b"7" if request_ else b"", b"400", b"")
    assert refusals.num == 1


def test_a_key_with_many_connections_is_let_in_while_there_is_room() -> None:
    known, num_let_in, refusals = {KEY: "user", KEY[::-1]: "other"}, Counter[str](), Refusals("me")
    statuses = [_answer_request(GOOD, known, num_let_in, False, refusals)[2] for _ in range(10)]
    assert statuses == [b"200"] * 8 + [b"400"] * 2
    assert refusals.num == 2
    assert _answer_request([*GOOD[:-1], KEY[::-1]], known, num_let_in, False, refusals)[2] == b"200"
    assert _answer_request(GOOD, known, num_let_in, True, refusals)[2] == b"200"
