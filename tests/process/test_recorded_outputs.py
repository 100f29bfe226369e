"""Hidden states and attentions of a sharded model are those of the unsharded one: bit for bit, in ``forward`` and ``generate``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

import accelerators
import lingualinked as ll
from accelerators import embed
from families import reference, save_tiny, tiny_config
from lingualinked.cluster.steps.recorded import RecordedPart
from waiting import num_sessions, wait_until

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[0, 0, 1, 17, 93, 54, 8, 17], [1, 5, 6, 7, 8, 9, 10, 11]])
MASK = (IDS != 0).long()
SPANS = [("a", 0, 1), ("b", 1, 3), ("c", 3, 4)]
ASKED: dict[str, dict[str, Any]] = {
    "nothing": {"output_hidden_states": False},
    "hidden states": {"output_hidden_states": True},
    "one hidden state": {"output_hidden_states": 2},
    "some hidden states": {"output_hidden_states": [0, 3, -1, 99]},
    "attentions": {"output_attentions": True},
    "both": {"output_hidden_states": True, "output_attentions": True},
}
MODES: list[dict[str, Any]] = [
    {},
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "num_return_sequences": 2},
    {"cache_implementation": "static"},
    {"cache_implementation": "static", "num_beams": 2},
]
MIXED = {"mlp_only_layers": [0], "decoder_sparse_step": 2}  # layers with and without experts


@pytest.fixture(
    scope="module",
    params=[
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("gpt2", torch.bfloat16),
        ("bloom", torch.float32),
        ("gemma3", torch.bfloat16),
        ("mixtral", torch.bfloat16),
    ],
    ids=lambda param: f"{param[0]}-{str(param[1]).removeprefix('torch.')}",
)
def pair(
    request: pytest.FixtureRequest, shared_cluster: ll.Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Any]]:
    """A model in three stages, and the unsharded one, both with eager attention."""
    family, dtype = request.param
    folder = save_tiny(family, dtype, tmp_path_factory.mktemp(family))
    whole = reference(folder, attn_implementation="eager")
    plan = ll.Plan.from_spans(SPANS)
    with ll.ShardedModel.from_pretrained(
        str(folder), cluster=shared_cluster, plan=plan, attn_implementation="eager", progress=False
    ) as sharded:
        yield sharded, whole


def assert_equal(ours: Any, theirs: Any) -> None:
    """Compare outputs, with tuples in tuples, by structure and bits."""
    assert type(ours) is type(theirs), (type(ours), type(theirs))
    if isinstance(theirs, Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for name in theirs:
            if name != "past_key_values":
                assert_equal(ours[name], theirs[name])
    elif isinstance(theirs, tuple):
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs, strict=True):
            assert_equal(our, their)
    else:
        assert ours == theirs


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
@torch.no_grad()
def test_forward(pair: tuple[Any, Any], asked: dict[str, Any]) -> None:
    sharded, whole = pair
    ours, theirs = (model(IDS, attention_mask=MASK, **asked) for model in pair)
    assert_equal(ours, theirs)
    mask = torch.cat([MASK, MASK[:, :1] * 0 + 1], dim=1)
    steps = (
        model(IDS[:, :1], attention_mask=mask, past_key_values=output.past_key_values, **asked)
        for model, output in ((sharded, ours), (whole, theirs))
    )
    assert_equal(*steps)
    for call in ({"return_dict": False}, {"labels": IDS}, {"labels": IDS, "return_dict": False, "logits_to_keep": 0}):
        assert_equal(*(model(IDS, use_cache=False, **call, **asked) for model in pair))
    embeddings = embed(whole, IDS)
    assert_equal(*(model(inputs_embeds=embeddings, use_cache=False, logits_to_keep=2, **asked) for model in pair))


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_generate(pair: tuple[Any, Any], asked: dict[str, Any], mode: dict[str, Any]) -> None:
    if "cache_implementation" in mode and pair[1].config.model_type == "bloom":
        pytest.skip("its biases by position have the length of the text")
    said = []
    for model in pair:
        torch.manual_seed(0)
        said.append(
            model.generate(IDS, attention_mask=MASK, max_new_tokens=4, return_dict_in_generate=True, **mode, **asked)
        )
    assert_equal(*said)
    if asked == {"output_hidden_states": True}:  # one tuple of layers for each step, of all beams
        assert [len(step) for step in said[0].hidden_states] == [5] * len(said[0].hidden_states)
        assert said[0].hidden_states[-1][0].shape[:2] == (
            2 * mode.get("num_beams", mode.get("num_return_sequences", 1)),
            1,
        )


@torch.no_grad()
def test_under_autocast(pair: tuple[Any, Any]) -> None:
    """Which chooses other dtypes for what layers record."""
    with torch.autocast(accelerators.chosen.split(":")[0], dtype=torch.bfloat16):
        assert_equal(*(model(IDS, attention_mask=MASK, **ASKED["both"]) for model in pair))


@torch.no_grad()
def test_the_config_may_ask(pair: tuple[Any, Any]) -> None:
    for model in pair:
        model.config.output_hidden_states = True
    try:
        assert_equal(*(model(IDS) for model in pair))
        assert_equal(*(model(IDS, output_hidden_states=False) for model in pair))
        assert_equal(*(model(IDS, output_hidden_states=None) for model in pair))
    finally:
        for model in pair:
            model.config.output_hidden_states = False


@pytest.mark.parametrize("mode", [{"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 3}], ids=str)
def test_steps_of_several_tokens_behind_others(pair: tuple[Any, Any], mode: dict[str, Any]) -> None:
    """Candidates, which are cropped off the KV again, and chunks of a prompt."""
    asked = {"max_new_tokens": 8, "return_dict_in_generate": True, "eos_token_id": None, **ASKED["both"], **mode}
    repeated = torch.cat([IDS[1:], IDS[1:]], dim=1)
    assert_equal(*(model.generate(repeated, **asked) for model in pair))


class MovingInTheMiddle:
    """A streamer that moves the model between two steps of what it generates."""

    def __init__(self, model: Any, *plans: list[tuple[str, int, int]]) -> None:
        self.model, self.plans, self.moves = model, [ll.Plan.from_spans(spans) for spans in plans], []

    def put(self, _tokens: Tensor) -> None:
        if self.plans:
            self.moves.append(self.model.rebalance(self.plans.pop()).migration)

    def end(self) -> None:
        pass


def test_a_model_that_moves_between_steps_records_the_same(pair: tuple[Any, Any]) -> None:
    sharded, whole = pair
    moving = MovingInTheMiddle(sharded, SPANS, [("d", 0, 3), ("a", 3, 4)], [("b", 0, 2), ("c", 2, 4)])
    asked = {"max_new_tokens": 6, "return_dict_in_generate": True, **ASKED["both"], "eos_token_id": None}
    assert_equal(sharded.generate(IDS[:1], streamer=moving, **asked), whole.generate(IDS[:1], **asked))
    assert [move.num_sessions for move in moving.moves] == [0, 1, 1]  # the prompt is put before there is KV


def test_a_model_that_moves_during_steps_records_the_same(pair: tuple[Any, Any]) -> None:
    """Beams, whose rows are reordered, while another thread moves the layers to and fro."""
    sharded, whole = pair
    asked = {
        "max_new_tokens": 16,
        "num_beams": 2,
        "return_dict_in_generate": True,
        **ASKED["both"],
        "eos_token_id": None,
    }
    expected = whole.generate(IDS, attention_mask=MASK, **asked)
    with ThreadPoolExecutor(1) as pool:
        num_moved = 0
        while num_moved < 2:
            said = pool.submit(lambda: sharded.generate(IDS, attention_mask=MASK, **asked))
            for spans in ([("d", 0, 2), ("c", 2, 4)], SPANS):
                num_moved += sharded.rebalance(ll.Plan.from_spans(spans)).migration.num_sessions
            assert_equal(said.result(60), expected)


def test_a_pipeline_returns_what_it_returns_of_the_model(
    pair: tuple[Any, Any], other_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The text alone: that is what a pipeline keeps."""
    asked = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_hidden_states": True, "do_sample": False}
    said = [pipeline("text-generation", model=model, tokenizer=other_tokenizer)("the quick", **asked) for model in pair]
    assert said[0] == said[1]


FAULTS: dict[str, Callable[[RecordedPart], RecordedPart]] = {
    "shape": lambda part: RecordedPart(part.layouts, tuple(tensor[..., :-1] for tensor in part.tensors)),
    "rows": lambda part: RecordedPart(part.layouts, tuple(tensor[:1] for tensor in part.tensors)),
    "dtype": lambda part: RecordedPart(part.layouts, tuple(tensor.double() for tensor in part.tensors)),
    "count": lambda part: RecordedPart(tuple(each * 2 for each in part.layouts), part.tensors * 2),
    "nothing": lambda part: RecordedPart((), ()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_stage_that_sends_something_else_ends_the_session(
    sharded: Any, unsharded: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its device is named, nothing waits for ever, and other sessions go on."""
    past, kept = sharded(IDS).past_key_values, sharded(IDS).past_key_values
    expected = unsharded(IDS).past_key_values
    with monkeypatch.context() as patch:
        part_of = RecordedPart.of
        patch.setattr(RecordedPart, "of", lambda *given: FAULTS[fault](part_of(*given)))
        with pytest.raises(ll.WorkerError, match=r"device 'a' raised ProtocolError: what layers .* recorded in a step"):
            sharded(IDS[:, :1], past_key_values=past, output_hidden_states=True)
    with pytest.raises(ll.ClosedError, match="ended with WorkerError"):
        sharded(IDS[:, :1], past_key_values=past)
    wait_until(lambda: num_sessions(sharded) == [1, 1, 1])
    found, theirs = (
        model(IDS[:, :1], past_key_values=each, output_hidden_states=True)
        for model, each in ((sharded, kept), (unsharded, expected))
    )
    assert_equal(found.hidden_states, theirs.hidden_states)


@pytest.mark.cpu_only(reason="a sharded model computes the loss of routers in the caller, on the CPU")
@pytest.mark.parametrize(("family", "changed"), [("mixtral", {}), ("qwen2-moe", MIXED)])
@torch.no_grad()
def test_router_logits_and_their_loss(
    family: str, changed: dict[str, Any], place: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = tiny_config(family)
    for name, value in changed.items():
        setattr(config, name, value)
    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    whole = reference(folder)
    sharded = place(str(folder), SPANS)
    calls: list[dict[str, Any]] = [
        {},
        {"labels": IDS},
        {"attention_mask": MASK, "labels": IDS},
        {"output_hidden_states": True},
    ]
    for call in calls:
        assert_equal(*(model(IDS, output_router_logits=True, **call) for model in (sharded, whole)))
    for model in (sharded, whole):
        model.config.output_router_logits = True
    for call in ({}, {"output_router_logits": None}, {"output_router_logits": False}):
        assert_equal(*(model(IDS, labels=IDS, **call) for model in (sharded, whole)))
    for model in (sharded, whole):  # transformers' own loss takes no mask of earlier tokens
        with pytest.raises(RuntimeError, match="must match the size"):
            model.generate(IDS, attention_mask=MASK, max_new_tokens=3)
