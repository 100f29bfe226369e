"""Workers on other hosts have no checkpoint: what their layers need travels once, from whoever has it."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import lingualinked as ll
from accelerators import device
from families import reference, save_several_parts
from lingualinked.cluster.pipeline import Pipeline
from lingualinked.model.weight_files.byte_ranges import ByteRange
from lingualinked.model.weight_files.held_files import WholeFiles
from remote_workers import Traffic, remote_cluster, traffic
from waiting import wait_until

pytestmark = [
    pytest.mark.process,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),  # of peft
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),  # of transformers
]

__all__ = ["traffic"]

IDS = torch.tensor([[1, 17, 93, 54, 8, 17, 93]])
TWO = [("a", 0, 3), ("b", 3, 6)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_several_parts(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> torch.Tensor:
    return generate(reference(checkpoint))


def generate(model: Any) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(IDS, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    return tokens


def load(cluster: ll.Cluster, checkpoint: Path, spans: list[tuple[str, int, int]], **arguments: Any) -> Any:
    plan = ll.Plan.from_spans(spans)
    return ll.ShardedModel.from_pretrained(str(checkpoint), cluster=cluster, plan=plan, progress=False, **arguments)


def weight_bytes(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))


def test_weights_travel_once(
    checkpoint: Path, expected: torch.Tensor, traffic: Traffic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first start fetches the spans alone; a second one, in new processes, asks whether all is there."""
    devices = [device(name) for name in "abc"]
    with remote_cluster(devices, tmp_path, monkeypatch) as cluster, load(cluster, checkpoint, TWO) as model:
        assert torch.equal(generate(model), expected)
        assert weight_bytes(checkpoint) <= traffic.num_bytes <= 1.02 * weight_bytes(checkpoint)
    traffic.clear()
    with remote_cluster(devices, tmp_path, monkeypatch) as cluster:
        cluster.wait()
        with load(cluster, checkpoint, TWO) as model:
            assert torch.equal(generate(model), expected)
        assert traffic.num_messages["FindFiles"] == 3
        assert traffic.num_messages["FetchPart"] == 0


def test_what_moves_is_fetched_once_from_all_who_have_it(
    checkpoint: Path, expected: torch.Tensor, traffic: Traffic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = [device(name) for name in "abc"]
    moved = ll.Plan.from_spans([("a", 0, 1), ("c", 1, 3), ("b", 3, 6)])
    with remote_cluster(devices, tmp_path, monkeypatch) as cluster, load(cluster, checkpoint, TWO) as model:
        traffic.clear()
        model.rebalance(moved)
        assert torch.equal(generate(model), expected)
        # Of two layers of six, a part; the worker that has held them sends the others.
        assert traffic.num_messages["ShareFiles"] == 2  # both have the headers
        assert 0 < traffic.num_bytes < weight_bytes(checkpoint) / 3 - (1 << 20)
        for plan in (ll.Plan.from_spans(TWO), moved):
            traffic.clear()
            model.rebalance(plan)
            assert traffic.num_messages["FetchPart"] == 0
            assert torch.equal(generate(model), expected)


def test_what_had_come_before_a_failure_is_not_sent_again(
    checkpoint: Path, expected: torch.Tensor, traffic: Traffic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, parts = WholeFiles.read, []

    def fail_after_eight(files: WholeFiles, part: ByteRange) -> bytes:
        parts.append(part)
        if len(parts) > 8:
            raise ll.CheckpointError("/data/model.safetensors can't be read (Input/output error)")
        return read(files, part)

    with remote_cluster([device("a")], tmp_path, monkeypatch) as cluster:
        with monkeypatch.context() as patch:
            patch.setattr(WholeFiles, "read", fail_after_eight)
            with pytest.raises(
                ll.CheckpointError, match=r"device 'a': .* the caller /data/model.safetensors can't be read"
            ):
                load(cluster, checkpoint, [("a", 0, 6)])
        before = traffic.num_bytes
        traffic.clear()
        with load(cluster, checkpoint, [("a", 0, 6)]) as model:
            assert torch.equal(generate(model), expected)
        assert traffic.num_bytes + before <= 1.03 * weight_bytes(checkpoint)


def test_a_source_that_is_killed_meanwhile_is_replaced(
    checkpoint: Path, expected: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = [device(name) for name in "ab"]
    with remote_cluster(devices, tmp_path, monkeypatch) as cluster:
        load(cluster, checkpoint, [("a", 0, 6)]).close()
        pid, read, killed = cluster.pids["a"], WholeFiles.read, threading.Event()

        def kill_source(files: WholeFiles, part: ByteRange) -> bytes:
            if not killed.is_set():
                killed.set()
                os.kill(pid, signal.SIGKILL)
            return read(files, part)

        monkeypatch.setattr(WholeFiles, "read", kill_source)
        with load(cluster, checkpoint, [("b", 0, 6)]) as model:
            assert killed.is_set()
            assert torch.equal(generate(model), expected)


def test_a_file_that_changes_meanwhile_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    read = WholeFiles.read

    def touch(files: WholeFiles, part: ByteRange) -> bytes:
        for path in folder.glob("*.safetensors"):
            os.utime(path)
        return read(files, part)

    with remote_cluster([device("a")], tmp_path, monkeypatch) as cluster:
        monkeypatch.setattr(WholeFiles, "read", touch)
        with pytest.raises(ll.CheckpointError, match=r"device 'a': .* the caller .* has been replaced or written to"):
            load(cluster, folder, [("a", 0, 6)])
        assert cluster.workers()


@pytest.mark.parametrize("what", ["cluster", "model"])
def test_closing_ends_what_is_being_fetched(
    what: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, is_reading, may_go_on = WholeFiles.read, threading.Event(), threading.Event()

    def wait_and_read(files: WholeFiles, part: ByteRange) -> bytes:
        is_reading.set()
        may_go_on.wait(1.0)
        return read(files, part)

    errors: list[Exception] = []
    with remote_cluster([device("a")], tmp_path, monkeypatch) as cluster:
        monkeypatch.setattr(WholeFiles, "read", wait_and_read)
        unload: list[Any] = []
        monkeypatch.setattr(
            Pipeline, "load", lambda self, bars, load=Pipeline.load: (unload.append(self), load(self, bars))
        )

        def load_it() -> None:
            try:
                load(cluster, checkpoint, [("a", 0, 6)])
            except ll.LingualinkedError as error:
                errors.append(error)

        thread = threading.Thread(target=load_it)
        thread.start()
        assert is_reading.wait(60)
        if what == "cluster":
            cluster.close()
        else:
            unload[0].unload()
        thread.join(60)
        may_go_on.set()
        assert isinstance(errors[0], ll.ClosedError)
    wait_until(lambda: not any(each.name == "lingualinked-files" for each in threading.enumerate()))


def test_dummy_weights_and_local_workers_cost_no_message(
    checkpoint: Path, traffic: Traffic, shared_cluster: ll.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(shared_cluster, checkpoint, TWO) as model:
        generate(model)
    with (
        remote_cluster([device("a")], tmp_path, monkeypatch) as cluster,
        load(cluster, checkpoint, [("a", 0, 6)], load_format="dummy") as model,
    ):
        generate(model)
    assert traffic.num_bytes == 0


def test_trusted_devices_exchange_files_with_trusted_ones_alone(
    checkpoint: Path, traffic: Traffic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = [device("mine", trusted=True), device("too", trusted=True), device("theirs")]
    with remote_cluster(devices, tmp_path, monkeypatch) as cluster:
        cluster.wait()
        load(cluster, checkpoint, [("mine", 0, 6)]).close()
        assert traffic.num_messages["FindFiles"] == 2  # the other one does not hear which model this is
        traffic.clear()
        load(cluster, checkpoint, [("mine", 0, 2), ("theirs", 2, 4), ("mine", 4, 6)]).close()
        assert traffic.num_messages["ShareFiles"] == 0
        load(cluster, checkpoint, [("too", 0, 6)]).close()
        assert traffic.num_messages["ShareFiles"] == 1  # what "theirs" has by now might be anything


def test_edits_and_adapters_reach_workers_on_other_hosts(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(reference(checkpoint), lora)
    adapted.save_pretrained(tmp_path / "adapter")
    whole = reference(checkpoint)
    whole.load_adapter(str(tmp_path / "adapter"))
    changed = torch.full_like(whole.model.layers[4].mlp.gate_proj.weight, 0.01)
    with torch.no_grad():
        whole.model.layers[4].mlp.gate_proj.weight.copy_(changed)
    devices = [device(name) for name in "abc"]
    with remote_cluster(devices, tmp_path / "caches", monkeypatch) as cluster, load(cluster, checkpoint, TWO) as model:
        model.load_adapter(str(tmp_path / "adapter"))
        with torch.no_grad():
            model.model.layers[4].mlp.gate_proj.weight.copy_(changed)
        assert torch.equal(generate(model), generate(whole))
        model.rebalance(ll.Plan.from_spans([("a", 0, 3), ("c", 3, 6)]))
        assert torch.equal(model(IDS).logits, whole(IDS).logits)
