"""Token ids and logits go to trusted devices alone: every frame that the others receive is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.process, pytest.mark.slow]

# Loaded by every process of the run before anything else: notes what mailboxes hand to their owners, after decryption.
TAP = """
import json, os
from lingualinked.transport.sockets.zmq_mailbox import ZmqMailbox

receive_one = ZmqMailbox._receive_one

def tapped(self):
    before = [delivery for *_, delivery in self._delayed._heap]
    delivery = receive_one(self)
    new = [each for *_, each in self._delayed._heap if not any(each is old for old in before)]
    for each in ([] if delivery is None else [delivery]) + new:
        with open(os.path.join(os.environ["TAP_FOLDER"], self.name + ".jsonl"), "a") as log:
            tensors = [[str(tensor.dtype), list(tensor.shape), tensor.reshape(-1)[:4096].double().tolist()]
                       for tensor in each.tensors]
            log.write(json.dumps({"payload": each.payload.hex(), "sender": each.sender, "tensors": tensors}) + "\\n")
    return delivery

ZmqMailbox._receive_one = tapped
"""

RUN = """
import sys, torch
import lingualinked as ll
torch.set_num_threads(1)
path = sys.argv[1]
devices = [
    ll.Device(name="stranger", threads=1),
    ll.Device(name="mine", threads=1, trusted=True),
    ll.Device(name="other", threads=1),
]
ids = torch.tensor([[101, 55, 77, 99, 11, 13, 17, 19, 23, 29, 31, 37]])
with ll.Cluster(devices) as cluster:
    workload = ll.Workload(num_sessions=8)  # which keep all three busy
    ll.profile_model(path, cluster, workload=workload)  # what it makes workers say, strangers hear, too
    # The plan is made from stated speeds: what is measured on a busy machine may say that one device is the best.
    speed = ll.DeviceSpecs(flops=1e9, memory_bandwidth="1GB/s")
    stated = ll.estimate_profile(path, devices, dict.fromkeys(("stranger", "mine", "other"), speed), workload=workload)
    plan = ll.solve(stated, workload=workload)
    model = ll.ShardedModel.from_pretrained(path, cluster=cluster, plan=plan, progress=False)
    assert model.plan.stages[0].device == model.plan.stages[-1].device == "mine", str(model.plan)
    assert set(model.plan.devices) == {"stranger", "mine", "other"}, str(model.plan)
    model(ids)  # whose logits the caller gets: of what is generated, it gets the tokens alone
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
    print(tokens.tolist())
"""

PROMPT = [101, 55, 77, 99, 11, 13, 17, 19, 23, 29, 31, 37]
VOCABULARY = 128


@pytest.fixture(scope="module")
def tapped(tmp_path_factory: pytest.TempPathFactory, wide_llama: str) -> tuple[Path, list[list[int]]]:
    folder = tmp_path_factory.mktemp("tap")
    (folder / "sitecustomize.py").write_text(TAP)
    (folder / "logs").mkdir()
    environment = os.environ | {"PYTHONPATH": str(folder), "TAP_FOLDER": str(folder / "logs")}
    run = subprocess.run(
        [sys.executable, "-c", RUN, wide_llama],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return folder / "logs", json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Layers heavy enough that three devices are better than one."""
    from transformers import LlamaConfig

    from process.conftest import save_random

    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=9,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return save_random(config, tmp_path_factory.mktemp("wide-llama"))


def frames_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_the_answer_is_that_of_the_uncut_model(tapped: tuple[Path, list[list[int]]], wide_llama: str) -> None:
    import torch

    from process.conftest import load_unsharded

    expected = load_unsharded(wide_llama).generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False)
    assert tapped[1] == expected.tolist()


@pytest.mark.parametrize("name", ["stranger", "other"])
def test_strangers_see_no_ids_and_no_logits(tapped: tuple[Path, list[list[int]]], name: str) -> None:
    frames = frames_of(tapped[0] / f"{name}.jsonl")
    steps = [frame for frame in frames if frame["tensors"] and frame["sender"] != "caller"]
    assert len(steps) >= 8  # prompt and tokens came by
    told = {token for tokens in tapped[1] for token in tokens}
    for frame in frames:
        for dtype, shape, values in frame["tensors"]:
            assert VOCABULARY not in shape[-1:], "logits"
            is_mask = set(values) <= {0.0, 1.0}
            assert dtype.startswith("torch.float") or is_mask or dtype == "torch.uint8", "ids"
            assert dtype != "torch.uint8" or not any(values), "a probe's payload is zeros"
            if not dtype.startswith("torch.float") and not is_mask:
                assert not told & {int(value) for value in values}


def test_the_tap_sees_what_there_is_to_see(tapped: tuple[Path, list[list[int]]]) -> None:
    mine = frames_of(tapped[0] / "mine.jsonl")
    caller = frames_of(tapped[0] / "caller.jsonl")
    ids = [values for frame in mine for dtype, _, values in frame["tensors"] if dtype == "torch.int64"]
    assert [float(token) for token in PROMPT] in ids
    assert any(shape[-1:] == [VOCABULARY] for frame in caller for _, shape, _ in frame["tensors"])
