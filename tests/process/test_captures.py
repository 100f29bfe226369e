"""What `capture` collects is what a forward hook of the unsharded model keeps: bit for bit, in each step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
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


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(
    request: pytest.FixtureRequest, shared_cluster: ll.Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """A model in three stages, and the unsharded one."""
    folder = save_tiny(request.param, torch.float32, tmp_path_factory.mktemp(request.param))
    plan = ll.Plan.from_spans(SPANS)
    with ll.ShardedModel.from_pretrained(str(folder), cluster=shared_cluster, plan=plan, progress=False) as sharded:
        yield sharded, reference(folder)


def first(value: Any) -> Tensor:
    """Return the first tensor of what a module is called with or returns."""
    if isinstance(value, Tensor):
        return value
    return next(each for each in (value.values() if isinstance(value, dict) else value) if isinstance(each, Tensor))


@contextlib.contextmanager
def kept_by_hooks(model: Any, paths: Iterable[str], what: str, pick: Callable[[Tensor], Tensor]) -> Iterator[Any]:
    """Keep what modules of the unsharded model are called with, or return, as their users do it with torch."""
    kept: dict[str, list[Tensor]] = {path: [] for path in paths}
    with contextlib.ExitStack() as handles:
        for path, values in kept.items():
            module = model.get_submodule(path)
            if what == "output":

                def after(_module: Any, _args: Any, output: Any, values: list[Tensor] = values) -> None:
                    values.append(pick(first(output)).clone())

                handles.enter_context(module.register_forward_hook(after))
            else:

                def before(_module: Any, args: Any, kwargs: Any, values: list[Tensor] = values) -> None:
                    values.append(pick(first((*args, *kwargs.values()))).clone())

                handles.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
        yield kept


def assert_same(captured: Any, kept: dict[str, list[Tensor]]) -> None:
    assert list(captured) == list(kept)
    for path, tensors in kept.items():
        assert len(captured[path]) == len(tensors), path
        for our, their in zip(captured[path], tensors, strict=True):
            assert (our.dtype, our.shape) == (their.dtype, their.shape), path
            assert torch.equal(our, their), path


@torch.no_grad()
def test_every_module(pair: Pair) -> None:
    sharded, whole = pair
    for what in ("output", "input"):
        with sharded.capture([".".join("*" * depth) for depth in range(1, 6)], what=what) as captured:
            sharded(IDS, attention_mask=MASK)
        with kept_by_hooks(whole, captured, what, lambda value: value) as kept:
            whole(IDS, attention_mask=MASK)
        assert len(captured) > 40
        assert_same(captured, kept)


PICKS: list[tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = [
    ({"positions": -1, "dtype": torch.float64}, lambda value: value[:, -1:].double()),
    ({"positions": slice(-3, None), "rows": [1, 0]}, lambda value: value[[1, 0]][:, -3:]),
    ({"positions": [4, 1], "steps": "prefill"}, lambda value: value[:, [4, 1]]),
    ({"reduce": "mean", "dtype": torch.float32}, lambda value: value.float().mean(1, keepdim=True)),
]


@pytest.mark.parametrize(("chosen", "pick"), PICKS, ids=lambda each: str(each) if isinstance(each, dict) else "")
def test_generate(pair: Pair, chosen: dict[str, Any], pick: Callable[[Tensor], Tensor]) -> None:
    sharded, whole = pair
    layers = "transformer.h.*" if whole.config.model_type == "gpt2" else "model.layers.*"
    with sharded.capture([f"{layers}.mlp", layers], **chosen) as captured:
        ours = sharded.generate(IDS, attention_mask=MASK, max_new_tokens=4, min_new_tokens=4)
    is_prefill = chosen.get("steps") == "prefill"
    with kept_by_hooks(
        whole, captured, "output", lambda value: pick(value) if value.shape[1] > 1 or not is_prefill else value[:, :0]
    ) as kept:
        theirs = whole.generate(IDS, attention_mask=MASK, max_new_tokens=4, min_new_tokens=4)
    assert torch.equal(ours, theirs)
    kept = {path: [value for value in values if value.numel()] for path, values in kept.items()}
    assert_same(captured, kept)
    assert torch.equal(
        captured[f"{layers.replace('*', '2')}.mlp"].cat(), torch.cat(kept[f"{layers.replace('*', '2')}.mlp"], 1)
    )
    assert captured.devices[layers.replace("*", "0")] == ("a",)
    assert captured.devices[layers.replace("*", "3")] == ("c",)
    assert captured.untrusted == frozenset()
