"""A cluster whose devices can be made to fail while models run on it.

Knows how to bring about a fault; not what a test expects of it.
"""

from __future__ import annotations

import os
import signal
import time

from lingualinked.cluster.cluster import Cluster
from lingualinked.errors import ArgumentError, StepTimeoutError

_SEEN_WITHIN_S = 30.0
_LOOK_S = 1e-3


class FaultyCluster(Cluster):
    """A `Cluster` for tests, with methods that bring about faults; the fixture ``cluster`` is one.

    Takes the arguments of `Cluster`. Closing it ends all workers, whatever has been done to them.

    Examples
    --------
    >>> with FaultyCluster(2) as cluster:  # doctest: +SKIP
    ...     cluster.kill("worker-1")
    """

    @property
    def is_harmed(self) -> bool:
        """Whether a worker has ended or behaves as another device than it was made as."""
        return self.is_throttled or bool(self._engine.ended_devices())

    def kill(self, name: str) -> None:
        """Kill the worker of a device with ``SIGKILL``; return once the cluster knows that it has ended.

        Whatever needs the worker then raises `WorkerDiedError`. The other workers go on.

        Parameters
        ----------
        name : str
            Of the device.

        Raises
        ------
        ArgumentError
            If there is no such device, or its worker has ended already.
        ClosedError
            If the cluster has been closed.
        StepTimeoutError
            If the process does not end.
        """
        self.device(name)
        self._engine.check_open()
        pid = self.pids.get(name)
        if pid is None:
            raise ArgumentError(f"the worker on device {name!r} has ended already: there is nothing to kill")
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + _SEEN_WITHIN_S
        while name not in self._engine.ended_devices():
            if time.monotonic() > deadline:
                raise StepTimeoutError(f"worker {pid} on device {name!r} did not end within {_SEEN_WITHIN_S:g} s")
            time.sleep(_LOOK_S)
