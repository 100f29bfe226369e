"""What stages say that their layers recorded is believed only if it can be that."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import lingualinked as ll
from conversations import dummy_spec
from families import FAMILIES
from lingualinked.cluster.plans.route import Route
from lingualinked.cluster.steps.recorded import DueRecords, RecordedPart, recorded_sizes

ROUTE = Route(1, ll.Plan.from_spans([("a", 0, 1), ("b", 1, 3)]))
SIZES = dataclasses.replace(recorded_sizes(dummy_spec("mixtral", "bfloat16")), last_width=16)
DUE = DueRecords(
    names=("hidden_states", "attentions", "router_logits"),
    hidden_state_indices=None,
    sizes=SIZES,
    inputs=torch.zeros(2, 5, dtype=torch.long),
    num_kv_tokens=7,
    longest_window=7,
    is_autocast=False,
)


def some(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


STATES, LAST, PROBABILITIES, ROUTES = some(2, 5, 32), some(2, 5, 16), some(2, 4, 5, 7), some(10, 4)
GOOD: tuple[Sequence[Sequence[Tensor]], ...] = (
    ([STATES], [PROBABILITIES], [ROUTES]),
    ([STATES, STATES, LAST], [PROBABILITIES] * 2, [ROUTES]),
)


def part(kinds: Sequence[Sequence[Tensor | None]]) -> RecordedPart:
    layouts = tuple(tuple(item is not None for item in kind) for kind in kinds)
    return RecordedPart(layouts, tuple(item for kind in kinds for item in kind if item is not None))


def join(due: DueRecords, *parts: object) -> dict[str, tuple[Tensor | None, ...]]:
    return due.join(dict(enumerate(parts)), ROUTE)


def test_what_is_due_is_joined_in_order() -> None:
    joined = join(DUE, *map(part, GOOD))
    assert {name: [item.shape for item in items] for name, items in joined.items()} == {
        "hidden_states": [(2, 5, 32)] * 3 + [(2, 5, 16)],
        "attentions": [(2, 4, 5, 7)] * 3,
        "router_logits": [(10, 4)] * 2,  # of three layers, one has no router
    }


def test_what_else_a_model_may_record() -> None:
    without = ([STATES], [], [some(2, 5, 4, dtype=torch.float32)])  # attentions, by an implementation that has none
    assert join(DUE, part(without), part(GOOD[1]))["attentions"] == (PROBABILITIES,) * 2
    windows = dataclasses.replace(DUE, sizes=dataclasses.replace(SIZES, has_windows=True))
    join(windows, part(([STATES], [some(2, 4, 5, 3)], [])), part(GOOD[1]))
    some_states = dataclasses.replace(DUE, hidden_state_indices=(0, 3))
    hidden = join(some_states, part(GOOD[0]), part(([None, None, LAST], *GOOD[1][1:])))["hidden_states"]
    assert hidden == (STATES, None, None, LAST)
    autocast = dataclasses.replace(DUE, is_autocast=True)
    join(autocast, part(([STATES.float()], [PROBABILITIES], [])), part(GOOD[1]))
    embedded = dataclasses.replace(DUE, inputs=torch.zeros(2, 5, 32))
    join(embedded, part(([STATES.float()], [PROBABILITIES], [])), part(GOOD[1]))


BAD: dict[str, object] = {
    "nothing": None,
    "too few kinds": RecordedPart(((True,),), (STATES,)),
    "too many kinds": RecordedPart(((True,), (True,), (True,), ()), (STATES, PROBABILITIES, ROUTES)),
    "too few tensors": RecordedPart(((True,), (True,), (True,)), (STATES, PROBABILITIES)),
    "too many tensors": RecordedPart(((True,), (), ()), (STATES, PROBABILITIES)),
    "no states": part(([], [PROBABILITIES], [])),
    "more states": part(([STATES] * 2, [PROBABILITIES], [])),
    "states left out": part(([None], [PROBABILITIES], [])),
    "more attentions": part(([STATES], [PROBABILITIES] * 2, [])),
    "attentions left out": part(([STATES], [None], [])),
    "more routers": part(([STATES], [], [ROUTES] * 2)),
    "routers left out": part(([STATES], [], [None])),
    **{
        f"states of {tensor.dtype} {list(tensor.shape)}": part(([tensor], [PROBABILITIES], []))
        for tensor in (
            some(1, 5, 32),
            some(2, 4, 32),
            some(2, 5, 31),
            some(2, 5, 16),
            some(2, 160),
            some(),
            some(2, 5, 32, 1),
            STATES.float(),
            STATES.half(),
            STATES.long(),
            STATES.to(torch.complex64),
        )
    },
    **{
        f"attentions of {tensor.dtype} {list(tensor.shape)}": part(([STATES], [tensor], []))
        for tensor in (
            some(1, 4, 5, 7),
            some(2, 2, 5, 7),
            some(2, 4, 4, 7),
            some(2, 4, 5, 6),
            some(2, 4, 5, 8),
            some(2, 4, 5),
            PROBABILITIES.double(),
        )
    },
    **{
        f"routers of {tensor.dtype} {list(tensor.shape)}": part(([STATES], [], [tensor]))
        for tensor in (some(10, 3), some(9, 4), some(5, 2, 4), some(40), some(), ROUTES.bool())
    },
}


@pytest.mark.parametrize("said", BAD.values(), ids=BAD)
def test_anything_else_is_the_fault_of_the_stage(said: object) -> None:
    with pytest.raises(ll.WorkerError, match=r"device 'a' raised ProtocolError: what layers \[0, 1\) rec") as caught:
        join(DUE, said, part(GOOD[1]))
    assert caught.value.device == "a"
    assert isinstance(caught.value.__cause__, ll.ProtocolError)


def test_the_error_says_what_came() -> None:
    words = (
        r"hidden_states of torch.float32 \[2, 5, 9\], which a step of 2 rows and 5 tokens in torch.bfloat16 does not"
    )
    with pytest.raises(ll.WorkerError, match=words) as caught:
        join(DUE, part(GOOD[0]), part(([STATES, some(2, 5, 9, dtype=torch.float32), LAST], [PROBABILITIES] * 2, [])))
    assert caught.value.device == "b"


def test_windows_are_no_longer_than_the_text() -> None:
    windows = dataclasses.replace(DUE, sizes=dataclasses.replace(SIZES, has_windows=True))
    for num_kv in (0, 8):
        with pytest.raises(ll.WorkerError, match="has attentions of"):
            join(windows, part(([STATES], [some(2, 4, 5, num_kv)], [])), part(GOOD[1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_says_its_sizes(family: str) -> None:
    sizes = recorded_sizes(dummy_spec(family, "float16"))
    assert (sizes.dtype, sizes.width, sizes.num_heads) == (torch.float16, 96 if family == "llama-wide" else 32, 4)
    assert sizes.last_width == (16 if family == "opt-350m" else sizes.width)
    assert sizes.num_experts == (4 if family in ("mixtral", "qwen2-moe", "qwen3-moe") else None)
