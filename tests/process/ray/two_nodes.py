"""A Ray cluster of two nodes on this machine, until standard input ends; a program.

It prints its process id and the cluster's address. Each node has an address of its own on the loopback interface, as two
machines have.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from ray.cluster_utils import Cluster

LEAST_STORE_BYTES = 80 << 20  # Ray takes no less


def main() -> None:
    """Run it."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: names of sockets may have 107 characters
    os.environ["RAY_TMPDIR"] = folder
    Path(folder, "ray").mkdir()
    node = {"num_cpus": 2, "object_store_memory": LEAST_STORE_BYTES}
    head = {**node, "node_ip_address": "127.0.0.2", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(**node, node_ip_address="127.0.0.3")
        sys.stdout.write(f"{os.getpid()} {cluster.address}\n")
        sys.stdout.flush()
        sys.stdin.read()
    finally:
        cluster.shutdown()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
