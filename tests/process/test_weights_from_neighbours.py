"""Layers move to workers that can't read the checkpoint: those that hold the weights send them, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import lingualinked as ll
from accelerators import device
from families import reference, save_tiny, tiny_model
from lingualinked.sharded.loading import load as loading
from processes import stopped
from waiting import num_sessions, wait_until

pytestmark = [pytest.mark.process, pytest.mark.equality]

IDS = torch.tensor([[1, 17, 93, 54, 8, 17, 93]])
FAMILIES = ("llama", "llama-tied", "gpt2", "gemma3", "mixtral", "opt-350m")
SPANS = (
    [("c", 0, 4)],  # on one device: what is tied is held once
    [("a", 0, 1), ("b", 1, 3), ("a", 3, 4)],
    [("d", 0, 2), ("c", 2, 4)],
    [("c", 0, 2), ("d", 2, 4)],  # the two ends change places
)


def generate(model: Any) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(IDS, max_new_tokens=16, min_new_tokens=16, do_sample=False)
    return tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_come_from_who_has_them(
    family: str, dtype: torch.dtype, shared_cluster: ll.Cluster, tmp_path: Path
) -> None:
    folder = save_tiny(family, dtype, tmp_path / "checkpoint")
    whole = reference(folder)
    expected = generate(whole)
    plan = ll.Plan.from_spans([("a", 0, 2), ("b", 2, 4)])
    with ll.ShardedModel.from_pretrained(str(folder), cluster=shared_cluster, plan=plan, progress=False) as model:
        past, past_expected = model(IDS).past_key_values, whole(IDS).past_key_values
        shutil.rmtree(folder)
        for spans in SPANS:
            migration = model.rebalance(ll.Plan.from_spans(spans)).migration
            assert migration is not None
            assert migration.weight_bytes > 0
            logits = model(IDS[:, :1], past_key_values=past).logits
            assert torch.equal(logits, whole(IDS[:, :1], past_key_values=past_expected).logits)
        assert torch.equal(generate(model), expected)
        del past
        wait_until(lambda: sum(num_sessions(model)) == 0)


def test_steps_go_on_meanwhile(shared_cluster: ll.Cluster, tmp_path: Path) -> None:
    folder = save_tiny("llama", torch.float32, tmp_path / "checkpoint")
    expected = generate(reference(folder))
    enough, wrong = threading.Event(), []
    with ll.ShardedModel.from_pretrained(
        str(folder), cluster=shared_cluster, plan=ll.Plan.from_spans(SPANS[1]), progress=False
    ) as model:
        shutil.rmtree(folder)

        def keep_generating() -> None:
            while not enough.is_set():
                if not torch.equal(generate(model), expected):
                    wrong.append(1)

        threads = [threading.Thread(target=keep_generating) for _ in range(3)]
        for thread in threads:
            thread.start()
        for spans in SPANS * 2:
            model.rebalance(ll.Plan.from_spans(spans))
        enough.set()
        for thread in threads:
            thread.join()
        assert not wrong


def test_what_is_on_trusted_devices_is_lent_to_trusted_ones_alone(tmp_path: Path) -> None:
    folder = save_tiny("llama", torch.float32, tmp_path / "checkpoint")
    whole = reference(folder)
    devices = [device("mine", trusted=True), device("theirs")]
    plan = ll.Plan.from_spans([("mine", 0, 2), ("theirs", 2, 3), ("mine", 3, 4)])
    with (
        ll.Cluster(devices) as cluster,
        ll.ShardedModel.from_pretrained(str(folder), cluster=cluster, plan=plan, progress=False) as model,
    ):
        past, past_expected = model(IDS).past_key_values, whole(IDS).past_key_values
        shutil.rmtree(folder)
        with pytest.raises(
            ll.CheckpointError, match=r"device 'theirs': .* on device 'mine', which is trusted and lends no"
        ):
            model.rebalance(ll.Plan.from_spans([("mine", 0, 1), ("theirs", 1, 3), ("mine", 3, 4)]))
        assert model.plan.stages[0].end == 2
        logits = model(IDS[:, :1], past_key_values=past).logits
        assert torch.equal(logits, whole(IDS[:, :1], past_key_values=past_expected).logits)
        model.rebalance(ll.Plan.from_spans([("mine", 0, 4)]))  # theirs lends to mine
        logits = model(IDS[:, :1], past_key_values=past).logits
        assert torch.equal(logits, whole(IDS[:, :1], past_key_values=past_expected).logits)


def test_who_has_them_dies_meanwhile(tmp_path: Path) -> None:
    folder = save_tiny("llama", torch.float32, tmp_path / "checkpoint")
    devices = [device(name) for name in ("doomed", "other", "idle")]
    with ll.Cluster(devices) as cluster:
        pid = cluster.pids["doomed"]
        plan = ll.Plan.from_spans([("doomed", 0, 2), ("other", 2, 4)])
        with ll.ShardedModel.from_pretrained(str(folder), cluster=cluster, plan=plan, progress=False) as model:
            shutil.rmtree(folder)
            errors: list[Exception] = []

            def move() -> None:
                try:
                    model.rebalance(ll.Plan.from_spans([("idle", 0, 2), ("other", 2, 4)]))
                except ll.LingualinkedError as error:
                    errors.append(error)

            stopped(pid)  # it lends nothing: the migration waits for it
            thread = threading.Thread(target=move)
            thread.start()
            os.kill(pid, signal.SIGKILL)
            thread.join(30)
            assert [type(error) for error in errors] == [ll.WorkerDiedError]
            assert model.plan.devices == ("doomed", "other")
            with pytest.raises(ll.WorkerDiedError):
                generate(model)
        # What waited for it waits no longer: the worker that lacked the weights serves other models.
        folder = save_tiny("gpt2", torch.float32, tmp_path / "other")
        plan = ll.Plan.from_spans([("idle", 0, 2), ("other", 2, 4)])
        with ll.ShardedModel.from_pretrained(str(folder), cluster=cluster, plan=plan, progress=False) as model:
            assert torch.equal(generate(model), generate(reference(folder)))


def save_other(folder: Path, family: str = "llama", **arguments: Any) -> None:
    """Save other weights where a checkpoint is, as a training run does."""
    model = tiny_model(family, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(folder, **arguments)


def save_in_place(folder: Path) -> None:
    """Write other weights into the very file, and set its times back."""
    file = folder / "model.safetensors"
    status = file.stat()
    save_other(folder / "other")
    with file.open("r+b") as opened:
        opened.write((folder / "other" / "model.safetensors").read_bytes())
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def save_other_shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    save_other(folder, max_shard_size="20KB")


def turn_link(folder: Path) -> None:
    """Have the name of the weights, a symbolic link as in the hub's cache, mean another file."""
    save_other(folder / "other")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "other" / "model.safetensors")


CHANGES = {
    "other weights": save_other,
    "in place": save_in_place,
    "other shapes": lambda folder: save_other(folder, "gpt2"),
    "other shards": save_other_shards,
    "a link": turn_link,
    "half a file": lambda folder: os.truncate(folder / "model.safetensors", 5000),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_takes_the_checkpoints_place_is_not_read(change: str, shared_cluster: ll.Cluster, tmp_path: Path) -> None:
    folder = save_tiny("llama", torch.float32, tmp_path / "checkpoint")
    expected = generate(reference(folder))
    plan = ll.Plan.from_spans([("a", 0, 2), ("b", 2, 4)])
    with ll.ShardedModel.from_pretrained(str(folder), cluster=shared_cluster, plan=plan, progress=False) as model:
        CHANGES[change](folder)
        for spans in SPANS[:2]:
            model.rebalance(ll.Plan.from_spans(spans))
            assert torch.equal(generate(model), expected)


def test_devices_that_come_and_go_after_the_checkpoint_was_replaced(shared_cluster: ll.Cluster, tmp_path: Path) -> None:
    folder = save_tiny("llama", torch.float32, tmp_path / "checkpoint")
    expected = generate(reference(folder))
    plan = ll.Plan.from_spans([("a", 0, 2), ("b", 2, 4)])
    with ll.ShardedModel.from_pretrained(str(folder), cluster=shared_cluster, plan=plan, progress=False) as model:
        save_other(folder)
        model.release("a")
        assert torch.equal(generate(model), expected)
        model.admit("a")
        model.release("b")
        assert torch.equal(generate(model), expected)


def test_a_checkpoint_replaced_before_its_weights_are_loaded(
    shared_cluster: ll.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("llama", torch.float32, tmp_path / "checkpoint")
    find_or_fit_plan = loading.find_or_fit_plan

    def find_late(*arguments: Any) -> ll.Plan:
        save_other(folder)
        return find_or_fit_plan(*arguments)

    monkeypatch.setattr(loading, "find_or_fit_plan", find_late)
    with pytest.raises(ll.CheckpointError, match=r"model\.safetensors has been replaced or written to since"):
        ll.ShardedModel.from_pretrained(str(folder), cluster=shared_cluster, plan="even", progress=False)
    monkeypatch.undo()
    with ll.ShardedModel.from_pretrained(str(folder), cluster=shared_cluster, plan="even", progress=False) as model:
        assert torch.equal(generate(model), generate(reference(folder)))


def test_a_first_load_needs_the_files(shared_cluster: ll.Cluster, tmp_path: Path) -> None:
    folder = save_tiny("llama", torch.float32, tmp_path / "checkpoint")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ll.CheckpointError):
        ll.ShardedModel.from_pretrained(str(folder), cluster=shared_cluster, plan="even", progress=False)
