import pytest
import torch
from transformers import JambaConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from families import tiny_config
from lingualinked.errors import ArgumentError
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


def jamba(owned: set[int], num_tokens: int, *, records: bool = False, is_recurrent: bool = True) -> StageCache:
    """Make a stage's KV cache of a model with state-space layers at 0, 2 and 3 and full attention at 1."""
    config = JambaConfig(num_hidden_layers=4, attn_layer_period=4, attn_layer_offset=1)
    cache = StageCache(config, owned)
    cache.record_past(records)
    for slot in owned:
        if slot == 1:
            cache.hf.update(states(num_tokens), states(num_tokens), slot)
            continue
        cache.hf.update_conv_state(torch.ones(1, 6, num_tokens), slot, conv_kernel_size=4)
        if is_recurrent:
            cache.hf.update_recurrent_state(torch.ones(1, 6, 2), slot)
    cache.enter_span(num_tokens)
    assert cache.hf.get_seq_length() == (num_tokens if min(owned) > 0 else 0) or 1 in owned
    cache.advance(num_tokens)
    return cache


def test_recurrent_states_are_counted_where_they_are_not() -> None:
    cache = jamba({2, 3}, 5)
    assert isinstance(cache.hf.layers[0], LinearAttentionLayer)
    assert isinstance(cache.hf.layers[1], DynamicLayer)
    assert cache.hf.has_previous_state(0)
    assert cache.hf.get_seq_length() == 5
    assert cache.hf.get_mask_sizes(3, 1) == (8, 0)
    assert cache.nbytes == 2 * (6 * 4 + 6 * 2) * 4  # layers x (convolution + recurrent state) x float32
    assert cache.num_rows == 1
    assert cache.lags == {}
    for update in (cache.hf.update_conv_state, cache.hf.update_recurrent_state):
        with pytest.raises(AssertionError, match="held elsewhere"):
            update(torch.ones(1, 6, 4), 0)


def test_layers_before_the_span_count_when_it_is_entered() -> None:
    cache = jamba({3}, 5)
    cache.enter_span(2)
    assert cache.hf.get_seq_length() == 7
    cache.advance(2)
    assert cache.hf.get_seq_length() == 7


def test_crop_refuses_recurrent_states() -> None:
    with pytest.raises(ArgumentError, match="past, which was not recorded"):
        jamba({2, 3}, 5).crop(1)
    with pytest.raises(ArgumentError, match="does not go back"):
        jamba({2, 3}, 5, records=True).crop(1)
    cache = jamba({2, 3}, 5, records=True, is_recurrent=False)
    cache.crop(1)
    assert [layer.stop for layer in cache.owned.values()] == [4, 4]
    jamba({2, 3}, 5, records=True).crop(0)


def test_a_static_cache_refuses_recurrent_states() -> None:
    with pytest.raises(ArgumentError, match="leave cache_implementation out"):
        StageCache(JambaConfig(num_hidden_layers=4), {0}, max_cache_len=8)


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
