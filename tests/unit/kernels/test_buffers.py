"""Kernels that read a weight as torch stores it stay in their buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from guarded_memory import GuardedBuffer, guarded_copy
from lingualinked.kernels import bfloat_rows, float_rows, half_rows

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16)


@pytest.fixture(autouse=True)
def one_thread_at_the_end() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def assert_stays_inside(
    multiply: Callable[..., Tensor], operands: tuple[Tensor | None, ...], at_end: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Multiply with buffers between guards, those included that are allocated for the product."""
    guarded = [None if each is None else guarded_copy(each, at_end) for each in operands]
    written: list[GuardedBuffer] = []

    def new_empty(values: Tensor, *shape: int) -> Tensor:
        if not math.prod(shape):
            return torch.empty(shape, dtype=values.dtype)
        written.append(GuardedBuffer(values.itemsize * math.prod(shape), at_end))
        return written[-1].tensor(*shape, dtype=values.dtype)

    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        expected = multiply(*operands)  # as a whole, it is compared with torch's elsewhere
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "new_empty", new_empty)
            patch.setattr(Tensor, "float", lambda values: guarded_copy(values.to(torch.float32), at_end))
            found = multiply(*guarded)
        assert torch.equal(found, expected)
        assert written
        assert all(buffer.is_untouched_around() for buffer in written)


@pytest.mark.skipif(not float_rows.is_available(), reason="this processor does not run the kernel")
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("num_inputs", "num_outputs"), [(4, 256), (60, 1), (196, 63), (256, 65), (388, 130), (1028, 7)]
)
def test_float32(
    num_inputs: int, num_outputs: int, has_bias: bool, at_end: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, bias = torch.randn(num_outputs, num_inputs), torch.randn(num_outputs) if has_bias else None
    for num_rows in ROWS:
        for order in float_rows.known_orders(num_rows):
            operands = (torch.randn(num_rows, num_inputs), weight, bias)
            assert_stays_inside(
                lambda *product, order=order: float_rows.multiply(*product, order), operands, at_end, monkeypatch
            )


@pytest.mark.skipif(not half_rows.is_available(), reason="this processor does not run the kernel")
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(16, 256), (64, 1), (112, 31), (208, 33), (1040, 65)])
def test_float16_and_bfloat16(
    num_inputs: int, num_outputs: int, dtype: torch.dtype, at_end: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(num_outputs, num_inputs).to(dtype)
    for num_rows in ROWS:
        operands = (torch.randn(num_rows, num_inputs).to(dtype), weight, None)
        assert_stays_inside(half_rows.multiply, operands, at_end, monkeypatch)


@pytest.mark.skipif(not bfloat_rows.is_available(), reason="this processor does not run the kernel")
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize(
    ("num_inputs", "num_outputs"), [(2, 256), (32, 1), (34, 16), (96, 17), (400, 31), (388, 33), (1604, 5)]
)
def test_bfloat16(num_inputs: int, num_outputs: int, at_end: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(num_outputs, num_inputs).bfloat16()

    def multiply(rows: Tensor, weight: Tensor) -> Tensor:
        return bfloat_rows.multiply(rows, weight.data_ptr(), None, num_outputs)

    for num_rows in ROWS:
        operands = (torch.randn(num_rows, num_inputs).bfloat16(), weight)
        assert_stays_inside(multiply, operands, at_end, monkeypatch)


@pytest.mark.parametrize(
    ("num_rows", "num_threads", "alone"),
    [
        (1, 1, {0}), (2, 1, set()), (16, 1, set()), (2, 2, {0, 1}), (3, 2, {0, 1, 2}), (4, 2, set()), (5, 2, {2}),
        (7, 3, {2, 3, 4}), (10, 4, {2, 7}), (11, 6, set(range(11))), (16, 8, set()),
    ],
)  # fmt: skip
def test_which_rows_onednn_multiplies_alone(num_rows: int, num_threads: int, alone: set[int]) -> None:
    num_together, places, back = bfloat_rows._arrange(num_rows, num_threads)
    assert num_together == num_rows - len(alone)
    if places is None:
        assert len(alone) in (0, num_rows)
    else:
        assert back is not None
        assert set(places.tolist()[num_together:]) == alone
        assert places[back].tolist() == list(range(num_rows))
