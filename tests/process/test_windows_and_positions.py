"""Models that see only so far, or know only so many positions, do as unsharded ones at and beyond those limits."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import Phi3Config, PreTrainedModel, StoppingCriteria

import accelerators
import lingualinked as ll
from families import reference, rope_config, save_tiny, tiny_config

pytestmark = [pytest.mark.process, pytest.mark.equality]

SPANS = [("a", 0, 1), ("b", 1, 3), ("c", 3, 4)]
Pair = tuple[Any, PreTrainedModel]


@pytest.fixture(scope="module")
def load_pair(shared_cluster: ll.Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Pair]]:
    models: list[Any] = []

    def load(family: str, **arguments: Any) -> Pair:
        folder = save_tiny(family, torch.float32, tmp_path_factory.mktemp(family))
        plan = ll.Plan.from_spans(SPANS)
        models.append(
            ll.ShardedModel.from_pretrained(folder, cluster=shared_cluster, plan=plan, progress=False, **arguments)
        )
        return models[-1], reference(folder, **arguments)

    yield load
    for model in models:
        model.close()


@pytest.fixture(scope="module", params=["mistral", "gemma2", "gemma3", "qwen2"])
def sliding(request: pytest.FixtureRequest, load_pair: Callable[..., Pair]) -> Pair:
    return load_pair(request.param)


PROMPT = torch.tensor([[1, 17, 93, 54, 8, 17, 93, 54, 8, 17]])  # the windows are of 6 tokens


def generate(model: Any, **arguments: Any) -> torch.Tensor:
    torch.manual_seed(7)
    return model.generate(**{"input_ids": PROMPT, "max_new_tokens": 20, "eos_token_id": None, **arguments})


def assistant_of(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model that often, not always, says the same."""
    assistant = copy.deepcopy(model)
    torch.manual_seed(3)
    for parameter in assistant.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    return assistant


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt_lookup_num_tokens": 3},
        {"prompt_lookup_num_tokens": 3, "do_sample": True, "top_k": 5},
        {"prefill_chunk_size": 4},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 3, "do_sample": True},
        {"use_cache": False},
    ],
    ids=str,
)
def test_beyond_sliding_windows(sliding: Pair, arguments: dict[str, Any]) -> None:
    assert torch.equal(*(generate(model, **arguments) for model in sliding))


@pytest.mark.parametrize("do_sample", [False, True])
def test_assisted_decoding_beyond_sliding_windows(sliding: Pair, do_sample: bool) -> None:
    sharded, unsharded = sliding
    assistant = assistant_of(unsharded)
    sampling = {"do_sample": do_sample, "top_k": 5 if do_sample else None}
    expected = generate(unsharded, assistant_model=assistant, **sampling)
    assert torch.equal(generate(sharded, assistant_model=assistant, **sampling), expected)
    if not do_sample:
        assert torch.equal(generate(assistant, assistant_model=sharded), generate(assistant, assistant_model=unsharded))


def test_cropping_beyond_sliding_windows(sliding: Pair) -> None:
    after = []
    for model in sliding:
        with torch.no_grad():
            past = model(PROMPT[:, :3]).past_key_values
            past.activate_past_recording()
            model(PROMPT[:, 3:], past_key_values=past)
            past.crop(-4)
            after.append(model(PROMPT[:, 6:], past_key_values=past).logits)
    assert torch.equal(*after)


def test_cropping_what_was_not_recorded_is_refused(sliding: Pair) -> None:
    sharded, _ = sliding
    past = sharded(PROMPT).past_key_values
    with pytest.raises(ll.ArgumentError, match="sliding window \\(6 tokens\\) is full; call activate_past_recording"):
        past.crop(-1)
    assert sharded(PROMPT, past_key_values=past).logits.isfinite().all()


@pytest.fixture(scope="module", params=["gpt2", "opt"])
def learned(request: pytest.FixtureRequest, load_pair: Callable[..., Pair]) -> Pair:
    return load_pair(request.param)


LIMIT = tiny_config("gpt2").max_position_embeddings
LONG = torch.arange(LIMIT + 6)[None].repeat(2, 1) % 90 + 3
PADDING = torch.ones_like(LONG)
PADDING[0, :9], PADDING[1, :6] = 0, 0  # on the left, so that the tokens need 64 positions


def test_padding_needs_no_learned_positions(learned: Pair) -> None:
    masked = {"input_ids": LONG[:, :-2], "attention_mask": PADDING[:, :-2]}
    assert torch.equal(*(generate(model, **masked, max_new_tokens=2) for model in learned))


def test_positions_that_the_model_counts_itself(learned: Pair) -> None:
    sharded, unsharded = learned
    with torch.no_grad():
        if unsharded.config.model_type == "opt":  # in the mask
            assert torch.equal(*(model(LONG, attention_mask=PADDING).logits for model in learned))
            return
        if accelerators.chosen == "cpu":  # on a GPU, an index beyond a table can't be survived
            with pytest.raises(IndexError):  # from the first token, padding or not
                unsharded(LONG, attention_mask=PADDING)
        with pytest.raises(ll.ArgumentError, match=f"{LIMIT + 6} tokens exceed the {LIMIT} positions"):
            sharded(LONG, attention_mask=PADDING)
        positions = (PADDING.cumsum(-1) - 1).clamp(0)
        logits = [model(LONG, attention_mask=PADDING, position_ids=positions).logits for model in learned]
        assert torch.equal(*logits)


def test_text_beyond_learned_positions_is_refused(learned: Pair) -> None:
    sharded, _ = learned
    needed = f"{LIMIT + 1} tokens exceed the {LIMIT} positions"
    one_more = torch.ones((1, LIMIT + 1), dtype=torch.long)
    for call in (
        lambda: sharded(one_more),
        lambda: sharded(one_more[:, :3], position_ids=torch.tensor([[3, 4, LIMIT]])),
        lambda: sharded.generate(LONG, attention_mask=PADDING, max_new_tokens=2),
        lambda: sharded(one_more[:, :1], past_key_values=sharded(one_more[:, 1:]).past_key_values),
    ):
        with pytest.raises(ll.ArgumentError, match=needed):
            call()
    assert sharded(one_more[:, 1:]).logits.shape[1] == LIMIT


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_rope_that_earlier_texts_have_stretched(family: str, load_pair: Callable[..., Pair]) -> None:
    pair = sharded, unsharded = load_pair(family, config=rope_config(family, "dynamic"))  # 64 positions are its own
    text = torch.arange(120)[None] % 90 + 3

    def check(*lengths: int) -> None:
        for length in lengths:
            with torch.no_grad():
                assert torch.equal(*(model(text[:, :length]).logits for model in pair)), length

    check(9, 100)
    beside = copy.deepcopy(unsharded)  # on which that text goes on alone, as its session does
    with torch.no_grad():
        kept = [model(text[:, :80]).past_key_values for model in (sharded, beside)]
        unsharded(text[:, :80])
    for spans in (
        [("d", 0, 2), ("c", 2, 4)],
        [("a", 0, 2), ("d", 2, 4)],
        SPANS,
    ):  # on devices that load a part of it anew
        sharded.rebalance(ll.Plan.from_spans(spans))
        check(70)
        with torch.no_grad():
            going_on = [
                model(text[:, :3], past_key_values=past).logits
                for model, past in zip((sharded, beside), kept, strict=True)
            ]
            unsharded(text[:, :80])
        assert torch.equal(*going_on)
        check(80, 9)
        sharded.rebalance(ll.Plan.from_spans([("c", 0, 4)]))
        check(70, 110, 66)
    assert torch.equal(*(generate(model, max_new_tokens=70) for model in pair))  # from 10 tokens to 80
    check(70)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_texts_beside_each_other_do_not_stretch_each_others_rope(family: str, load_pair: Callable[..., Pair]) -> None:
    sharded, unsharded = load_pair(family, config=rope_config(family, "dynamic"))
    texts = [torch.arange(first, first + 130)[None] % 90 + 3 for first in (0, 40, 7)]
    lengths = [66, 100, 9]  # of the first step; what the model knows is 64

    def alone(text: torch.Tensor, length: int) -> list[torch.Tensor]:
        return list(say(copy.deepcopy(unsharded), text, length))

    def say(model: Any, text: torch.Tensor, length: int) -> Iterator[torch.Tensor]:
        past = None
        for start, end in [(0, length), (length, length + 1), (length + 1, length + 9), (length + 9, length + 10)]:
            with torch.no_grad():
                output = model(text[:, start:end], past_key_values=past)
            past = output.past_key_values
            yield output.logits

    expected = [alone(text, length) for text, length in zip(texts, lengths, strict=True)]
    # 1) in one thread; the first step of a text is the unsharded model's after those of the texts before
    found = list(zip(*(say(sharded, text, length) for text, length in zip(texts, lengths, strict=True)), strict=True))
    for mine, wanted in zip(zip(*found, strict=True), expected, strict=True):
        assert all(map(torch.equal, mine, wanted))
    # 2) in threads of their own
    with ThreadPoolExecutor(1) as other:  # which stretches it far
        other.submit(lambda: sharded(texts[0][:, :120])).result()
    begun = threading.Barrier(3)

    def run(text: torch.Tensor, length: int) -> list[torch.Tensor]:
        begun.wait(60)
        return list(say(sharded, text, length))

    with ThreadPoolExecutor(3) as threads:
        answers = list(threads.map(run, texts, lengths))
    for mine, wanted in zip(answers, expected, strict=True):
        assert all(map(torch.equal, mine, wanted))


def test_a_rope_that_moves_in_the_midst_of_a_text(load_pair: Callable[..., Pair]) -> None:
    pair = sharded, _ = load_pair("llama", config=rope_config("llama", "dynamic"))
    with torch.no_grad():
        for model in pair:
            model(torch.arange(120)[None] % 90 + 3)  # which stretches it for what follows
    prompt = torch.arange(70)[None] % 90 + 3
    plans = iter([[("a", 0, 2), ("d", 2, 4)], [("d", 0, 4)]])

    class Move(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, _scores: Any, **_kwargs: Any) -> torch.Tensor:
            if input_ids.shape[1] in (75, 80):
                sharded.rebalance(ll.Plan.from_spans(next(plans)))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    asked: dict[str, Any] = {"input_ids": prompt, "output_logits": True, "return_dict_in_generate": True}
    moved = generate(sharded, **asked, stopping_criteria=[Move()])
    stayed = generate(pair[1], **asked)
    assert next(plans, None) is None
    assert all(map(torch.equal, moved["logits"], stayed["logits"]))


def test_a_rope_that_changes_with_the_length(load_pair: Callable[..., Pair]) -> None:
    config = tiny_config("phi3")
    assert isinstance(config, Phi3Config)
    half = config.hidden_size // config.num_attention_heads // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * half,
        "long_factor": [3.0] * half,
        "original_max_position_embeddings": 16,
    }
    config.rope_parameters, config.original_max_position_embeddings = rope, 16
    pair = load_pair("phi3", config=config)
    tokens = [generate(model) for model in pair]  # from 10 tokens to 30
    assert torch.equal(*tokens)
    past = [generate(model, return_dict_in_generate=True)["past_key_values"].get_seq_length() for model in pair]
    assert past == [29, 29]
