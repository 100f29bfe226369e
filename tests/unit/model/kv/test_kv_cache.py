import pytest
import torch
from transformers import JambaConfig

from families import tiny_config
from lingualinked.errors import ArgumentError, UncuttableModelError
from lingualinked.model.kv.kv_cache import StageCache


def states(num_new: int) -> torch.Tensor:
    return torch.zeros(1, 2, num_new, 8)


def filled(family: str, num_tokens: int, *, records: bool = False) -> StageCache:
    cache = StageCache(tiny_config(family), {1, 2})
    cache.record_past(records)
    for slot in (1, 2):
        cache.hf.update(states(num_tokens), states(num_tokens), slot)
    cache.advance(num_tokens)
    return cache


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_every_layer_has_seen_the_session(family: str) -> None:
    cache = filled(family, 5)
    assert cache.num_tokens == 5
    assert [cache.hf.get_seq_length(slot) for slot in range(4)] == [5] * 4
    assert {cache.hf.get_mask_sizes(3, slot) for slot in range(4)} == {(8, 0)}
    assert cache.hf.is_initialized


def test_layers_held_elsewhere_take_no_memory() -> None:
    cache = filled("llama", 5)
    assert cache.nbytes == 2 * 2 * 2 * 64 * 8 * 4  # layers x keys and values x heads x tokens x dim x float32
    assert StageCache(tiny_config("llama"), {0}).nbytes == 0


def test_reorder_may_change_the_number_of_rows() -> None:
    cache = filled("llama", 5)
    cache.reorder(torch.tensor([0, 0, 0]))
    states_of_three = states(1).repeat(3, 1, 1, 1)
    with torch.inference_mode():
        keys, _ = cache.hf.update(states_of_three, states_of_three, 1)
    assert keys.shape == (3, 2, 6, 8)


def test_crop_reaches_every_layer() -> None:
    cache = filled("gemma2", 9, records=True)
    cache.crop(4)
    assert cache.num_tokens == 5
    assert [cache.hf.get_seq_length(slot) for slot in range(4)] == [5] * 4


def test_crop_refuses_a_negative_number() -> None:
    with pytest.raises(ArgumentError, match="by -2"):
        filled("llama", 5).crop(-2)


def test_crop_refuses_a_full_window_without_its_past_and_changes_nothing() -> None:
    cache = filled("gemma2", 9)
    with pytest.raises(ArgumentError, match="activate past recording before the prefill"):
        cache.crop(1)
    assert [cache.hf.get_seq_length(slot) for slot in range(4)] == [9] * 4
    filled("gemma2", 5).crop(1)


def test_recurrent_states_are_refused() -> None:
    with pytest.raises(UncuttableModelError, match="neither full nor sliding"):
        StageCache(JambaConfig(num_hidden_layers=4), {0})


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_copy_goes_on_by_itself(family: str) -> None:
    cache = filled(family, 9, records=True)
    copied = cache.copy()
    cache.reserve(100)
    assert copied.reserved_tokens == 0
    with torch.inference_mode():
        cache.hf.update(states(1) + 1, states(1) + 1, 1)
    cache.crop(3)
    assert [copied.hf.get_seq_length(slot) for slot in range(4)] == [9] * 4
    assert copied.num_tokens == 9
    assert copied.records_past == cache.records_past
    assert copied.owned[1] is copied.hf.layers[1]
    keys, _ = copied.owned[1].read_tokens(0, 9)
    assert not keys.any()
    copied.crop(1)
    assert [cache.hf.get_seq_length(slot) for slot in (0, 2, 3)] == [6] * 3
    assert [copied.hf.get_seq_length(slot) for slot in range(4)] == [8] * 4
