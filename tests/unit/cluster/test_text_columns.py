"""Padding is left out by the mask, whichever side it is on; what does not fit texts with padding is refused."""

from __future__ import annotations

import pytest
import torch

from lingualinked.cluster.sessions.text_columns import TextColumns
from lingualinked.errors import UnsupportedOperationError

LEFT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
POSITIONS = torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]])


def added(columns: TextColumns, *args: object) -> list[tuple[list[int], int, list[int], list[int]]]:
    texts = columns.add(*args)  # type: ignore[arg-type]
    return [(each.columns.tolist(), each.num_logits, each.kept.tolist(), each.places.tolist()) for each in texts]


def test_padding_on_the_left_is_left_out() -> None:
    columns = TextColumns(2)
    assert added(columns, 4, LEFT, POSITIONS, 1) == [([2, 3], 1, [0], [0]), ([0, 1, 2, 3], 1, [0], [0])]
    mask = torch.cat([LEFT, torch.ones(2, 1)], 1)
    assert added(columns, 1, mask, torch.tensor([[2], [4]]), 1) == [([0], 1, [0], [0]), ([0], 1, [0], [0])]
    columns.reorder(torch.tensor([1, 0, 0]))
    assert columns.crop(4) == [4, 3, 3]
    assert columns.num_columns == 1


def test_padding_on_the_right_is_left_out() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert added(TextColumns(2), 3, mask, None, 0) == [
        ([0, 1], 2, [0, 1], [0, 1]),
        ([0, 1, 2], 3, [0, 1, 2], [0, 1, 2]),
    ]
    chosen = torch.tensor([2, 0])
    assert added(TextColumns(2), 3, mask, None, chosen) == [([0, 1], 2, [0], [1]), ([0, 1, 2], 3, [2, 0], [0, 1])]


def test_a_row_may_have_nothing_but_padding_in_a_step() -> None:
    columns = TextColumns(2)
    assert added(columns, 2, LEFT[:, :2], POSITIONS[:, :2], 1)[0] == ([], 0, [], [])
    assert added(columns, 2, LEFT, POSITIONS[:, 2:], 1)[0] == ([0, 1], 1, [0], [0])


@pytest.mark.parametrize(
    ("mask", "positions", "keep", "said"),
    [
        (LEFT, None, 0, "position_ids=None counts padding"),
        (None, POSITIONS, 0, "position_ids do not count"),
        (LEFT[:, None, None], POSITIONS, 0, "4 dimensions"),
        (LEFT.flip(1), None, 1, "row 0 ends with padding"),
        (LEFT, POSITIONS, torch.ones(2, 4, dtype=torch.bool), "logits_to_keep of 2 dimensions"),
    ],
)
def test_what_does_not_fit_is_refused(
    mask: torch.Tensor | None, positions: torch.Tensor | None, keep: int | torch.Tensor, said: str
) -> None:
    columns = TextColumns(2)
    with pytest.raises(UnsupportedOperationError, match=said):
        columns.add(4, mask, positions, keep)
    assert columns.num_columns == 0


@pytest.mark.parametrize(
    ("mask", "said"), [(None, "does not attend to padding"), (torch.ones(2, 5), "hides other tokens")]
)
def test_padding_stays_padding(mask: torch.Tensor | None, said: str) -> None:
    columns = TextColumns(2)
    columns.add(4, LEFT, POSITIONS, 1)
    with pytest.raises(UnsupportedOperationError, match=said):
        columns.add(1, mask, torch.tensor([[2], [4]]), 1)
