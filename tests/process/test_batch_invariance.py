"""A text's tokens and logits have the same bits alone and in any batch, while layers move, in any number of stages and threads.

``make test-invariance`` compares 1,000 prompts; the suite a few of them.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import random
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig

import lingualinked as ll
from process import test_howto as howto
from process.conftest import save_random

pytestmark = pytest.mark.process

NUM_LAYERS, VOCABULARY, NUM_NEW = 8, 96, 4
NUM_PROMPTS = int(os.environ.get("LINGUALINKED_NUM_PROMPTS", "12"))
SIZES = (1, 7, 64)  # of batches, mixed at random
WAYS = [(1, 1, 0), (2, 2, 5)]  # stages, threads of each worker, migrations
ALL_WAYS = [(stages, threads, moves) for stages in (1, 2, 3, 8) for threads in (1, 2) for moves in (0, 20)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=640,  # more than oneDNN adds up at once, of one row
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        eos_token_id=None,
        pad_token_id=0,
    )
    return save_random(config, tmp_path_factory.mktemp("invariance"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def model(shared_cluster: ll.Cluster, path: str) -> Iterator[Any]:
    with load(path, ll.Plan.from_spans([("a", 0, 4), ("b", 4, 8)]), shared_cluster) as model:
        yield model


def load(path: str, plan: ll.Plan, cluster: ll.Cluster, **arguments: Any) -> Any:
    """Load the model as batch-invariant; where that can't be promised, it has to be refused by name."""
    try:
        return ll.ShardedModel.from_pretrained(
            path, cluster=cluster, plan=plan, progress=False, batch_invariant=True, **arguments
        )
    except ll.UnsupportedOperationError as error:
        assert "batch_invariant=True can't be promised: " in str(error)  # noqa: PT017 - that is where it holds
        pytest.skip(str(error))


def prompts(number: int, most: int = 24) -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(1, VOCABULARY) for _ in range(rng.randint(1, most))] for _ in range(number)]


def padded(rows: Sequence[Sequence[int]], *, on_the_right: bool = False) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros((2, len(rows), width), dtype=torch.long)
    for row, tokens in enumerate(rows):
        place = slice(0, len(tokens)) if on_the_right else slice(width - len(tokens), width)
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, rows: Sequence[Sequence[int]], **arguments: Any) -> list[tuple[list[int], Tensor]]:
    """Return the new tokens of each row, and its logits at every step."""
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    result = model.generate(**padded(rows), **{**settings, **arguments})
    logits = torch.stack(result.logits, dim=1)
    return [(tokens[-logits.shape[1] :].tolist(), own) for tokens, own in zip(result.sequences, logits, strict=True)]


def are_equal(found: tuple[list[int], Tensor], expected: tuple[list[int], Tensor]) -> bool:
    return found[0] == expected[0] and torch.equal(found[1], expected[1])


def test_a_row_does_not_depend_on_the_others(model: Any) -> None:
    rows = prompts(7)
    alone = [generate(model, [row])[0] for row in rows]
    for chosen in (range(7), (3, 0), (6, 5, 2)):
        together = generate(model, [rows[place] for place in chosen])
        for place, found in zip(chosen, together, strict=True):
            assert are_equal(found, alone[place]), place


@pytest.mark.parametrize("arguments", [{"cache_implementation": "static"}, {"prefill_chunk_size": 5}], ids=str)
def test_what_depends_on_the_padding_is_refused(model: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(ll.UnsupportedOperationError, match="batch_invariant=True"):
        generate(model, prompts(2), **arguments)


def test_microbatches_change_no_bit(model: Any) -> None:
    rows = prompts(6)
    expected = generate(model, rows, num_microbatches=1)
    for number in (2, 3):
        assert all(map(are_equal, generate(model, rows, num_microbatches=number), expected))


def test_beams_and_sampled_rows_are_those_of_the_prompt_alone(model: Any) -> None:
    rows = prompts(3)
    arguments = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": NUM_NEW}
    together = model.generate(**padded(rows), **arguments)
    for place, row in enumerate(rows):
        alone = model.generate(**padded([row]), **arguments)
        assert torch.equal(together[2 * place : 2 * place + 2, -NUM_NEW:], alone[:, -NUM_NEW:])
    torch.manual_seed(1)
    assert generate(model, rows, do_sample=True)[0][1].shape == (NUM_NEW, VOCABULARY)


def test_a_text_goes_on_from_past_key_values(model: Any) -> None:
    row, other = prompts(2)
    inputs = padded([row, other])
    first = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    past = first.past_key_values
    kept = copy.deepcopy(past)
    past.crop(-1)
    past.batch_select_indices(torch.tensor([1, 0, 1]))
    assert past.get_seq_length() == kept.get_seq_length() - 1 == inputs["input_ids"].shape[1]
    ids = first.sequences[[1, 0, 1], -1:][:, :1]
    mask = torch.cat([inputs["attention_mask"][[1, 0, 1]], torch.ones(3, 1, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1)[:, -1:]
    found = model(ids, attention_mask=mask, position_ids=positions, past_key_values=past).logits
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    kept.end()
    past.end()


def test_forward_leaves_padding_out(model: Any) -> None:
    rows = prompts(3)
    inputs = padded(rows, on_the_right=True)
    logits = model(**inputs).logits
    for place, row in enumerate(rows):
        assert torch.equal(logits[place, : len(row)], model(torch.tensor([row])).logits[0])
        assert not logits[place, len(row) :].any()
    left = padded(rows)
    positions = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert torch.equal(
        model(**left, position_ids=positions, logits_to_keep=1).logits[0, 0], logits[0, len(rows[0]) - 1]
    )


def test_a_long_prompt_is_computed_in_pieces_of_its_own(model: Any) -> None:
    long, short = prompts(1, 8)[0] * 300, [5, 6, 7]
    long = long[:1100]
    alone = generate(model, [long])[0]
    assert are_equal(generate(model, [short, long])[1], alone)


def test_continuous_batching_gives_the_tokens_of_each_prompt_alone(model: Any) -> None:
    rows = [*prompts(9), (prompts(1, 8)[0] * 300)[:600]]
    rows.append([*rows[-1][:400], 7])  # whose beginning is not taken from the other's KV
    config = GenerationConfig(max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    results = model.generate_batch(rows, generation_config=config, progress_bar=False)
    found = [results[f"req_{place}"].generated_tokens for place in range(len(rows))]
    assert found == [generate(model, [row])[0][0] for row in rows]
    limited = ContinuousBatchingConfig(max_batch_tokens=64)
    with pytest.raises(ll.UnsupportedOperationError, match="max_batch_tokens=64 with batch_invariant=True"):
        model.generate_batch(rows, generation_config=config, continuous_batching_config=limited, progress_bar=False)


def test_what_mixes_rows_is_refused(model: Any) -> None:
    inputs = padded(prompts(1))
    refused: list[tuple[str, dict[str, Any]]] = [
        ("output_hidden_states", {"output_hidden_states": True}),
        ("output_attentions", {"output_attentions": True}),
    ]
    for said, arguments in refused:
        with pytest.raises(ll.UnsupportedOperationError, match=said):
            model(**inputs, **arguments)
    with pytest.raises(ll.UnsupportedOperationError, match="inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 3, 128, dtype=torch.bfloat16))
    with pytest.raises(ll.UnsupportedOperationError, match="position_ids=None counts padding"):
        model(**padded([[1, 2, 3], [4]]))
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ll.UnsupportedOperationError, match="a hook on a module"):
            model(**inputs)
    finally:
        handle.remove()


def test_too_little_room_leaves_the_session_as_it_was(shared_cluster: ll.Cluster, path: str) -> None:
    with load(path, ll.Plan.from_spans([("a", 0, 8)]), shared_cluster, max_kv_tokens=20) as model:
        past = model(torch.ones(2, 6, dtype=torch.long)).past_key_values
        with pytest.raises(ll.KVCapacityError):
            model(torch.ones(2, 6, dtype=torch.long), past_key_values=past)
        assert model(torch.ones(2, 4, dtype=torch.long), past_key_values=past).past_key_values.get_seq_length() == 10


def test_float32_is_refused_or_holds(shared_cluster: ll.Cluster, path: str) -> None:
    plan = ll.Plan.from_spans([("a", 0, 8)])
    try:
        model = ll.ShardedModel.from_pretrained(
            path, cluster=shared_cluster, plan=plan, progress=False, batch_invariant=True, dtype=torch.float32
        )
    except ll.UnsupportedOperationError as error:
        assert "load the model with dtype=torch.bfloat16" in str(error)  # noqa: PT017 - or else it holds
        return
    with model:
        rows = prompts(3)
        alone = [generate(model, [row])[0] for row in rows]
        assert all(map(are_equal, generate(model, rows), alone))


def test_a_class_that_runs_no_packed_steps_is_refused(shared_cluster: ll.Cluster, tmp_path: Any) -> None:
    from transformers import BloomConfig

    folder = save_random(
        BloomConfig(hidden_size=64, n_layer=2, n_head=2, vocab_size=64), tmp_path, dtype=torch.bfloat16
    )
    plan = ll.Plan.from_spans([("a", 0, 2)])
    with pytest.raises(ll.UnsupportedOperationError, match="packed steps are not possible"):
        ll.ShardedModel.from_pretrained(folder, cluster=shared_cluster, plan=plan, progress=False, batch_invariant=True)


@contextlib.contextmanager
def moving_layers(model: Any, names: Sequence[str], number: int) -> Iterator[None]:
    """Move layers so many times, in another thread, within the context."""
    failures: list[BaseException] = []

    def move() -> None:
        rng = random.Random(3)
        try:
            for _ in range(number):
                bounds = [0, *sorted(rng.sample(range(1, NUM_LAYERS), len(names) - 1)), NUM_LAYERS]
                spans = zip(names, bounds, bounds[1:], strict=False)
                model.rebalance(ll.Plan.from_spans(list(spans)))
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)

    thread = threading.Thread(target=move)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if failures:
        raise failures[0]


def test_the_page_runs(shared_fork_server: None) -> None:
    names: dict[str, Any] = {}
    howto.run(
        howto.code_of("index").replace("devices=3", "devices=1").replace('"even"', '"even", progress=False'),
        "index",
        names,
    )
    with names["model"]:
        try:
            code = howto.code_of("batch_invariance").replace('"even"', '"even", progress=False')
            howto.run(code, "batch_invariance", names)
        except ll.UnsupportedOperationError as error:
            pytest.skip(str(error))


def digest_prompts(model: Any, sizes: Sequence[int], seed: int) -> str:
    """Return a digest of the logits of all prompts, which run in batches of random prompts of these sizes."""
    rng, rows = random.Random(seed), prompts(NUM_PROMPTS)
    left = [*range(NUM_PROMPTS)]
    rng.shuffle(left)
    found: dict[int, tuple[list[int], Tensor]] = {}
    while left:
        size = rng.choice(sizes)
        chosen, left = left[:size], left[size:]
        found.update(zip(chosen, generate(model, [rows[place] for place in chosen]), strict=True))
    digest = hashlib.sha256()
    for place in range(NUM_PROMPTS):
        digest.update(repr(found[place][0]).encode() + found[place][1].view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_all_ways_give_one_digest(shared_fork_server: None, path: str) -> None:
    digests: dict[str, tuple[Any, ...]] = {}
    for way in ALL_WAYS if NUM_PROMPTS > 100 else WAYS:
        num_stages, num_threads, num_moves = way
        names = [f"d{index}" for index in range(num_stages)]
        bounds = [NUM_LAYERS * index // num_stages for index in range(num_stages + 1)]
        plan = ll.Plan.from_spans(list(zip(names, bounds, bounds[1:], strict=False)))
        with (
            ll.Cluster([ll.Device(name=name, threads=num_threads) for name in names]) as cluster,
            load(path, plan, cluster) as model,
            moving_layers(model, names, num_moves if num_stages > 1 else 0),
        ):
            for sizes in ((1,), SIZES) if way == WAYS[0] else (SIZES,):
                digests[digest_prompts(model, sizes, seed=len(digests))] = (way, sizes)
                assert len(digests) == 1, digests
