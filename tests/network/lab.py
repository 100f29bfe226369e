"""The machines of most network tests: a laptop with a checkpoint and a key, and two daemons that have neither.

Knows how a model is opened, asked and closed there; not what a test expects of it.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from network.hosts import Network
from network.machines import Caller, CallerError, Daemon, own_key
from network.uncut import PROMPT
from waiting import wait_until

log = logging.getLogger("network")
"""For what was seen: durations, bytes. ``make test-network`` shows it."""

GONE_S = 5.0
"""Until the workers of a caller that is gone are gone."""

NAMED_S = 2.0
"""Until a call that needs a killed daemon's worker raises."""

SLACK = 3
"""Bounds above count so many times: this machine does much else."""

SPANS = [("attic-nas", 0, 3), ("cellar-pi", 3, 8)]
OTHER_SPANS = [("attic-nas", 0, 5), ("cellar-pi", 5, 8)]

OPEN = """
import torch
cluster = ll.Cluster([{devices}])
model = ll.ShardedModel.from_pretrained(path, cluster=cluster, plan=ll.Plan.from_spans([tuple(each) for each in spans]), progress=False)
"""

GENERATE = """
generated = model.generate(torch.tensor([prompt]), max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False)
result = generated[0].tolist()
"""

CLOSE = "model.close(); cluster.close()"


class Lab:
    """A laptop with a checkpoint and a key, and two daemons that have neither the checkpoint nor anything else of it."""

    def __init__(self, network: Network, checkpoint: Path) -> None:
        self.network = network
        self.laptop = network.add("laptop")
        self.hosts = [network.add("attic-nas"), network.add("cellar-pi")]
        self.checkpoint = checkpoint
        key = own_key(self.laptop)
        for host in self.hosts:
            host.hidden.append(checkpoint)
        self.daemons = [Daemon(host, clients=[key]) for host in self.hosts]
        self.caller = Caller(self.laptop)
        for daemon in self.daemons:
            daemon.wait()
        self.devices = ", ".join(daemon.device() for daemon in self.daemons)

    def open(self, caller: Caller | None = None, spans: list[tuple[str, int, int]] = SPANS) -> None:
        """Place the checkpoint on both daemons."""
        (caller or self.caller).run(OPEN.format(devices=self.devices), path=str(self.checkpoint), spans=spans)

    def tokens(self, num_new: int = 12, caller: Caller | None = None) -> list[int]:
        """Generate greedily there."""
        return (caller or self.caller).run(GENERATE, num_new=num_new, prompt=PROMPT)

    def close(self) -> None:
        """Close what the caller may have opened, and see that no worker is left."""
        with contextlib.suppress(CallerError):  # it has opened nothing
            self.caller.run(CLOSE)
        wait_until(self.are_idle, GONE_S * SLACK)

    def are_idle(self) -> bool:
        """Whether no daemon has a worker."""
        return not any(daemon.worker_pids for daemon in self.daemons)
