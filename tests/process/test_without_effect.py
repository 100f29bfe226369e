"""Nothing that is done to a sharded model in the caller is without effect: it works, or it is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import lingualinked as ll

pytestmark = pytest.mark.process

IDS = torch.tensor([[1, 17, 93, 54]])


def test_a_hook_for_gradients_is_refused_at_registration(sharded: Any) -> None:
    with pytest.raises(ll.UnsupportedOperationError, match=r"register_full_backward_hook\(\) of model\.layers\.3\.mlp"):
        sharded.model.layers[3].mlp.register_full_backward_hook(print)


def test_hooks_of_the_whole_model_have_their_effect(sharded: Any, unsharded: PreTrainedModel) -> None:
    results = []
    for model in (sharded, unsharded):
        seen: list[object] = []

        def before(_: object, args: tuple[Any, ...], kwargs: dict[str, Any], seen: list[object] = seen) -> Any:
            seen.append((len(args), sorted(kwargs)))
            return tuple(ids[:, :3] for ids in args), kwargs

        def after(_: object, args: tuple[Any, ...], output: Any, seen: list[object] = seen) -> Any:
            seen.append(tuple(output.logits.shape))
            output.logits = -output.logits
            return output

        def always(_: object, args: tuple[Any, ...], output: Any, seen: list[object] = seen) -> None:
            seen.append(output is None)

        with (
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after),
            model.register_forward_hook(always, always_call=True, prepend=True),
            torch.no_grad(),
        ):
            logits = model(IDS, use_cache=False).logits
            generated = model.generate(IDS, max_new_tokens=2)
        results.append((logits, generated, seen))
    (ours, our_tokens, ours_seen), (theirs, their_tokens, theirs_seen) = results
    assert torch.equal(ours, theirs)
    assert torch.equal(our_tokens, their_tokens)
    assert ours_seen == theirs_seen


@pytest.mark.parametrize(
    ("change", "restore", "name"),
    [
        (
            lambda model: setattr(model.config, "num_hidden_layers", 2),
            lambda model: setattr(model.config, "num_hidden_layers", 4),
            r"config\.num_hidden_layers was 4 .* 2 now",
        ),
        (
            lambda model: setattr(model.config, "_attn_implementation", "eager"),
            lambda model: setattr(model.config, "_attn_implementation", "sdpa"),
            r"config\._attn_implementation was 'sdpa' .* 'eager' now",
        ),
        (
            lambda model: vars(model.model.layers[1].mlp).update(hidden_size=7),
            lambda model: vars(model.model.layers[1].mlp).update(hidden_size=32),
            r"model\.layers\.1\.mlp\.hidden_size .* has been changed",
        ),
    ],
    ids=["config", "attention", "attribute"],
)
def test_what_could_not_be_seen_is_refused_at_the_next_call(
    sharded: Any, change: Callable[[Any], object], restore: Callable[[Any], object], name: str
) -> None:
    change(sharded)
    try:
        for use in (lambda: sharded(IDS), lambda: sharded.generate(IDS, max_new_tokens=1)):
            with pytest.raises(ll.UnsupportedOperationError, match=name):
                use()
    finally:
        restore(sharded)
    sharded(IDS)


def test_what_the_caller_reads_of_the_config_has_its_effect(sharded: Any, unsharded: PreTrainedModel) -> None:
    outputs = []
    for model in (sharded, unsharded):
        model.config.use_cache, model.config.pad_token_id = False, 5
        try:
            with torch.no_grad():
                outputs.append(model(IDS, labels=IDS))
        finally:
            model.config.use_cache, model.config.pad_token_id = True, 0
    ours, theirs = outputs
    assert ours.past_key_values is theirs.past_key_values is None
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)


def test_parameters_say_where_inputs_belong(sharded: Any) -> None:
    device = next(sharded.parameters()).device
    assert device == sharded.device == sharded.get_input_embeddings().weight.device == sharded.model.device
    sharded(IDS.to(device))
    assert all(isinstance(each, nn.Parameter) and not each.is_meta for each in sharded.parameters())
    assert sharded.dtype == torch.float32
    assert sharded.num_parameters() * 4 <= sharded.get_memory_footprint()
