"""What is called free of other rows is: in sizes that the probes do not try, too; and what is not is noticed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernel_checks import threads
from lingualinked.model.exact import row_probe
from lingualinked.model.exact.row_probe import has_free_attention, has_free_elements, has_free_products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_products_that_are_called_free_are(dtype: torch.dtype, num_threads: int) -> None:
    with threads(num_threads):
        if not has_free_products(dtype, 96, 160, False, num_threads):
            pytest.skip("a row's bits depend on the number of rows here")
        generator = torch.Generator().manual_seed(7)
        rows, weight = (torch.randn((num, 96), generator=generator).to(dtype) for num in (90, 160))
        with threads(1):
            two = torch.cat([functional.linear(pair, weight) for pair in rows.split(2)])
        for count in (2, 19, 37, 70, 90):
            assert torch.equal(functional.linear(rows[:count], weight), two[:count])


def test_products_that_depend_on_their_number_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def sloppy(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(rows, weight, bias) * (1 + (len(rows) > 2) / 128)

    monkeypatch.setattr(row_probe, "functional", type("Functions", (), {"linear": staticmethod(sloppy)}))
    probe = has_free_products.__wrapped__.__wrapped__  # neither cached nor kept
    assert not probe(torch.bfloat16, 64, 64, False, 1)


def test_functions_whose_ends_differ_are_noticed() -> None:
    def sloppy(states: Tensor) -> Tensor:
        result = states.clone()
        result[len(result) // 64 * 64 :] += 1
        return result

    for function, are_free in ((sloppy, False), (torch.relu, True)):
        assert has_free_elements(function, torch.bfloat16, 96, 1) is are_free
    assert has_free_elements(sloppy, torch.bfloat16, 128, 2)  # no vector is cut
    assert not has_free_elements(sloppy, torch.bfloat16, 64, 2)


def test_attention_of_usual_heads_is_told() -> None:
    assert has_free_attention(torch.bfloat16, 4, 2, 64) in (True, False)
