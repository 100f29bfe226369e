"""Encoded masks and positions decode to the originals, at every party that has seen the same steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from lingualinked.model.context import ContextCode, MaskMode, PositionMode, StepContext


def positions_of(mask: torch.Tensor, num_new: int) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)[:, -num_new:]


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[torch.Tensor | None, torch.Tensor | None, int, list[int], int]]:
    """Steps: mask, positions, new tokens, rows kept before it, tokens cropped before it."""
    rows = draw(st.integers(1, 3))
    padding = torch.tensor(draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows)))
    num_tokens, steps = 0, []
    last = None
    for number in range(draw(st.integers(1, 5))):
        kept = (
            draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4)) if number and draw(st.booleans()) else []
        )
        if kept:
            padding, rows = padding[kept], len(kept)
            last = last if last is None or last.shape[-2] == 1 else last[..., kept, :]
        cropped = draw(st.integers(0, num_tokens - 1)) if num_tokens > 3 else 0
        num_new = draw(st.integers(1, 4)) if number else draw(st.integers(3, 5))
        num_tokens += num_new - cropped
        mask = (torch.arange(num_tokens) >= padding[:, None]).long()
        position_kind = draw(st.sampled_from(["none", "mask", "range", "own", "three", "next"]))
        positions = {
            "none": None,
            "mask": positions_of(mask, num_new),
            "range": torch.arange(num_tokens - num_new, num_tokens)[None],
            "own": torch.randint(0, 50, (rows, num_new)),
            "three": torch.randint(0, 50, (3, rows, num_new)),
            "next": torch.arange(1, num_new + 1) + last if last is not None else None,
        }[position_kind]
        last = None if positions is None else positions[..., -1:]
        steps.append((mask if draw(st.booleans()) else None, positions, num_new, kept, cropped))
    return steps


@given(conversations())
def test_what_goes_in_comes_out(
    steps: list[tuple[torch.Tensor | None, torch.Tensor | None, int, list[int], int]],
) -> None:
    sender, receiver = StepContext(), StepContext()
    for mask, positions, num_new, kept, cropped in steps:
        for end in (sender, receiver):
            if kept:
                end.reorder(torch.tensor(kept))
            if cropped:
                end.crop(cropped)
        code = sender.encode(mask, positions, num_new)
        got_mask, got_positions = receiver.decode(code, num_new)
        for got, given_ in ((got_mask, mask), (got_positions, positions)):
            assert (got is None) == (given_ is None)
            assert given_ is None or torch.equal(got, given_)


def test_a_decode_step_tells_neither_mask_nor_positions() -> None:
    context = StepContext()
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    first = context.encode(mask, positions_of(mask, 4), 4)
    assert first.mask is MaskMode.FULL
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=-1)
    second = context.encode(mask, positions_of(mask, 1), 1)
    assert (second.mask, second.positions, second.tensors) == (MaskMode.EXTEND, PositionMode.FROM_MASK, ())


def test_positions_of_pictures_are_sent_once() -> None:
    sender, receiver = StepContext(), StepContext()
    positions = torch.tensor([[[0, 1, 2]], [[0, 1, 1]], [[0, 1, 2]]]).expand(3, 2, 3)
    modes = []
    for step in range(4):
        if step == 2:
            for end in (sender, receiver):
                end.reorder(torch.tensor([1, 1]))
        code = sender.encode(None, positions, positions.shape[-1])
        assert torch.equal(receiver.decode(code, positions.shape[-1])[1], positions)
        modes.append((code.positions, len(code.tensors)))
        positions = positions[..., -1:] + 1
    assert modes == [(PositionMode.FULL, 1), *[(PositionMode.NEXT, 0)] * 3]
    for end in (sender, receiver):
        end.extend(3, PositionMode.NEXT)
    assert sender.encode(None, positions + 3, 1).positions is PositionMode.NEXT


@pytest.mark.parametrize(
    "code",
    [
        ContextCode(mask=MaskMode.EXTEND, positions=PositionMode.NONE, position_rows=0, tensors=()),
        ContextCode(mask=MaskMode.FULL, positions=PositionMode.NONE, position_rows=0, tensors=()),
        ContextCode(mask=MaskMode.NONE, positions=PositionMode.FROM_MASK, position_rows=1, tensors=()),
        ContextCode(mask=MaskMode.NONE, positions=PositionMode.NONE, position_rows=0, tensors=(torch.ones(1),)),
        ContextCode(mask=MaskMode.NONE, positions=PositionMode.NEXT, position_rows=1, tensors=()),
        ContextCode(mask=MaskMode.NONE, positions=PositionMode.FULL, position_rows=1, tensors=(torch.ones(1),)),
    ],
)
def test_what_can_not_be_told_is_refused(code: ContextCode) -> None:
    with pytest.raises(ValueError, match="step"):
        StepContext().decode(code, 1)


def test_masks_that_are_no_padding_masks_travel_whole() -> None:
    context = StepContext()
    four_dimensional = torch.zeros(1, 1, 3, 3)
    for _ in range(2):
        code = context.encode(four_dimensional, None, 3)
        assert code.mask is MaskMode.FULL
