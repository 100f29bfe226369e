"""One example of every message that crosses a socket.

Knows their fields; not what is done with them.
"""

from __future__ import annotations

from typing import get_args, get_origin

import msgspec

from lingualinked.environment import Environment
from lingualinked.model.adapters.adapter_data import AdaptedModule, Adapter
from lingualinked.model.context import MaskMode, PositionMode
from lingualinked.model.spec import CheckpointFile, ModelSpec
from lingualinked.protocol import messages
from lingualinked.protocol.boot import Emulation
from lingualinked.protocol.moving import JoinedRows, KVSlice, SessionState, StateSlice
from lingualinked.protocol.steps import StageTimes, Step
from lingualinked.rounding import Rounding
from lingualinked.telemetry.reports import WorkerSnapshot
from lingualinked.telemetry.samples import DeviceSample
from lingualinked.transport.sockets.tcp_listener import TcpEndpoint
from lingualinked.versions import Versions

TYPES = [
    kind
    for kind in vars(messages).values()
    if isinstance(kind, type) and issubclass(kind, messages.Message) and kind.__struct_config__.tag is not None
]
TIMES = StageTimes(received_bytes=2000, hop_us=400, wait_us=60_000, compute_us=30_000_000, codec_us=150)
STEP = Step(
    model=3,
    plan_version=1000,
    stage=1,
    session=1_000_000,
    number=100_000,
    keeps_kv=True,
    layout=(True, False),
    mask=MaskMode.EXTEND,
    positions=PositionMode.FROM_MASK,
    position_rows=8,
    logits_to_keep=1,
    edits=(),
    rope_reach=0,
    sent_us=2**32 - 1,
    timings=(TIMES, TIMES, TIMES),
)
SPEC = ModelSpec(
    class_name="LlamaForCausalLM",
    config_json="{}",
    dtype="bfloat16",
    attn_implementation=None,
    load_format="safetensors",
    files=(CheckpointFile(path="/a", device=2**63, inode=2**64 - 1, num_bytes=9, mtime_ns=-1, ctime_ns=10**18),),
)
VALUES = {
    "spec": SPEC,
    "emulation": Emulation(slowdown=2.0, links=(), delayed_from=()),
    "edits": (),
    "shortcut_targets": (messages.ShortcutTarget(stage=2, name="b", shortcuts=("input_ids", "model.embed_tokens")),),
    "shortcut_sources": ((0, "a"),),
    "adapter": Adapter("default", 3, (AdaptedModule("lm_head", 8, 2.0, False, False, ("lora_A.default.weight",)),)),
    "timings": (TIMES,),
    "slices": (KVSlice(slot=1, first=0, position=5, capacity=64, rows=(1, 0)),),
    "states": (
        StateSlice(slot=2, version=3, tensors=(("keys", "values"),), plain={"num_seen": 9, "dtype": "torch.float32"}),
    ),
    "parts": (JoinedRows(session=1, number=3, edits=()),),
    "state": SessionState(
        number=3,
        num_tokens=9,
        records_past=True,
        reserved_tokens=9,
        has_mask=False,
        has_positions=False,
        has_source_mask=False,
        lags={},
    ),
    "layout": None,
    "rounding": Rounding("0123456789abcdef", 2),
    "environment": Environment(
        host="nas",
        host_id="b0",
        machine="a0",
        versions=Versions("0.1.0", "2.13.0+cpu", "5.23.0", "3.12.3"),
        processor="EPYC",
        cpu_capability="AVX2",
        accelerator="",
        threads=2,
    ),
    "endpoint": TcpEndpoint(host="::", ports=(5601, 5699), advertise="nas.lan:5601-5699"),
    "max_kv_tokens": None,
    "max_cache_len": 64,
    "first": 2**31,
    "file": 3,
    "start": 2**40,
    "num_bytes": 2**20,
    "checksum": 2**64 - 1,
    "logits_to_keep": 1,
    "least_rows": 2,
    "num_stages": 3,
    "source": 0,
    "steps": (STEP, STEP),
    "num_steps": 64,
    "run_steps": 63,
    "position_rows": 8,
    "worker": WorkerSnapshot(
        device="a", pid=7, threads=1, resident_bytes=2**40, idle_resident_bytes=2**30, num_refused=0
    ),
    "device": DeviceSample(
        time_s=0.5, device="a", held_bytes=0, available_bytes=9, cpu_percent=0.5, temperature_c=40.5
    ),
}
BY_TYPE = {"int": 7, "str": "text", "bool": True, "float": 0.5}


def example(kind: type[messages.Message]) -> messages.Message:
    fields = {}
    for field in msgspec.structs.fields(kind):
        if field.name in VALUES:
            fields[field.name] = VALUES[field.name]
        elif (origin := get_origin(field.type)) in (tuple, dict):
            fields[field.name] = origin()
        elif type(None) in get_args(field.type):
            fields[field.name] = None
        elif isinstance(field.type, type) and hasattr(field.type, "__members__"):
            fields[field.name] = next(iter(field.type))
        else:
            fields[field.name] = BY_TYPE[field.type.__name__]
    return kind(**fields)
