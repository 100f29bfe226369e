"""Hooks on submodules of a sharded model do what they do on the unsharded one: bit for bit, in ``forward`` and ``generate``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lingualinked as ll
from families import reference, save_tiny

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[0, 0, 1, 17, 93, 54, 8, 17], [1, 5, 6, 7, 8, 9, 10, 11]])
MASK = (IDS != 0).long()

SPANS = [("a", 0, 1), ("b", 1, 3), ("c", 3, 4)]

Pair = tuple[Any, Any]


@pytest.fixture(scope="module", params=["llama", "gpt2", "bloom", "gemma2", "mixtral"])
def pair(
    request: pytest.FixtureRequest, shared_cluster: ll.Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """A model in three stages, and the unsharded one."""
    folder = save_tiny(request.param, torch.float32, tmp_path_factory.mktemp(request.param))
    plan = ll.Plan.from_spans([("a", 0, 1), ("b", 1, 3), ("c", 3, 4)])
    with ll.ShardedModel.from_pretrained(str(folder), cluster=shared_cluster, plan=plan, progress=False) as sharded:
        yield sharded, reference(folder)


def layers_of(model: Any) -> Any:
    return model.get_submodule("transformer.h" if hasattr(model, "transformer") else "model.layers")


def attention_of(layer: Any) -> Any:
    return next(module for name, module in layer.named_children() if name in ("self_attn", "attn", "self_attention"))


def mlp_of(layer: Any) -> Any:
    return layer.block_sparse_moe if hasattr(layer, "block_sparse_moe") else layer.mlp


def flat(value: Any) -> list[Any]:
    """List what a structure holds: copies of tensors, plain values, and the names of other objects' types."""
    if isinstance(value, Tensor):
        return [value.clone()]
    if isinstance(value, tuple | list):
        return [each for item in value for each in flat(item)]
    if isinstance(value, dict):
        return [each for key, item in value.items() for each in (key, *flat(item))]
    return [value] if isinstance(value, int | float | str | None) else ["object"]


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    where = ""
    for our, their in zip(ours, theirs, strict=False):
        assert type(our) is type(their), (where, our, their)
        assert torch.equal(our, their) if isinstance(their, Tensor) else our == their, (where, our, their)
        where += f" {their}" if isinstance(their, str) else ""
    assert len(ours) == len(theirs)


def compare(pair: Pair, experiment: Callable[[Any], Any]) -> None:
    """Compare what an experiment returns of both models."""
    ours, theirs = (flat(experiment(model)) for model in pair)
    assert_same(ours, theirs)


@torch.no_grad()
def test_hooks_see_what_every_module_is_called_with_and_returns(pair: Pair) -> None:
    def observe(model: Any) -> list[Any]:
        seen: list[Any] = []
        handles = []
        for path, module in model.named_modules():

            def before(_: Any, args: Any, kwargs: Any, path: str = path) -> None:
                seen.extend([f"before {path}", *flat(args), *flat(dict(sorted(kwargs.items())))])

            def after(_: Any, args: Any, output: Any, path: str = path) -> None:
                seen.extend([f"after {path}", *flat(args), *flat(output)])

            handles += [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
        logits = model(IDS, attention_mask=MASK).logits
        for handle in handles:
            handle.remove()
        num_seen = len(seen)
        again = model(IDS, attention_mask=MASK).logits
        assert len(seen) == num_seen
        return [logits, again, *seen]

    compare(pair, observe)


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def with_first(output: Any, value: Tensor) -> Any:
    return value if isinstance(output, Tensor) else (value, *output[1:])


@torch.no_grad()
def test_ablation_by_return_value_and_in_place(pair: Pair) -> None:
    def replace(_module: Any, _args: Any, output: Any) -> Any:
        return with_first(output, first(output) * 0)

    def change(_module: Any, _args: Any, output: Any) -> None:
        first(output).zero_()

    def ablate(model: Any) -> list[Any]:
        logits = []
        for hook in (replace, change):
            for module in (mlp_of(layers_of(model)[2]), attention_of(layers_of(model)[2]), layers_of(model)[0]):
                with module.register_forward_hook(hook):
                    logits.append(model(IDS, attention_mask=MASK).logits)
        return logits

    compare(pair, ablate)


@torch.no_grad()
def test_pre_hooks_change_arguments(pair: Pair) -> None:
    def scale(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            return (2 * args[0], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": 2 * kwargs["hidden_states"]}

    def shift_in_place(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        states += 0.5

    def single(_module: Any, args: Any) -> Any:
        return args[0].flip(1)

    def drop_mask(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])

    def change(model: Any) -> list[Any]:
        layers = layers_of(model)
        logits = []
        for module, hook, options in (
            (next(each for each in layers[1].modules() if "Norm" in type(each).__name__), single, {}),
            (layers[2], shift_in_place, {"with_kwargs": True}),
            (layers[3], scale, {"with_kwargs": True}),
            (attention_of(layers[2]), drop_mask, {"with_kwargs": True}),
            (attention_of(layers[1]), shift_in_place, {"with_kwargs": True}),
        ):
            with module.register_forward_pre_hook(hook, **options):
                logits.append(model(IDS, attention_mask=MASK).logits)
        return logits

    compare(pair, change)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_steering_during_generate(pair: Pair, mode: dict[str, Any]) -> None:
    def steer(model: Any) -> list[Any]:
        shapes = []

        def add(_module: Any, _args: Any, output: Any) -> Any:
            states = first(output)
            shapes.append(list(states.shape))
            vector = torch.linspace(-9, 9, states.shape[-1])
            return with_first(output, states + vector * torch.arange(1, len(states) + 1)[:, None, None])

        torch.manual_seed(0)
        with layers_of(model)[1].register_forward_hook(add):
            tokens = model.generate(IDS, attention_mask=MASK, max_new_tokens=5, min_new_tokens=5, **mode)
        return [tokens, shapes]

    compare(pair, steer)


@torch.no_grad()
def test_activation_patching(pair: Pair) -> None:
    """What one prompt has at a layer takes the place of another's, position by position."""

    def patch(model: Any) -> list[Any]:
        kept: list[Tensor] = []
        with layers_of(model)[1].register_forward_hook(lambda _m, _a, output: kept.append(first(output))):
            model(IDS[:1])
        logits = []
        for position in range(3):

            def put(_module: Any, _args: Any, output: Any, position: int = position) -> Any:
                states = first(output).clone()
                states[:, position] = kept[0][:, position]
                return with_first(output, states)

            with layers_of(model)[1].register_forward_hook(put):
                logits.append(model(IDS[1:]).logits)
        return logits

    compare(pair, patch)


@torch.no_grad()
def test_several_hooks_run_in_torchs_order(pair: Pair) -> None:
    def run(model: Any) -> list[Any]:
        called: list[Any] = []
        handles: dict[str, Any] = {}
        layers = layers_of(model)

        def note(name: str) -> Callable[..., None]:
            return lambda *args: called.append((name, len(args)))

        def removes_itself(*_: Any) -> None:
            called.append("once")
            handles["once"].remove()

        def registers(_module: Any, _args: Any, output: Any) -> None:
            called.append("registers")
            if "later" not in handles:
                handles["later"] = layers[3].register_forward_hook(note("later"))
                handles["removed"].remove()

        handles["a"] = layers[2].register_forward_hook(note("a"))
        handles["b"] = layers[2].register_forward_hook(note("b"), prepend=True, with_kwargs=True)
        handles["c"] = layers[2].register_forward_pre_hook(note("c"))
        handles["d"] = layers[2].register_forward_pre_hook(note("d"), prepend=True, with_kwargs=True)
        handles["always"] = layers[0].register_forward_hook(note("always"), always_call=True)
        handles["once"] = layers[1].register_forward_hook(removes_itself)
        handles["removed"] = layers[3].register_forward_pre_hook(note("removed"))
        handles["registers"] = layers[1].register_forward_hook(registers)
        model(IDS)
        model(IDS)
        for handle in handles.values():
            handle.remove()
        model(IDS)
        return called

    compare(pair, run)


class OwnError(Exception):
    pass


@torch.no_grad()
def test_an_exception_in_a_hook_is_raised_by_the_call(pair: Pair) -> None:
    def run(model: Any) -> list[Any]:
        called: list[str] = []
        layers, error = layers_of(model), OwnError("mine")

        def fail(*_: Any) -> None:
            raise error

        def always(_module: Any, _args: Any, output: Any) -> None:
            called.append(f"always {output is None}")

        with (
            mlp_of(layers[2]).register_forward_hook(fail),
            layers[2].register_forward_hook(always, always_call=True),
            layers[2].register_forward_hook(lambda *_: called.append("never")),
            layers[1].register_forward_hook(lambda *_: called.append("earlier layer")),
            pytest.raises(OwnError) as raised,
        ):
            model(IDS)
        assert raised.value is error
        return [called, model(IDS).logits]

    compare(pair, run)


@pytest.fixture
def llama(sharded: Any, unsharded: Any) -> Pair:
    return sharded, unsharded


@torch.no_grad()
def test_one_stage_runs_everything(place: Any, tiny_llama: str, unsharded: Any) -> None:
    def see(model: Any) -> list[Any]:
        seen: list[Any] = []
        for name in ("model.embed_tokens", "model.rotary_emb", "model.layers.3", "model.norm", "model", "lm_head"):
            hook = model.get_submodule(name).register_forward_hook(lambda _m, _a, output: seen.append(flat(output)))
            with hook:
                model(IDS)
        return seen

    compare((place(tiny_llama, [("a", 0, 4)]), unsharded), see)


@torch.no_grad()
def test_hooks_behind_what_every_stage_runs_are_called_once(llama: Pair) -> None:
    def count(model: Any) -> list[Any]:
        seen: list[Any] = []

        def keep(_module: Any, _args: Any, output: Any) -> Any:
            seen.append(flat(output))
            return output[0] * len(seen), output[1]

        with model.model.rotary_emb.register_forward_hook(keep):
            logits = [model(IDS).logits, model.generate(IDS, attention_mask=MASK, max_new_tokens=3)]
        return [*logits, *seen]

    compare(llama, count)


@pytest.mark.parametrize("family", ["opt", "gpt-neox"])
@torch.no_grad()
def test_an_expanded_tensor_stays_one(family: str, place: Any, tmp_path: Path) -> None:
    """Products of it take another way than those of a dense one, with other last bits."""
    folder = save_tiny(family, torch.bfloat16, tmp_path)
    sharded = place(str(folder), [("a", 0, 2), ("b", 2, 4)])

    def share(model: Any) -> list[Any]:
        logits = []
        for name, module in model.named_modules():
            if name.endswith(
                ("2.self_attn.out_proj", "2.attention.dense", "3.self_attn.out_proj", "3.attention.dense")
            ):
                with module.register_forward_pre_hook(lambda _m, args: (args[0].mean(0, True).expand_as(args[0]),)):
                    logits.append(model(IDS).logits)
        assert len(logits) == 2
        return logits

    compare((sharded, reference(folder)), share)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mixtral"])
@torch.no_grad()
def test_outputs_are_recorded_between_hooks_as_by_transformers(family: str, place: Any, tmp_path: Path) -> None:
    """Its hooks, which record, are registered in the first call that asks for outputs."""
    folder = save_tiny(family, torch.float32, tmp_path)
    eager = {"attn_implementation": "eager"}
    pair = place(str(folder), SPANS, **eager), reference(folder, **eager)
    asked = {"output_hidden_states": True, "output_attentions": True}
    asked |= {"output_router_logits": True} if family == "mixtral" else {}

    def change(_module: Any, _args: Any, output: Any) -> Any:
        return output * 2 if isinstance(output, Tensor) else tuple(2 * each for each in output[:2]) + output[2:]

    def change_in_place(_module: Any, _args: Any, output: Any) -> None:
        first(output).mul_(2)

    def record(model: Any, **options: bool) -> list[Any]:
        layer = layers_of(model)[2]
        modules = [*layers_of(model), attention_of(layer), *([mlp_of(layer).gate] if family == "mixtral" else [])]
        outputs = []
        for module in modules:
            for hook in (change, change_in_place):
                with module.register_forward_hook(hook, **options):
                    outputs.append(model(IDS, **asked))
        return [each for output in outputs for each in flat(dict(output))]

    for _ in range(2):  # before transformers has registered its own, and after
        compare(pair, record)
    compare(pair, lambda model: record(model, prepend=True))


@torch.no_grad()
def test_outputs_that_would_be_recorded_between_two_hooks_are_refused(place: Any, tiny_llama: str) -> None:
    model = place(tiny_llama, [("a", 0, 2), ("b", 2, 4)])
    early = [module.register_forward_hook(lambda *_: None) for module in (model.model.layers[1], model.lm_head)]
    model(IDS, output_hidden_states=True)
    with (
        model.model.layers[1].register_forward_hook(lambda *_: None),
        model.lm_head.register_forward_hook(lambda *_: None),
    ):
        model(IDS)
        with pytest.raises(
            ll.UnsupportedOperationError, match=r"^hooks of model.layers.1 .* register all before it, or all"
        ):
            model(IDS, output_hidden_states=True)
        early[0].remove()
        model(IDS, output_hidden_states=True)
    early[1].remove()


@torch.no_grad()
def test_what_runs_all_layers_takes_other_tokens_and_nothing_else(llama: Pair) -> None:
    def swap(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "input_ids": kwargs["input_ids"].flip(1)}

    def run(model: Any) -> Any:
        with model.model.register_forward_pre_hook(swap, with_kwargs=True):
            return model(IDS).logits

    compare(llama, run)

    def replace_mask(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": MASK * 0}

    def clear_mask(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        kwargs["attention_mask"].zero_()

    for change in (replace_mask, clear_mask):
        with (
            llama[0].model.register_forward_pre_hook(change, with_kwargs=True),
            pytest.raises(ll.UnsupportedOperationError, match="a pre-hook of model changed attention_mask"),
        ):
            llama[0](IDS, attention_mask=MASK)


@torch.no_grad()
def test_what_a_hook_changes_is_recorded(llama: Pair) -> None:
    def run(model: Any) -> list[Any]:
        with model.model.layers[1].register_forward_hook(lambda _m, _a, output: with_first(output, first(output) * 2)):
            output = model(IDS, output_hidden_states=True)
        return [output.logits, *output.hidden_states]

    compare(llama, run)


@torch.no_grad()
def test_what_cannot_be_sent_is_refused(sharded: Any) -> None:
    for result, error, words in (
        (object(), ll.UnsupportedOperationError, "a hook of model.layers.1 returned a object"),
        (torch.empty(1, device="meta"), ll.ArgumentError, "without data"),
    ):
        with (
            sharded.model.layers[1].register_forward_hook(lambda *_, result=result: result),
            pytest.raises(error, match=words),
        ):
            sharded(IDS)


@torch.inference_mode()
def test_hooks_under_inference_mode_autocast_and_a_static_cache(llama: Pair) -> None:
    def run(model: Any) -> list[Tensor]:
        def clear(_module: Any, _args: Any, output: Tensor) -> None:
            output[..., :3] = 0

        with model.model.layers[1].self_attn.o_proj.register_forward_hook(clear):
            plain = model(IDS).logits
            tokens = model.generate(IDS[1:], max_new_tokens=4, cache_implementation="static", disable_compile=True)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return [plain, tokens, model(IDS).logits]

    compare(llama, run)
