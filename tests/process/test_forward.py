"""A sharded model is the transformers model that it shards, called and asked as transformers' own is."""

from __future__ import annotations

import copy
import pickle  # noqa: TID251 - to see that it is refused
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import accelerators
import lingualinked as ll
from accelerators import embed
from families import reference, save_tiny

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[1, 17, 93, 54, 8, 17, 93], [1, 5, 6, 7, 8, 9, 10]])
PADDING = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
LABELS = torch.where(PADDING == 1, IDS, -100)
CAUSAL = torch.ones(7, 7).tril().bool()
HOLED = CAUSAL & ~torch.eye(7).roll(2, 0).bool()  # each token sees those before it, but for the last but one

CALLS: dict[str, dict[str, Any]] = {
    "ids": {},
    "int32 ids": {"input_ids": IDS.int()},
    "embeddings": {"input_ids": None, "inputs_embeds": torch.randn(2, 7, 32)},
    "padding": {"attention_mask": PADDING},
    "padding in booleans": {"attention_mask": PADDING.bool()},
    "padding in floats": {"attention_mask": PADDING.float()},
    "4-D mask": {"attention_mask": HOLED[None, None].expand(2, -1, -1, -1)},
    "4-D additive mask": {"attention_mask": torch.zeros(2, 1, 7, 7).masked_fill(~HOLED, torch.finfo().min)},
    "positions": {"position_ids": torch.arange(4, 11)[None]},
    "positions of each row": {"position_ids": torch.stack([torch.arange(7), torch.arange(3, 10)])},
    "packed rows": {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), "use_cache": False},
    "padding and positions": {"attention_mask": PADDING, "position_ids": (PADDING.cumsum(-1) - 1).clamp(0)},
    "last logits": {"logits_to_keep": 2},
    "last logit": {"logits_to_keep": True},
    "some logits": {"logits_to_keep": torch.tensor([0, 3, 6])},
    "some logits of each row": {"logits_to_keep": torch.tensor([[0, 3], [4, 6]])},
    "logits in a mask": {"logits_to_keep": PADDING.bool()},
    "labels": {"labels": IDS},
    "ignored labels": {"labels": LABELS, "attention_mask": PADDING},
    "labels alone": {"labels": torch.full_like(IDS, -100)},
    "labels in one row": {"labels": IDS.flatten()},
    "labels of the last logits": {"labels": IDS[:, 4:], "logits_to_keep": 3},
    "a sum over labels": {"labels": LABELS, "num_items_in_batch": torch.tensor(5)},
    "a number of labels": {"labels": LABELS, "num_items_in_batch": 11},
    "labels that are shifted": {"labels": IDS, "shift_labels": IDS.roll(-1, 1)},
    "another label to ignore": {"labels": torch.where(PADDING == 1, IDS, 0), "ignore_index": 0},
    "arguments of a loss that is not asked for": {"num_items_in_batch": 11, "shift_labels": IDS, "ignore_index": 0},
    "positions in the KV cache": {"cache_position": torch.arange(7)},
    "one mask for all rows": {"attention_mask": HOLED[None, None]},
    "a mask of each head": {"attention_mask": HOLED[None, None].expand(2, 4, -1, -1)},
    "one position for all": {"position_ids": torch.tensor([[3]])},
    "a tuple": {"return_dict": False},
    "a tuple with a loss": {"return_dict": False, "labels": LABELS, "use_cache": False},
    "without KV": {"use_cache": False},
    "outputs that are not asked for": {"output_attentions": False, "output_hidden_states": False},
}


def run(model: Any, **arguments: Any) -> Any:
    with torch.no_grad():
        return model(**{"input_ids": IDS, **arguments})


def assert_equal(ours: Any, theirs: Any) -> None:
    """Compare outputs, KV aside."""
    ours, theirs = (list(each.values() if hasattr(each, "values") else each) for each in (ours, theirs))
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert isinstance(mine, torch.Tensor) == isinstance(other, torch.Tensor)
        if isinstance(other, torch.Tensor):
            assert mine.dtype == other.dtype
            assert torch.equal(mine, other) or (mine.isnan().all() and other.isnan().all())


@pytest.mark.parametrize("call", CALLS)
def test_forward_is_that_of_transformers(sharded: Any, unsharded: PreTrainedModel, call: str) -> None:
    ours, theirs = (run(model, **CALLS[call]) for model in (sharded, unsharded))
    assert type(ours) is type(theirs)
    assert isinstance(ours, CausalLMOutputWithPast | tuple)
    assert_equal(ours, theirs)


def test_past_goes_on_over_several_calls(sharded: Any, unsharded: PreTrainedModel) -> None:
    parts = torch.randint(3, 128, (2, 12)).split([5, 1, 4, 2], dim=-1)
    for mask in (None, torch.cat([PADDING, torch.ones(2, 5, dtype=torch.long)], dim=-1)):
        outputs: list[list[Any]] = []
        for model in (sharded, unsharded):
            past, length = None, 0
            outputs.append([])
            for ids in parts:
                length += ids.shape[1]
                part = run(
                    model,
                    input_ids=ids,
                    past_key_values=past,
                    attention_mask=None if mask is None else mask[:, :length],
                )
                past = part.past_key_values
                assert past.get_seq_length() == length
                outputs[-1].append(part)
            assert len(past) == 4
        for ours, theirs in zip(*outputs, strict=True):
            assert_equal(ours, theirs)


def test_past_without_use_cache_goes_on_too(sharded: Any, unsharded: PreTrainedModel) -> None:
    for model in (sharded, unsharded):
        past = run(model).past_key_values
        assert run(model, past_key_values=past, use_cache=False).past_key_values is past
        assert past.get_seq_length() == 14


def test_edits_of_the_past(sharded: Any, unsharded: PreTrainedModel) -> None:
    after = []
    for model in (sharded, unsharded):
        past = run(model).past_key_values
        past.crop(-3)
        past.batch_repeat_interleave(2)
        past.batch_select_indices(torch.tensor([3, 0, 1]))
        past.reorder_cache(torch.tensor([1, 2, 0]))
        past.crop(0)
        after.append(run(model, input_ids=IDS[:1].repeat(3, 1), past_key_values=past))
    assert_equal(*after)


def test_arguments_in_order(sharded: Any, unsharded: PreTrainedModel) -> None:
    positions = (PADDING.cumsum(-1) - 1).clamp(0)
    assert_equal(*(model(IDS, PADDING, positions, None, None, LABELS) for model in (sharded, unsharded)))


@pytest.fixture(scope="module", params=["falcon-7b", "gemma2", "gpt2", "mixtral", "opt"])
def pair(
    request: pytest.FixtureRequest, shared_cluster: ll.Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, PreTrainedModel]]:
    """A family with peculiar outputs or arguments, sharded and not."""
    folder = save_tiny(request.param, torch.bfloat16, tmp_path_factory.mktemp(request.param))
    plan = ll.Plan.from_spans([("a", 0, 2), ("b", 2, 4)])
    with ll.ShardedModel.from_pretrained(folder, cluster=shared_cluster, plan=plan, progress=False) as model:
        yield model, reference(folder)


def test_loss_and_order_of_arguments_of_other_families(pair: tuple[Any, PreTrainedModel]) -> None:
    assert_equal(*(list(run(model, labels=LABELS, attention_mask=PADDING).values())[:2] for model in pair))
    second = "past_key_values" if pair[1].config.model_type in ("falcon", "gpt2") else "attention_mask"
    argument = None if second == "past_key_values" else PADDING
    assert_equal(*(list(model(IDS, argument).values())[:1] for model in pair))


def test_size_of_other_families(pair: tuple[Any, PreTrainedModel]) -> None:
    assert_same_size(*pair)


def assert_same_size(ours: Any, theirs: PreTrainedModel) -> None:
    for ask in (
        lambda model: model.get_memory_footprint(),
        lambda model: model.get_memory_footprint(return_buffers=False),
        lambda model: model.num_parameters(),
        lambda model: model.num_parameters(exclude_embeddings=True),
        lambda model: {name: each.shape for name, each in model.named_parameters()},
        lambda model: [name for name, _ in model.named_modules()],
        lambda model: model.dtype,
    ):
        assert ask(ours) == ask(theirs)


def test_it_is_the_transformers_model(sharded: Any, unsharded: PreTrainedModel) -> None:
    assert isinstance(sharded, LlamaForCausalLM)
    assert isinstance(sharded, ll.ShardedModel)
    assert type(sharded).__name__ == "LlamaForCausalLM"
    assert type(sharded).__module__ == LlamaForCausalLM.__module__
    for name in ("main_input_name", "base_model_prefix", "training", "dtype", "device", "input_modalities"):
        assert getattr(sharded, name) == getattr(unsharded, name)
    assert sharded.can_generate()
    assert sharded.config.to_dict() == unsharded.config.to_dict()
    assert sharded.generation_config == unsharded.generation_config
    assert sharded.generation_config.eos_token_id == 2
    assert sharded.eval() is sharded
    assert sharded.train(False) is sharded
    assert sharded.requires_grad_(False) is sharded
    assert_same_size(sharded, unsharded)


def test_device_map_names_each_part(sharded: Any) -> None:
    parts = ["model.embed_tokens", *(f"model.layers.{index}" for index in range(4)), "model.norm", "lm_head"]
    assert sharded.hf_device_map == {"": "cpu"} | dict.fromkeys(parts, accelerators.chosen)
    for name in parts:
        sharded.get_submodule(name)


REFUSED_CALLS: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "cu_seq_lens_q": (ll.UnsupportedOperationError, {"cu_seq_lens_q": torch.tensor([0, 7])}),
    "is_causal": (ll.UnsupportedOperationError, {"is_causal": False}),
    "cache_position": (ll.UnsupportedOperationError, {"cache_position": torch.arange(1, 8)}),
    "cache_position is a range": (ll.ArgumentError, {"cache_position": range(7)}),
    "output_router_logits": (ll.UnsupportedOperationError, {"output_router_logits": True}),
    "token_type_ids": (ll.ArgumentError, {"token_type_ids": IDS}),  # Llama has none
    "past_key_values is a tuple": (ll.UnsupportedOperationError, {"past_key_values": ()}),
    "attention_mask as a mapping": (ll.UnsupportedOperationError, {"attention_mask": {"full_attention": None}}),
    "attention_mask of shape": (ll.ArgumentError, {"attention_mask": PADDING[None]}),
    "position_ids is a list": (ll.ArgumentError, {"position_ids": [0, 1]}),
    "labels is a list": (ll.ArgumentError, {"labels": IDS.tolist()}),
    "logits_to_keep": (ll.ArgumentError, {"logits_to_keep": "all"}),
    "input_ids is a list": (ll.ArgumentError, {"input_ids": IDS.tolist()}),
    "input_ids is a ndarray": (ll.ArgumentError, {"input_ids": IDS.numpy()}),
    "input_ids of shape": (ll.ArgumentError, {"input_ids": IDS[0]}),
    "input_ids have dtype": (ll.ArgumentError, {"input_ids": IDS.to(torch.complex64)}),
    "inputs_embeds of shape": (ll.ArgumentError, {"input_ids": None, "inputs_embeds": torch.zeros(2, 7, 33)}),
    "inputs_embeds have dtype": (ll.ArgumentError, {"input_ids": None, "inputs_embeds": torch.ones(2, 7, 32).long()}),
    "labels range from": (ll.ArgumentError, {"labels": torch.full_like(IDS, 128)}),
    "labels of shape": (ll.ArgumentError, {"labels": IDS[:, 1:]}),
    "labels of shape .* 2 rows x 1 token: ": (ll.ArgumentError, {"labels": IDS, "logits_to_keep": 1}),
    "input_ids or inputs_embeds": (ll.ArgumentError, {"input_ids": None}),
    "colour": (ll.ArgumentError, {"colour": "red"}),
}


@pytest.mark.parametrize("match", REFUSED_CALLS)
def test_what_forward_does_not_do_is_refused_by_name(sharded: Any, match: str) -> None:
    error, arguments = REFUSED_CALLS[match]
    with pytest.raises(error, match=match):
        run(sharded, **arguments)


@pytest.mark.parametrize(
    "shape",
    [
        (),
        (7,),
        (1, 7),
        (3, 7),
        (2, 6),
        (2, 8),
        (2, 0),
        (2, 7, 7),
        (3, 1, 7, 7),
        (2, 1, 7, 8),
        (2, 3, 7, 7),
        (2, 1, 6, 7),
    ],
)
def test_a_mask_of_another_shape_is_refused_before_it_is_sent(sharded: Any, shape: tuple[int, ...]) -> None:
    past = run(sharded, input_ids=IDS[:, :3]).past_key_values
    with pytest.raises(ll.ArgumentError, match="attention_mask of shape"):
        run(sharded, input_ids=IDS[:, 3:], past_key_values=past, attention_mask=torch.ones(shape))
    with pytest.raises(ll.ArgumentError, match="attention_mask of shape"):
        run(sharded, attention_mask=torch.ones(shape).bool())
    assert run(sharded, input_ids=IDS[:, 3:], past_key_values=past).logits.shape == (2, 4, 128)


@pytest.mark.parametrize("shape", [(), (7,), (3, 7), (1, 6), (2, 8), (1, 2, 7)])
def test_positions_of_another_shape_are_refused_before_they_are_sent(sharded: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ll.ArgumentError, match="position_ids of shape"):
        run(sharded, position_ids=torch.zeros(shape, dtype=torch.long))


META = torch.ones(2, 7, dtype=torch.long, device="meta")


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_ids": META},
        {"attention_mask": META},
        {"position_ids": META},
        {"labels": META},
        {"labels": IDS, "shift_labels": META},
        {"labels": IDS, "num_items_in_batch": META.sum()},
        {"logits_to_keep": META[0]},
        {"cache_position": META[0]},
        {"input_ids": None, "inputs_embeds": torch.ones(2, 7, 32, device="meta")},
    ],
)
def test_what_has_no_data_is_refused_by_name(sharded: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(ll.ArgumentError, match=f"^{list(arguments)[-1]} is on the meta device"):
        run(sharded, **arguments)


def test_a_loss_function_of_the_users_own_takes_any_labels(sharded: Any, unsharded: PreTrainedModel) -> None:
    def soft_loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits.view(-1, vocab_size), labels.view(-1, vocab_size))

    labels = torch.rand(2, 7, 128)
    losses = []
    for model in (sharded, unsharded):
        model.loss_function = soft_loss
        try:
            losses.append(run(model, labels=labels).loss)
        finally:
            del model._loss_function
    assert torch.equal(*losses)


def test_token_types_of_a_family_that_has_them(pair: tuple[Any, PreTrainedModel]) -> None:
    known = pair[1].config.model_type == "gpt2"
    with pytest.raises(ll.UnsupportedOperationError if known else ll.ArgumentError, match="token_type_ids"):
        run(pair[0], token_type_ids=torch.zeros_like(IDS))


def test_gradients_of_a_mask_are_refused(sharded: Any, unsharded: PreTrainedModel) -> None:
    embeddings = embed(unsharded, IDS)
    with pytest.raises(ll.UnsupportedOperationError, match="attention_mask requires gradients"):
        sharded(inputs_embeds=embeddings, attention_mask=torch.ones(IDS.shape, requires_grad=True))
    assert not run(sharded, input_ids=None, inputs_embeds=embeddings).logits.requires_grad


def test_past_of_another_model_or_of_other_rows(sharded: Any, pair: tuple[Any, PreTrainedModel]) -> None:
    past = run(pair[0]).past_key_values
    with pytest.raises(ll.ArgumentError, match="belong to another model"):
        run(sharded, past_key_values=past)
    with pytest.raises(ll.ArgumentError, match="KV of 2 rows, and this step has 1"):
        run(pair[0], input_ids=IDS[:1], past_key_values=past)
    assert run(pair[0], past_key_values=past).logits.shape[:2] == (2, 7)  # refusing did it no harm


def test_what_the_past_does_not_do(sharded: Any) -> None:
    past = run(sharded).past_key_values
    for use in (
        lambda: past.layers,
        lambda: past.is_sliding,
        lambda: past.get_mask_sizes(1, 0),
        lambda: past.update(None, None, 0),
        lambda: copy.copy(past),
        lambda: pickle.dumps(past),
    ):
        with pytest.raises(ll.UnsupportedOperationError, match="sharded"):
            use()
    for number in (1, -8):
        with pytest.raises(ll.ArgumentError, match="minus the number"):
            past.crop(number)
    past.end()
    with pytest.raises(ll.ClosedError, match="past_key_values=None"):
        run(sharded, past_key_values=past)


def test_what_needs_layers_or_writes_weights_refuses_to_be_used(sharded: Any) -> None:
    for use in (lambda: sharded.model(IDS), lambda: sharded.lm_head.load_state_dict({})):
        with pytest.raises(ll.UnsupportedOperationError, match="its layers run in the workers"):
            use()


def test_a_model_is_neither_copied_nor_pickled(sharded: Any, tmp_path: Any) -> None:
    for use in (copy.copy, copy.deepcopy, pickle.dumps, lambda model: torch.save(model, tmp_path / "model.pt")):
        for of_this_process in (sharded, sharded.cluster):
            with pytest.raises(ll.UnsupportedOperationError, match="can't be pickled or copied"):
                use(of_this_process)


def test_generation_config_of_the_file_and_of_the_user(sharded: Any) -> None:
    changed = copy.deepcopy(sharded.generation_config)
    assert isinstance(changed, GenerationConfig)
    before = sharded.generation_config
    try:
        changed.max_new_tokens = 3
        sharded.generation_config = changed
        assert sharded.generate(IDS[:1], eos_token_id=None).shape == (1, 10)
    finally:
        sharded.generation_config = before
