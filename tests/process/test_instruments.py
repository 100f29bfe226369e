"""`capture` and `intervene` do what hooks of the unsharded model do: bit for bit, in each step."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import lingualinked as ll
from both_models import compare
from families import reference, save_tiny
from instruments_by_hooks import ByHooks

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[0, 0, 1, 17, 93, 54, 8, 17], [1, 5, 6, 7, 8, 9, 10, 11]])
MASK = (IDS != 0).long()
SPANS = [("a", 0, 1), ("b", 1, 3), ("c", 3, 4)]
HIDDEN = 32
GENERATOR = torch.Generator().manual_seed(3)

Pair = tuple[Any, Any]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(
    request: pytest.FixtureRequest, shared_cluster: ll.Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """A model in three stages, and the unsharded one."""
    dtype = torch.bfloat16 if request.param == "gpt2" else torch.float32
    folder = save_tiny(request.param, dtype, tmp_path_factory.mktemp(request.param))
    plan = ll.Plan.from_spans(SPANS)
    with ll.ShardedModel.from_pretrained(str(folder), cluster=shared_cluster, plan=plan, progress=False) as sharded:
        yield sharded, ByHooks(reference(folder))


@pytest.fixture
def llama(sharded: Any, unsharded: Any) -> Pair:
    return sharded, ByHooks(unsharded)


def run(pair: Pair, experiment: Any) -> Any:
    """Run an experiment on both models, compare what it returns, and return it."""
    results = []
    for model in pair:
        torch.manual_seed(0)
        results.append(plain(experiment(model)))
    compare("result", *results)
    return results[0]


def plain(value: Any) -> Any:
    """Turn what was captured into dictionaries and lists of tensors."""
    if isinstance(value, dict) or hasattr(value, "untrusted"):
        return {path: list(tensors) for path, tensors in sorted(value.items())}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def layer_of(model: Any, index: int | str) -> str:
    return f"transformer.h.{index}" if model.config.model_type == "gpt2" else f"model.layers.{index}"


def attention_of(model: Any, index: int | str) -> str:
    return f"{layer_of(model, index)}.{'attn' if model.config.model_type == 'gpt2' else 'self_attn'}"


@torch.no_grad()
def test_a_capture_of_every_module(pair: Pair) -> None:
    for what in ("output", "input"):

        def capture(model: Any, what: str = what) -> Any:
            # Of the other ones, such as lists of layers, a forward pass calls none.
            with pair[0].capture([".".join("*" * depth) for depth in range(1, 6)], what=what) as captured:
                pass
            with model.capture(list(captured), what=what) as captured:
                model(IDS, attention_mask=MASK)
            return captured

        assert len(run(pair, capture)) > 40


CHOSEN: list[dict[str, Any]] = [
    {"positions": -1, "dtype": torch.float64},
    {"positions": slice(-3, None), "rows": [1, 0]},
    {"positions": slice(1, 10, 3)},
    {"positions": [4, 1, 9], "steps": "all"},
    {"positions": [2, 3], "steps": "prefill", "rows": slice(1, None)},
    {"positions": torch.tensor([[2, 7], [0, 5]]), "rows": [0, 1]},
    {"steps": "decode", "what": "input"},
    {"reduce": "mean", "dtype": torch.float32, "rows": 0},
    {"reduce": "sum", "positions": slice(2, None)},
    {"reduce": "norm", "positions": slice(0, None, 2)},
    {"reduce": "last"},
]


@pytest.mark.parametrize("chosen", CHOSEN, ids=str)
def test_captures_during_generate(pair: Pair, chosen: dict[str, Any]) -> None:
    def capture(model: Any) -> Any:
        with model.capture([f"{layer_of(model, '*')}.mlp", layer_of(model, "*")], **chosen) as captured:
            tokens = model.generate(IDS, attention_mask=MASK, max_new_tokens=4, min_new_tokens=4)
        return [captured, tokens]

    captured, _ = run(pair, capture)
    assert all(captured.values())


INTERVENTIONS: list[Any] = [
    ll.Add(9 * random(HIDDEN)),
    ll.Add(9 * random(HIDDEN), positions=-1),
    ll.Add(9 * random(2, 8, HIDDEN), steps="prefill"),
    ll.Add(random(2, 1, HIDDEN), positions=[9], what="input"),
    ll.Replace(random(HIDDEN), positions=[3, 5], rows=[1]),
    ll.Replace(random(2, 3, HIDDEN), positions=torch.tensor([[2, 3, 4], [0, 1, 2]]), steps="prefill"),
    ll.Replace(random(1), rows=-1, what="input"),
    ll.Scale(-1.5, positions=slice(4, None)),
    ll.Scale(random(HIDDEN), steps="decode"),
    ll.Ablate(),
    ll.Ablate(random(HIDDEN), positions=slice(-2, None), rows=slice(1)),
    ll.Project(random(3, HIDDEN)),
    ll.Project(random(HIDDEN).double(), "keep", positions=slice(None, None, 2)),
    ll.Clamp(-0.05, 0.05),
    ll.Clamp(high=-0.5, direction=random(HIDDEN), positions=-1),
    [ll.Add(random(HIDDEN)), ll.Clamp(-1.0, None), ll.Scale(2.0, positions=0), ll.Replace(random(HIDDEN), positions=1)],
]


@pytest.mark.parametrize("intervention", INTERVENTIONS, ids=lambda each: type(each).__name__)
def test_interventions_during_generate(pair: Pair, intervention: Any) -> None:
    """At a layer, an MLP and an attention, which returns a tuple; in the first stage, within one, and at its end."""

    def intervene(model: Any) -> Any:
        scores, captured = [], []
        paths = [layer_of(model, 0), attention_of(model, 2)]
        if model.config.model_type == "llama":
            paths += [f"{layer_of(model, 1)}.mlp", layer_of(model, 3)]
        for path in paths:
            with model.capture(layer_of(model, 3), what="input") as after, model.intervene({path: intervention}):
                scores.append(
                    model.generate(
                        IDS,
                        attention_mask=MASK,
                        max_new_tokens=4,
                        min_new_tokens=4,
                        output_scores=True,
                        return_dict_in_generate=True,
                    ).scores
                )
            captured.append(after)
        return [scores, captured]

    scores, _captured = run(pair, intervene)
    assert any(not torch.equal(torch.cat(each), torch.cat(scores[0])) for each in scores[1:])


MODES: list[dict[str, Any]] = [
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "num_return_sequences": 2},
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"prefill_chunk_size": 3},
]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_kind_of_generate(pair: Pair, mode: dict[str, Any]) -> None:
    def generate(model: Any) -> Any:
        interventions = {
            layer_of(model, "[12]"): ll.Add(torch.linspace(-9, 9, HIDDEN), positions=slice(5, None)),
            f"{layer_of(model, 3)}.mlp": ll.Ablate(positions=-1),
        }
        with model.intervene(interventions), model.capture(layer_of(model, "*"), positions=-1) as captured:
            tokens = model.generate(IDS, attention_mask=MASK, max_new_tokens=5, min_new_tokens=5, **mode)
        return [tokens, captured]

    run(pair, generate)


@torch.no_grad()
def test_blocks_and_hooks_at_one_module_run_in_a_stated_order(pair: Pair) -> None:
    """Hooks first, in torch's order; then blocks in theirs, of which captures see what was entered before them."""

    def nest(model: Any) -> Any:
        path, results = f"{layer_of(model, 1)}.mlp", []
        module = model.get_submodule(path)
        with contextlib.ExitStack() as blocks:
            # On the unsharded model the order of registration decides: there, hooks come first.
            blocks.enter_context(module.register_forward_hook(lambda _m, _a, output: output * 3))
            results.append(blocks.enter_context(model.capture(path)))
            blocks.enter_context(model.intervene({path: [ll.Add(torch.ones(HIDDEN)), ll.Scale(0.5, positions=-1)]}))
            results.append(blocks.enter_context(model.capture(path)))
            blocks.enter_context(model.intervene({path: ll.Clamp(-0.2, 0.2)}))
            results.append(blocks.enter_context(model.capture([layer_of(model, 1), path], what="output")))
            results.append(model(IDS, attention_mask=MASK, output_hidden_states=True).hidden_states)
        results.append(model(IDS, attention_mask=MASK).logits)
        return results

    run(pair, nest)
    sharded = pair[0]
    path = f"{layer_of(sharded, 1)}.mlp"
    with sharded.intervene({path: ll.Ablate()}), sharded.capture(path) as captured:
        seen: list[Tensor] = []
        with sharded.get_submodule(path).register_forward_hook(lambda _m, _a, output: seen.append(output.clone())):
            sharded(IDS, attention_mask=MASK)
    assert seen[0].any()  # though it was registered last
    assert not captured[path][0].any()


def test_each_thread_its_own(llama: Pair) -> None:
    sharded, whole = llama

    def steer(model: Any, index: int) -> Any:
        vector = torch.linspace(-index, index, HIDDEN)
        with (
            model.intervene({"model.layers.[12]": ll.Add(vector, positions=slice(2, None))}, scope="thread"),
            model.capture("model.layers.*", positions=-1, scope="thread") as captured,
        ):
            tokens = model.generate(IDS, attention_mask=MASK, max_new_tokens=6, min_new_tokens=6)
        return [tokens, plain(captured)]

    with ThreadPoolExecutor(8) as pool:
        ours = list(pool.map(lambda index: steer(sharded, index), range(8)))
    compare("result", ours, [steer(whole, index) for index in range(8)])


@torch.no_grad()
def test_one_session_alone_and_its_copies(llama: Pair) -> None:
    sharded, whole = llama
    cache = DynamicCache(config=sharded.config)
    change = {"model.layers.1": ll.Add(torch.ones(HIDDEN))}
    with sharded.intervene(change, scope=cache), sharded.capture("model.layers.2", scope=cache) as captured:
        sharded(IDS, past_key_values=cache)
        fork = copy.deepcopy(cache)
        other = sharded(IDS)
        step = sharded(IDS[:, :1], past_key_values=cache)
        step_of_fork = sharded(IDS[:, :1], past_key_values=fork)  # for which nothing is in force
        step_of_other = sharded(IDS[:, :1], past_key_values=other.past_key_values)
    assert [list(each.shape) for each in captured["model.layers.2"]] == [[2, 8, 32], [2, 1, 32]]
    again = sharded(IDS[:, :1], past_key_values=cache)
    with whole.intervene(change):
        past = whole(IDS).past_key_values
        past_of_fork = copy.deepcopy(past)
        assert torch.equal(step.logits, whole(IDS[:, :1], past_key_values=past).logits)
    assert torch.equal(again.logits, whole(IDS[:, :1], past_key_values=past).logits)
    assert torch.equal(step_of_fork.logits, whole(IDS[:, :1], past_key_values=past_of_fork).logits)
    past_of_other = whole(IDS).past_key_values
    assert torch.equal(step_of_other.logits, whole(IDS[:, :1], past_key_values=past_of_other).logits)


def test_under_migration(tiny_llama: str, place: Any, unsharded: Any) -> None:
    """Layers move between steps and beside them; the stages that they move to are told, and captures name them."""
    sharded, whole = place(tiny_llama, SPANS), ByHooks(unsharded)
    moved = [("b", 0, 2), ("d", 2, 4)]

    def generate(model: Any, between: Any = lambda step: None) -> Any:
        change = {"model.layers.*.mlp": ll.Add(torch.linspace(-3, 3, HIDDEN), positions=slice(1, None))}
        with torch.no_grad(), model.intervene(change), model.capture("model.layers.*", positions=-1) as captured:
            output, logits = model(IDS), []
            for step in range(8):
                between(step)
                output = model(IDS[:, step % 8, None], past_key_values=output.past_key_values)
                logits.append(output.logits)
        return logits, captured

    def move(step: int) -> None:
        if step in (2, 5):
            sharded.rebalance(ll.Plan.from_spans(moved if step == 2 else SPANS))

    theirs, kept = generate(whole)
    ours, captured = generate(sharded, move)
    compare("between", [ours, plain(captured)], [theirs, plain(kept)])
    assert captured.devices["model.layers.3"] == ("c", "d")
    assert captured.devices["model.layers.1"] == ("b",)
    # Beside the steps of three threads.
    with ThreadPoolExecutor(3) as pool:
        change = {"model.layers.*.mlp": ll.Add(torch.linspace(-3, 3, HIDDEN), positions=slice(1, None))}
        with sharded.intervene(change):
            texts = [
                pool.submit(sharded.generate, IDS, attention_mask=MASK, max_new_tokens=40, min_new_tokens=40)
                for _ in range(3)
            ]
            for spans in (moved, SPANS, moved):
                sharded.rebalance(ll.Plan.from_spans(spans))
            ours = [each.result() for each in texts]
        with whole.intervene(change):
            theirs = whole.generate(IDS, attention_mask=MASK, max_new_tokens=40, min_new_tokens=40)
    assert all(torch.equal(our, theirs) for our in ours)


@torch.no_grad()
def test_unchanged_instruments_cost_one_byte_and_captures_one_message(llama: Pair) -> None:
    sharded, _ = llama

    def received(cache: Any) -> list[int]:
        sharded(IDS[:, :1], past_key_values=cache)
        return [stage.sent_bytes for stage in cache.session.last_step.stages]

    cache = sharded(IDS).past_key_values
    received(cache)
    without = received(cache)
    with sharded.intervene({"model.layers.*": ll.Add(torch.ones(HIDDEN))}):
        told = received(cache)
        unchanged = received(cache)
    assert told[0] > without[0] + 4 * HIDDEN
    ended = received(cache)
    # Times are numbers of one to five bytes.
    assert all(abs(now - before) < 24 for each in (unchanged, ended) for now, before in zip(each, without, strict=True))


def test_what_has_no_effect_raises_by_name(llama: Pair) -> None:
    sharded, _ = llama
    vector = torch.ones(HIDDEN)
    for modules, complaint in {
        "model.layers.9": "did you mean",
        "model.layers": "never calls",
        "zzz": "named_modules",
        7: "not the path",
    }.items():
        with pytest.raises(ll.ArgumentError, match=complaint):
            sharded.capture(modules)
        with pytest.raises(ll.ArgumentError, match=complaint):
            sharded.intervene({modules: ll.Add(vector)})
    for arguments, complaint in (
        ({"positions": 1.5}, "positions=1.5 must be"),
        ({"positions": []}, "not empty"),
        ({"positions": 2**63}, "64 bits"),
        ({"rows": slice(0, 2**63)}, "64 bits"),
        ({"positions": torch.tensor([True, False])}, "must be an int"),
        ({"positions": True}, "must be an int"),
        ({"positions": slice(None, None, -1)}, "positive step"),
        ({"rows": [[0]]}, "rows="),
        ({"steps": "first"}, "'prefill' or 'decode'"),
        ({"what": "weights"}, "'input' or 'output'"),
        ({"dtype": torch.int64}, "dtype='int64'"),
        ({"reduce": "max"}, "reduce='max'"),
        ({"scope": "me"}, "past_key_values"),
        ({"max_bytes": "much"}, "max_bytes"),
    ):
        with pytest.raises(ll.ArgumentError, match=complaint):
            sharded.capture("model.layers.1", **arguments)
    with pytest.raises(ll.ArgumentError, match=r"lm_head, whose shape is \[rows, any, 128\]"):
        sharded.capture("lm_head", positions=-1)
    for interventions, complaint in (
        ({}, "must map paths"),
        ([ll.Add(vector)], "must map paths"),
        ({"model.layers.1": vector}, "of type Tensor"),
        ({"model.layers.1": ll.Add(torch.ones(33))}, r"\[33\] does not fit .* \[any, any, 32\]"),
        ({"model.layers.1": ll.Project(torch.ones(33))}, r"\[33, 1\] does not fit"),
        ({"model.layers.1": ll.Clamp(0, direction=torch.ones(31))}, r"\[31\] does not fit"),
        ({"model.layers.1": ll.Add(torch.ones(1, 1, 1, 32))}, "does not fit"),
        ({"model.embed_tokens": ll.Scale(2.0, what="input")}, "not floating-point"),
    ):
        with pytest.raises(ll.ArgumentError, match=complaint):
            sharded.intervene(interventions)
    with pytest.raises(ll.UnsupportedOperationError, match="every stage runs for itself"):
        sharded.intervene({"model.rotary_emb": ll.Scale(2.0)})
    with sharded.capture("model.layers.1") as captured, pytest.raises(ll.ArgumentError, match="was not captured"):
        _ = captured["model.layers.2"]
    with pytest.raises(ll.ArgumentError, match="nothing was captured"):
        captured["model.layers.1"].cat()
    block = sharded.capture("model.layers.1")
    with block, pytest.raises(ll.ArgumentError, match="open already"), block:
        pass


@torch.no_grad()
def test_a_step_that_can_not_be_made_raises_before_it_is_sent(llama: Pair) -> None:
    sharded, whole = llama
    cache = sharded(IDS).past_key_values
    for block, complaint in (
        (sharded.capture("model.layers.1", positions=-3), "position -3 .* 1 token.*prefill"),
        (sharded.capture("model.layers.1", rows=2), "row 2 is not in a step of 2 rows"),
        (sharded.capture("model.layers.1", positions=[[1], [2], [3]], rows=slice(2)), "for 3 rows, and 2 of"),
        (sharded.capture("model.layers.1", max_bytes=255), "would add 256 B.*max_bytes"),
        (sharded.intervene({"model.layers.1": ll.Add(torch.ones(3, 32))}), r"\[3, 32\] does not fit .*\[2, 1, 32\]"),
    ):
        with pytest.raises(ll.ArgumentError, match=complaint), block:
            sharded(IDS[:, :1], past_key_values=cache)
    for block in (
        sharded.capture("model.layers.1", positions=[2, 99]),
        sharded.intervene({"model.layers.1": ll.Ablate(positions=99)}),
    ):
        with pytest.raises(ll.ArgumentError, match=r"positions=\[99\] at model.layers.1 were in no step"), block:
            sharded(IDS)
    ours = sharded(IDS[:, :1], past_key_values=cache)  # it goes on as it was
    theirs = whole(IDS[:, :1], past_key_values=whole(IDS).past_key_values)
    assert torch.equal(ours.logits, theirs.logits)


@torch.no_grad()
def test_layers_that_are_skipped_capture_nothing_and_those_behind_move_up(
    tiny_llama: str, place: Any, unsharded: Any
) -> None:
    sharded, whole = place(tiny_llama, SPANS), ByHooks(copy.deepcopy(unsharded))

    def look(model: Any) -> Any:
        change = {"model.layers.1": ll.Add(torch.ones(HIDDEN))}
        with model.intervene(change), model.capture("model.layers.*.mlp") as captured:
            logits = model(IDS, use_cache=False).logits
        return [logits, captured]

    for model in (sharded, whole):
        del model.model.layers[1]
    _, captured = run((sharded, whole), look)
    assert list(captured) == [f"model.layers.{index}.mlp" for index in range(3)]
    sharded.model.layers[0] = torch.nn.Identity()
    del whole.model.layers[0]  # an Identity refuses what a Llama passes to its layers
    with sharded.capture("model.layers.*") as captured:
        ours = sharded(IDS, use_cache=False).logits
    assert list(captured) == ["model.layers.1", "model.layers.2"]
    assert torch.equal(ours, whole(IDS, use_cache=False).logits)


def test_gradients_flow_through_interventions(llama: Pair) -> None:
    sharded, whole = llama
    embeddings = random(2, 8, HIDDEN)
    change = {
        "model.layers.1": ll.Add(random(HIDDEN)),
        "model.layers.2.mlp": [ll.Project(random(HIDDEN)), ll.Scale(3.0)],
    }

    def attribute(model: Any) -> Any:
        inputs = embeddings.clone().requires_grad_()
        with model.intervene(change), model.capture("model.layers.3", what="input") as captured:
            logits = model(inputs_embeds=inputs, use_cache=False).logits
        logits[:, -1].square().sum().backward()
        kept = {path: [tensor.detach() for tensor in tensors] for path, tensors in captured.items()}
        return [logits.detach(), inputs.grad, kept]

    _, gradient, _ = run((sharded, whole), attribute)
    assert gradient.any()


@pytest.mark.parametrize(
    "change",
    [
        ll.Add,
        ll.Project,
        lambda vector: ll.Clamp(0, direction=vector),
        lambda vector: ll.Scale(vector.sum()),
    ],
)
def test_a_vector_that_should_learn_is_refused_where_gradients_may_flow(llama: Pair, change: Any) -> None:
    sharded, whole = llama
    vector = random(HIDDEN)
    with sharded.intervene({"model.layers.1": change(vector.clone().requires_grad_())}):
        with pytest.raises(
            ll.UnsupportedOperationError, match=r"at 'model.layers.1' has a tensor that requires gradients.*detach"
        ):
            sharded(IDS)
        with torch.no_grad():
            ours = sharded(IDS).logits
    with torch.no_grad(), whole.intervene({"model.layers.1": change(vector)}):
        assert torch.equal(ours, whole(IDS).logits)


@torch.no_grad()
def test_a_block_that_was_dropped_ends_with_a_warning(llama: Pair) -> None:
    sharded, whole = llama
    block = sharded.intervene({"model.layers.1": ll.Scale(0.0)})
    block.__enter__()
    assert not torch.equal(sharded(IDS).logits, whole(IDS).logits)
    with pytest.warns(ResourceWarning, match="before its end"):
        del block
    assert torch.equal(sharded(IDS).logits, whole(IDS).logits)
    sharded.capture("model.layers.1")  # one that was never entered has nothing to end


@torch.no_grad()
@pytest.mark.parametrize("what", ["input", "output"])
def test_a_step_with_embeddings_calls_other_modules(pair: Pair, what: str) -> None:
    embeddings = pair[1].get_input_embeddings()(IDS)
    table = next(path for path, module in pair[0].named_modules() if module is pair[0].get_input_embeddings())

    def look(model: Any) -> Any:
        with (
            model.capture([table, layer_of(model, "*")], what=what) as captured,
            model.intervene({table: ll.Scale(0.5)}),
        ):
            return [
                model(IDS, use_cache=False).logits,
                model(inputs_embeds=embeddings, use_cache=False).logits,
                captured,
            ]

    _, _, captured = run(pair, look)
    assert (len(captured[table]), len(captured[layer_of(pair[0], 1)])) == (1, 2)


@torch.no_grad()
def test_hidden_states_contain_interventions_whatever_was_called_before(llama: Pair) -> None:
    sharded, _ = llama
    for _ in range(2):
        with sharded.capture("model.layers.1") as before, sharded.intervene({"model.layers.1": ll.Ablate()}):
            states = sharded(IDS, output_hidden_states=True).hidden_states
        assert not states[2].any()
        assert before["model.layers.1"][0].any()
