"""Weights of a sharded model are read from the workers that hold them, with the bits of the unsharded one."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import lingualinked as ll
from families import reference, save_tiny

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[1, 17, 93, 54, 8, 17]])
SPANS = [("a", 0, 1), ("b", 1, 3), ("c", 3, 4)]
FAMILIES = {
    "llama-wide": torch.bfloat16,  # packed in the workers
    "llama-tied": torch.float32,
    "llama-dynamic": torch.float32,
    "gpt2": torch.float32,
    "gemma2": torch.float32,
    "mixtral": torch.float32,
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, shared_cluster: ll.Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Any]]:
    """A model in three stages, and the unsharded one."""
    folder = save_tiny(request.param, FAMILIES[request.param], tmp_path_factory.mktemp(request.param))
    plan = ll.Plan.from_spans(SPANS)
    with ll.ShardedModel.from_pretrained(str(folder), cluster=shared_cluster, plan=plan, progress=False) as sharded:
        yield sharded, reference(folder)


def test_every_parameter_and_buffer(pair: tuple[Any, Any]) -> None:
    for names in ("named_parameters", "named_buffers"):
        ours, theirs = (list(getattr(model, names)(remove_duplicate=False)) for model in pair)
        assert [name for name, _ in ours] == [name for name, _ in theirs]
        assert [name for (name, our), (_, their) in zip(ours, theirs, strict=True) if not torch.equal(our, their)] == []
    ours, theirs = (model.state_dict() for model in pair)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@torch.no_grad()
def test_a_logit_lens(pair: tuple[Any, Any]) -> None:
    for index in range(5):
        logits = []
        for model in pair:
            decoder, head = model.base_model, model.get_output_embeddings()
            norm = getattr(decoder, "norm", None) or decoder.ln_f
            states = model(IDS, output_hidden_states=True).hidden_states[index]
            logits.append((head(norm(states)), functional.linear(states, head.weight), states @ head.weight.T))
        for ours, theirs in zip(*logits, strict=True):
            assert torch.equal(ours, theirs)
    ours, theirs = (model.get_input_embeddings()(IDS) for model in pair)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("arguments", [{}, {"max_shard_size": 20_000, "variant": "v"}], ids=str)
def test_a_saved_folder_is_the_one_that_transformers_saves(
    pair: tuple[Any, Any], arguments: dict[str, Any], tmp_path: Path
) -> None:
    folders = [tmp_path / "ours", tmp_path / "theirs"]
    for model, folder in zip(pair, folders, strict=True):
        model.save_pretrained(folder, **arguments)
    ours, theirs = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    if (
        pair[1].config.model_type == "mixtral"
    ):  # its experts are saved one by one: there, transformers exceeds the bound
        assert all(len(content) <= 25_000 for name, content in ours.items() if "-of-" in name)
    else:
        assert sorted(ours) == sorted(theirs)
        assert [name for name, content in theirs.items() if ours[name] != content] == []
    whole = reference(folders[0], **{key: value for key, value in arguments.items() if key == "variant"})
    state = pair[1].state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())


@torch.no_grad()
def test_a_layer_by_itself(sharded: Any, unsharded: Any) -> None:
    outputs = []
    for model in (sharded, unsharded):
        states = model.model.embed_tokens(IDS)
        rotary = model.model.rotary_emb(states, torch.arange(IDS.shape[1])[None])
        outputs.append(model.model.layers[2](states, position_embeddings=rotary))
    assert torch.equal(*outputs)
    past = sharded(IDS).past_key_values
    with pytest.raises(ll.UnsupportedOperationError, match="sharded KV cache: only the workers write KV"):
        sharded.model.layers[2](states, position_embeddings=rotary, past_key_values=past)
    with pytest.raises(ll.UnsupportedOperationError, match=r"^calling model \(LlamaModel\) of a sharded model"):
        sharded.model(IDS)


def test_what_is_saved_elsewhere_or_is_no_folder_is_refused(sharded: Any, tmp_path: Path) -> None:
    for name, value in {"state_dict": {}, "push_to_hub": True, "distributed_checkpoint": True, "repo_id": "a"}.items():
        with pytest.raises(ll.UnsupportedOperationError, match=rf"save_pretrained\({name}=\) of a sharded model"):
            sharded.save_pretrained(tmp_path, **{name: value})
    (tmp_path / "file").touch()
    with pytest.raises(ll.ArgumentError, match="is a file"):
        sharded.save_pretrained(tmp_path / "file")
    sharded.save_pretrained(tmp_path / "empty", is_main_process=False)
    assert list((tmp_path / "empty").iterdir()) == []


def test_files_of_an_earlier_save_are_replaced(sharded: Any, unsharded: Any, tmp_path: Path) -> None:
    for model, name in ((sharded, "ours"), (unsharded, "theirs")):
        model.save_pretrained(tmp_path / name, max_shard_size=30_000)
        model.save_pretrained(tmp_path / name)
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == sorted(
        path.name for path in (tmp_path / "theirs").iterdir()
    )


def test_threads_read_at_once(sharded: Any, unsharded: Any) -> None:
    expected = unsharded.state_dict()

    def read(names: list[str]) -> list[str]:
        return [name for name in names if not torch.equal(sharded.state_dict()[name], expected[name])]

    names = list(expected)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        tokens = pool.submit(sharded.generate, IDS, max_new_tokens=8)
        assert list(pool.map(read, (names, names[::-1]))) == [[], []]
        assert torch.equal(tokens.result(), unsharded.generate(IDS, max_new_tokens=8))


def test_what_moves_is_read_at_its_new_place(place: Any, tiny_llama: str, unsharded: Any) -> None:
    model = place(tiny_llama, SPANS)
    plans = [ll.Plan.from_spans(spans) for spans in ([("b", 0, 2), ("a", 2, 4)], SPANS)]
    expected = unsharded.state_dict()
    moved = threading.Event()

    def move() -> None:
        try:
            for plan in plans * 2:
                model.rebalance(plan)
        finally:
            moved.set()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        moving = pool.submit(move)
        while True:
            was_moved = moved.is_set()
            for name, value in model.state_dict().items():
                read = model._pipeline.weights.read(model._parts, value.remote_name, value.shape, value.dtype)
                assert torch.equal(read, expected[name])
            if was_moved:
                break
        moving.result()


def test_a_weight_of_a_dead_worker(tiny_llama: str) -> None:
    with ll.Cluster([ll.Device(name=name, threads=1) for name in "ab"]) as cluster:
        plan = ll.Plan.from_spans([("a", 0, 2), ("b", 2, 4)])
        with ll.ShardedModel.from_pretrained(tiny_llama, cluster=cluster, plan=plan, progress=False) as model:
            kept = model.model.layers[3].mlp.up_proj.weight
            assert kept.shape == (64, 32)
            os.kill(cluster.pids["b"], signal.SIGKILL)
            with pytest.raises(ll.WorkerDiedError, match="'b'"):
                model.model.norm.weight.sum()
            assert model.model.layers[0].mlp.up_proj.weight.isfinite().all()
        for use in (model.model.layers[0].mlp.up_proj.weight.sum, lambda: kept[0]):
            with pytest.raises(ll.ClosedError):
                use()
        assert "in a worker" in repr(kept)
