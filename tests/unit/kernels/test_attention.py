"""Attention of few new tokens stays in its buffers, whatever its shape, order and threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from guarded_memory import GuardedBuffer, guarded_copy
from kernel_checks import threads
from lingualinked.kernels import attention

pytestmark = pytest.mark.skipif(not attention.is_available(), reason="this processor does not run the kernel")

ELEMENT_BYTES = 2


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask_kind", ["none", "choices", "addends"])
@pytest.mark.parametrize(("dim", "group", "num_new"), [(8, 1, 1), (40, 3, 1), (64, 2, 2), (96, 1, 9), (256, 5, 3)])
def test_nothing_outside_the_buffers_is_touched(
    dim: int,
    group: int,
    num_new: int,
    mask_kind: str,
    dtype: torch.dtype,
    at_end: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_rows, num_key_heads = 2, 2
    num_heads = num_key_heads * group
    for num_tokens, num_threads in ((1, 1), (15, 3), (33, 1), (530, 3)):
        query = guarded_copy(torch.randn(num_rows, num_heads, num_new, dim).to(dtype), at_end)
        keys, values = (
            guarded_copy(torch.randn(num_rows, num_key_heads, num_tokens, dim).to(dtype), at_end) for _ in range(2)
        )
        mask = torch.rand(num_rows, 1, num_new, num_tokens) < 0.5
        kinds = {"none": None, "choices": mask, "addends": mask.to(dtype)}
        mask = kinds[mask_kind] if mask_kind == "none" else guarded_copy(kinds[mask_kind], at_end)
        logsums = GuardedBuffer(4 * num_rows * num_heads * num_new, at_end)
        result = GuardedBuffer(ELEMENT_BYTES * query.numel(), at_end)
        for together in {1, group, num_new}:

            def new_empty(_: Tensor, *shape: int, result: GuardedBuffer = result) -> Tensor:
                return result.tensor(*shape, dtype=dtype)

            sums = logsums.tensor(num_rows, num_heads, num_new, dtype=torch.float32)
            expected = attention.attend(query, keys, values, 0.3, mask, together)
            with threads(num_threads), monkeypatch.context() as patch:
                patch.setattr(Tensor, "new_empty", new_empty)
                found = attention.attend(query, keys, values, 0.3, mask, together, sums)
            assert found.data_ptr() == result.address
            assert found.isfinite().all()
            torch.testing.assert_close(
                found, expected
            )  # torch's order depends on threads, and that of the kernel with it
            assert sums.isfinite().all()
            assert result.is_untouched_around()
            assert logsums.is_untouched_around()


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "group", "num_threads"), [(8, 3, 1), (64, 1, 1), (64, 4, 3), (256, 5, 3)])
def test_texts_of_different_lengths_have_the_bits_of_each_alone(
    dim: int, group: int, num_threads: int, dtype: torch.dtype, at_end: bool
) -> None:
    num_places, num_key_heads = 9, 2
    query = guarded_copy(torch.randn(1, num_key_heads * group, num_places, dim).to(dtype), at_end)
    new = [guarded_copy(torch.randn(1, num_places, num_key_heads, dim).to(dtype), at_end) for _ in range(2)]
    new_keys, new_values = (each.transpose(1, 2) for each in new)
    buffers = [GuardedBuffer(ELEMENT_BYTES * query.numel(), at_end)]
    result = buffers[0].tensor(1, num_places, num_key_heads * group, dim, dtype=dtype).zero_()
    texts, expected = [], {}
    with threads(num_threads):
        for place, num_tokens in ((0, 1), (2, 530), (3, 15), (5, 33), (8, 64)):
            appends, size = place % 2 == 0, (1, num_key_heads, num_tokens, dim)
            keys, values = (torch.randn(size).to(dtype) for _ in range(2))
            buffers += [GuardedBuffer(keys.nbytes, at_end) for _ in range(2)]
            keys, values = (
                memory.tensor(*size, dtype=dtype).copy_(each)
                for memory, each in zip(buffers[-2:], (keys, values), strict=True)
            )
            if not appends:
                buffers[-1].forbid_writing()
                buffers[-2].forbid_writing()
            locations = ((each.data_ptr(), *each.stride()[1:3]) for each in (keys, values))
            texts.append(attention.Text(*locations, num_tokens, place, appends))
            full = [keys.clone(), values.clone()]
            if appends:
                full[0][:, :, -1], full[1][:, :, -1] = new_keys[:, :, place], new_values[:, :, place]
            expected[place] = keys, values, full, attention.attend(query[:, :, place : place + 1], *full, 0.3)
        attention.attend_texts(query, new_keys, new_values, texts, 0.3, result)
    for place, (keys, values, full, attended) in expected.items():
        assert torch.equal(result[:, place : place + 1], attended)
        assert torch.equal(keys, full[0])
        assert torch.equal(values, full[1])
    assert not result[:, [1, 4, 6, 7]].any()
    assert all(buffer.is_untouched_around() for buffer in buffers)
