"""A caller that describes, measures in bytes and plans a model of the shape of a 70B one; prints the most memory it had, in MiB."""

from __future__ import annotations

import sys
from pathlib import Path

import lingualinked as ll
from lingualinked.sharded.loading.arguments import LoadArguments
from lingualinked.sharded.loading.describing import describe
from lingualinked.sharded.loading.model_code import ModelCode


def main(folder: str) -> None:
    """Plan the model of a folder for 16 devices."""
    described = describe(LoadArguments.of(folder, load_format="dummy"))
    ModelCode(described.meta)
    workload = ll.Workload(num_sessions=4)
    devices = [
        ll.Device(name=f"d{index}", address=f"tcp://10.0.0.{index + 1}:5600", memory="12GiB") for index in range(16)
    ]
    specs = {device.name: ll.DeviceSpecs(flops="5TFLOP/s", memory_bandwidth="80GB/s") for device in devices}
    plan = ll.solve(described.estimate(devices, specs, None, workload), workload=workload)
    assert plan.num_layers == 80
    # Not by getrusage, whose maximum counts what the process that forked this one had.
    most = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    sys.stdout.write(f"{int(most.split()[1]) // 1024}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
