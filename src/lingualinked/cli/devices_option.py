"""Reads ``--devices``, which all commands share.

Knows its text alone.
"""

from __future__ import annotations

from lingualinked.cluster.workers.devices import describe_cluster
from lingualinked.cluster_file import ClusterDescription


def read_devices(text: str) -> ClusterDescription:
    """Read a number of local CPU workers, the path of a cluster file, or addresses of daemons."""
    return describe_cluster(int(text) if text.isascii() and text.isdecimal() else text)
