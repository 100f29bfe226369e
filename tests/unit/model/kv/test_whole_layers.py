"""Layers whose state is taken as a whole do what transformers' own do, whichever edits there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV4Config
from transformers.cache_utils import (
    DynamicIndexedLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4CSACache

from lingualinked.errors import ProtocolError
from lingualinked.model.kv.layer_state import num_bytes, tensors_of
from lingualinked.model.kv.whole_layers import whole_layer

CPU = torch.device("cpu")


def compressed() -> DeepseekV4CSACache:
    config = DeepseekV4Config(sliding_window=4)
    config.compress_rates = {"heavily_compressed_attention": 4, "compressed_sparse_attention": 2}
    return DeepseekV4CSACache(config)


KINDS: dict[str, Callable[[], Any]] = {
    "linear": LinearAttentionLayer,
    "two states": lambda: LinearAttentionLayer(number_of_states=2),
    "hybrid": LinearAttentionAndFullAttentionLayer,
    "hybrid with a window": lambda: LinearAttentionAndSlidingWindowAttentionLayer(4),
    "indexed": DynamicIndexedLayer,
    "compressed": compressed,
}


def run(layer: Any, rows: int, num_new: int, seed: int) -> list[Tensor]:
    """Write what a step of a model does; return what the model gets for it."""
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    results: list[Any] = []
    for index in range(getattr(layer, "number_of_states", 0)):
        results.append(layer.update_conv_state(made(rows, 6, num_new), index, conv_kernel_size=3))
        results.append(layer.update_recurrent_state(made(rows, 6, 2), index))
    if hasattr(layer, "sliding_window") or hasattr(layer, "get_seq_length"):
        results += layer.update(made(rows, 2, num_new, 4), made(rows, 2, num_new, 4))
    if isinstance(layer, DynamicIndexedLayer):
        results.append(layer.update_indexer(made(rows, num_new, 4)))
        old, new = layer.indexer_position_ids, torch.arange(num_new).expand(3, rows, num_new)
        layer.indexer_position_ids = new if old is None else torch.cat([old, new], dim=-1)
        results.append(layer.indexer_position_ids)
    if isinstance(layer, DeepseekV4CSACache):
        for name in ("compressor", "indexer"):
            kv, gate, first = layer.store_compression_weights(name, made(rows, num_new, 8), made(rows, num_new, 8))
            results += [kv, gate, torch.tensor(first), layer.update_compressor_states(name, kv)]
            if kv.shape[1]:
                parts = kv.view(rows, -1, 2, 8), gate.view(rows, -1, 2, 8)
                results += [each for each in layer.update_overlap_state(name, *parts, 4) if each is not None]
    if hasattr(layer, "record_step"):
        layer.record_step(num_new)
    return [each.clone() for each in results]


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_reordered_copied_and_moved(kind: str) -> None:
    ours, theirs = whole_layer(KINDS[kind]()), KINDS[kind]()
    assert ours.num_rows == 0
    assert_same(run(ours, 2, 5, 1), run(theirs, 2, 5, 1))
    assert (ours.num_rows, ours.stop) == (2, 5)
    assert ours.nbytes == num_bytes(tensors_of(theirs)) > 0
    before = ours.copy()
    for step, rows in enumerate(([1, 1, 0], [2, 0, 1])):
        version = ours.version
        for layer in (ours, theirs):
            layer.reorder_cache(torch.tensor(rows))
        assert ours.version > version
        assert ours.num_rows == 3
        assert_same(run(ours, 3, 1, step), run(theirs, 3, 1, step))
    moved = whole_layer(KINDS[kind]())
    moved.write_state(ours.read_state(), CPU)
    assert (moved.stop, moved.num_rows) == (7, 3)
    assert_same(run(ours, 3, 1, 7), run(moved, 3, 1, 7))
    assert_same(run(ours, 3, 1, 8), run(moved, 3, 1, 8))
    whole = KINDS[kind]()
    run(whole, 2, 5, 1)
    assert_same(run(before, 2, 1, 9), run(whole, 2, 1, 9))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_several_are_one_batch(kind: str) -> None:
    one, other = whole_layer(KINDS[kind]()), whole_layer(KINDS[kind]())
    theirs = KINDS[kind]()
    for seed, num_new in enumerate((5, 1)):
        run(one, 2, num_new, seed)
        run(theirs, 2, num_new, seed)
    theirs.reorder_cache(torch.tensor([0, 1, 1]))
    for seed, num_new in enumerate((5, 1)):
        run(other, 2, num_new, seed)
    other.reorder_cache(torch.tensor([1]))
    one.append_rows([other])
    assert one.num_rows == 3
    assert_same(run(one, 3, 1, 3), run(theirs, 3, 1, 3))


def test_rows_that_have_seen_other_tokens_are_refused() -> None:
    one, other = whole_layer(LinearAttentionLayer()), whole_layer(LinearAttentionLayer())
    run(one, 1, 5, 1)
    run(other, 1, 4, 1)
    with pytest.raises(ProtocolError, match="can't be joined"):
        one.append_rows([other])


def test_states_of_all_rows_that_differ_are_refused() -> None:
    layers: list[Any] = [whole_layer(LinearAttentionLayer()) for _ in range(2)]
    for number, layer in enumerate(layers):
        run(layer, 1, 5, 1)
        layer.of_all_rows = torch.tensor([float(number)])
    with pytest.raises(ProtocolError, match="can't be joined"):
        layers[0].append_rows(layers[1:])


@pytest.mark.parametrize("kind", ["indexed", "hybrid"])
def test_cropped_as_the_class_does(kind: str) -> None:
    ours, theirs = whole_layer(KINDS[kind]()), KINDS[kind]()
    for layer in (ours, theirs):
        layer.record_past = True
        run(layer, 1, 5, 1)
    if kind == "indexed":
        ours.check_crop(2)
        ours.drop_last(2)
        theirs.crop(-2)
        assert ours.stop == 3
    assert_same(run(ours, 1, 1, 2), run(theirs, 1, 1, 2))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("secret", 1, "keeps nothing at secret"),
        ("conv_states.7", torch.ones(1), "keeps nothing at conv_states.7"),
        ("conv_states.x", torch.ones(1), "keeps nothing"),
        ("dtype", "float129", "not a dtype"),
        ("num_seen", "nine", "keeps a int at num_seen"),
        ("num_seen", -1, "is negative"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(name: str, value: Any, message: str) -> None:
    layer = whole_layer(LinearAttentionLayer())
    with pytest.raises(ProtocolError, match=message):
        layer.write_state({name: value}, CPU)
