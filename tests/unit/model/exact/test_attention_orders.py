"""Attention in any order but torch's is refused, and so is one that rounds, scales or masks otherwise.

All orders with all dtypes, masks and numbers of queries take minutes: a few are drawn, unless ``LINGUALINKED_PROOF=all``.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from attention_orders import Order, attend
from lingualinked.kernels import attention
from lingualinked.model.exact import exact_attention
from lingualinked.model.exact.exact_attention import is_exact


class Case(NamedTuple):
    """What torch's order depends on."""

    dtype: torch.dtype
    dim: int
    group: int
    num_new: int
    is_masked: bool

    @property
    def together(self) -> int:
        """How many queries torch multiplies at once."""
        return self.group if self.is_masked and self.num_new == 1 else self.num_new


def torchs_order(dtype: torch.dtype, together: int) -> Order:
    if together >= 4:
        return Order(
            lanes=1, rest_lanes=8, chunk=192, score_chunk=192, values="one by one", is_kept=False, is_fused=True
        )
    if together > 1 or dtype is torch.float16:
        return Order(rest_lanes=8, values="one by one", apart="aligned")
    return Order()


# What depends on how many queries are multiplied at once: sums of exponentials are probed with one.
OF_PRODUCTS = {
    "lanes", "few_lanes", "rest_lanes", "score_added", "four_added", "backwards", "chunk", "score_chunk", "values",
    "rest_values", "is_kept", "is_fused", "apart",
}  # fmt: skip

TRIES_ALL = os.environ.get("LINGUALINKED_PROOF") == "all"
BF16, F16 = torch.bfloat16, torch.float16
ALONE = (
    Case(BF16, 64, 1, 1, False),
    Case(BF16, 128, 2, 1, False),
    Case(BF16, 64, 1, 1, True),
    Case(BF16, 256, 1, 1, True),
)
FEW = (Case(F16, 64, 2, 1, False), Case(F16, 64, 1, 1, True), Case(BF16, 64, 2, 1, True), Case(BF16, 128, 2, 3, True))
MANY = (Case(BF16, 64, 4, 1, True), Case(BF16, 208, 1, 5, True), Case(F16, 64, 1, 8, True))
ALL = ALONE + FEW + MANY
MASKED = tuple(case for case in ALL if case.is_masked)

WRONG: dict[str, tuple[dict[str, object], tuple[Case, ...]]] = {
    # what differs from torch's order, and where
    **{f"blocks of {block} tokens": ({"block": block}, ALL) for block in (128, 256, 384, 480, 508, 528, 1024, 2048)},
    **{f"{lanes} lanes": ({"lanes": lanes}, ALONE + FEW) for lanes in (1, 2, 8, 16)},
    **{f"{lanes} lanes instead of one": ({"lanes": lanes}, MANY) for lanes in (2, 4, 8, 16)},
    **{f"{lanes} lanes of fewer than 12 tokens": ({"few_lanes": lanes}, FEW + MANY) for lanes in (1, 2, 8, 16)},
    **{f"{lanes} lanes of left over tokens": ({"rest_lanes": lanes}, FEW + MANY) for lanes in (1, 2, 4, 16)},
    "8 lanes of left over tokens": ({"rest_lanes": 8}, ALONE),
    **{f"lanes added {how}": ({"score_added": how}, ALONE + FEW) for how in ("neighbours", "in order", "backwards")},
    **{f"four tokens added {how}": ({"four_added": how}, ALONE) for how in ("neighbours", "in order", "backwards")},
    **{f"vectors added {how}": ({"vector_added": how}, ALL) for how in ("neighbours", "in order", "backwards")},
    "dimensions backwards": ({"backwards": True}, ALL),
    **{f"chunks of {chunk} tokens": ({"chunk": chunk}, MANY) for chunk in (0, 64, 96, 128, 190, 194, 256, 384)},
    **{f"chunks of {chunk} dimensions": ({"score_chunk": chunk}, MANY[1:2]) for chunk in (0, 32, 64, 96)},
    "scaled query": ({"scaled": "query"}, ALL),
    "scaled differences": ({"scaled": "differences"}, tuple(case for case in ALL if not case.is_masked)),
    **{f"mask added {how}": ({"mask_added": how}, MASKED) for how in ("rounded", "before")},
    "a mask of the lowest number": ({"lowest": torch.finfo(BF16).min}, MASKED),
    "highest of all": ({"highest": "of all"}, ALL),
    "exact exponentials": ({"exponential": "exact"}, ALL),
    **{f"{how} exponentials of the rest": ({"rest_exponential": how}, ALL) for how in ("approximate", "expf")},
    **{f"{sums} sums of exponentials": ({"sums": sums}, ALL) for sums in (1, 4)},
    **{f"rest of exponentials {when}": ({"rest_sum": when}, ALL) for when in ("first", "apart")},
    **{f"weights {how}": ({"weights": how}, ALL) for how in ("kept", "truncated", "rounded first")},
    **{f"shrinking {how}": ({"shrink": how}, ALL) for how in ("rounded", "approximate", "never")},
    "values one by one": ({"values": "one by one"}, ALONE),
    "values in fours": ({"values": "fours", "is_fused": False}, FEW + MANY),
    "left over values in order": ({"rest_values": "in order"}, ALONE),
    "blocks by themselves": ({"is_kept": False}, ALONE + FEW),
    "fused products": ({"is_fused": True}, FEW[2:]),
    "rounded products": ({"is_fused": False}, MANY[1:2]),
    "blocks not by themselves": ({"is_kept": True}, MANY),
    **{f"second four apart {where}": ({"apart": where}, FEW) for where in ("never", "always", "first four")},
    "quotients": ({"division": "quotient"}, ALL),
    **{f"{rounding} results": ({"rounding": rounding}, ALL) for rounding in ("truncated", "away")},
}


@pytest.fixture(autouse=True)
def on_one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    forget()
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def needs_kernel() -> None:
    if not all(is_exact(*case, torch.get_num_threads()) for case in (ALONE[0], FEW[2], MANY[0])):
        pytest.skip("torch attends otherwise here")


def forget() -> None:
    is_exact.cache_clear()
    exact_attention._are_sums_exact.cache_clear()


def inject(changes: dict[str, object], case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend_otherwise(
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        mask: Tensor | None = None,
        together: int = 1,
        logsums: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        assert not is_causal
        num_rows, num_heads, num_new, dim = query.shape
        shape = (num_rows, num_heads * num_new // together, together)
        keys, values = (each.repeat_interleave(shape[1] // each.shape[1], dim=1) for each in (keys, values))
        mask = None if mask is None else mask.expand(num_rows, num_heads, num_new, -1).reshape(*shape, -1)
        order = torchs_order(query.dtype, together)
        if together == case.together or not OF_PRODUCTS & set(changes):
            order = replace(order, **changes)
        result, sums = attend(query.reshape(*shape, dim), keys, values, scale, mask, order)
        if logsums is not None:
            logsums.copy_(sums.reshape(logsums.shape))
        return result.reshape(query.shape).transpose(1, 2).contiguous()

    monkeypatch.setattr(attention, "attend", attend_otherwise)


def is_accepted(case: Case) -> bool:
    forget()
    return is_exact(*case, 1)


@pytest.mark.parametrize("cases", ALL if TRIES_ALL else (ALONE, FEW, MANY), ids=str)
def test_torchs_order_is_accepted(cases: Case | tuple[Case, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases if isinstance(cases, Case) else random.choice(cases)
    inject({}, case, monkeypatch)
    assert is_accepted(case), case


@pytest.mark.parametrize("name", WRONG if TRIES_ALL else [""] * 20)
def test_any_other_order_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = name or random.choice(list(WRONG))
    changes, cases = WRONG[name]
    for case in cases if TRIES_ALL else [random.choice(cases)]:
        inject(changes, case, monkeypatch)
        assert not is_accepted(case), (name, case)
