"""A cluster whose devices and links can be made to fail while models run on it.

Knows how to bring about a fault; not what a test expects of it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

from lingualinked.cluster.cluster import Cluster
from lingualinked.cluster.messaging.pending import results_of
from lingualinked.device import CALLER
from lingualinked.errors import ArgumentError, StepTimeoutError, WorkerDiedError
from lingualinked.interrupts import interruptible

_SEEN_WITHIN_S = 30.0
_LOOK_S = 1e-3

Ends = tuple[str, str]


class FaultyCluster(Cluster):
    """A `Cluster` for tests, with methods that bring about faults; the fixture ``cluster`` is one.

    Takes the arguments of `Cluster`. Closing it ends all workers, whatever has been done to them.

    Examples
    --------
    >>> with FaultyCluster(2, timeout_s=5) as cluster:  # doctest: +SKIP
    ...     with cluster.cut(("worker-0", "worker-1")):
    ...         ...  # steps that need this link raise StepTimeoutError
    ...     cluster.kill("worker-1")
    """

    _cuts: frozenset[Ends] = frozenset()

    @property
    def is_harmed(self) -> bool:
        """Whether a worker has ended or behaves as another device than it was made as, or a link is cut."""
        return self.is_throttled or bool(self._cuts) or bool(self._engine.ended_devices())

    @interruptible
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

    @interruptible
    def cut(self, what: str | Ends) -> contextlib.ExitStack:
        """Cut a link, or all links of a device: messages no longer arrive; return once that is in force.

        Nobody is told. Who waits for an answer over the link waits until it is restored, or raises `StepTimeoutError` after
        ``timeout_s``. Nothing is lost: what is sent meanwhile arrives when the link is restored, as over a connection
        that was interrupted (up to 1 GiB per link). Closing the cluster does not need the link.

        Parameters
        ----------
        what : str or (str, str)
            The name of a device, or of source and target of one link, where ``"caller"`` is this process. The link in the
            other direction is another link.

        Returns
        -------
        contextlib.ExitStack
            Restores at the end of a ``with`` block what was cut here; need not be used.

        Raises
        ------
        ArgumentError
            If there is no such device or link.
        ClosedError, StepTimeoutError
            If a worker can't be told.
        """
        added = self._links_of(what) - self._cuts
        self._change_cuts(self._cuts | added)
        restoring = contextlib.ExitStack()
        restoring.callback(self._restore, added)
        return restoring

    @interruptible
    def restore(self, what: str | Ends | None = None) -> None:
        """Restore a link, or all links of a device, or everything that is cut; does nothing once the cluster is closed.

        Parameters
        ----------
        what : str, (str, str) or None
            As in `cut`; ``None``: everything.

        Raises
        ------
        ArgumentError
            If there is no such device or link.
        StepTimeoutError
            If a worker can't be told.
        """
        self._restore(self._cuts if what is None else self._links_of(what))

    def _restore(self, links: frozenset[Ends]) -> None:
        if not self.closed:
            self._change_cuts(self._cuts - links)

    def _links_of(self, what: str | Ends) -> frozenset[Ends]:
        names = [CALLER, *(device.name for device in self.devices)]
        links = {(source, target) for source in names for target in names if source != target}
        if isinstance(what, str):
            self.device(what)
            return frozenset(link for link in links if what in link)
        if what not in links:
            raise ArgumentError(f"no link {what!r}: give the name of a device, or two different ones of {names}")
        return frozenset([what])

    def _change_cuts(self, cuts: frozenset[Ends]) -> None:
        from lingualinked.protocol.messages import CutLinks  # imports torch

        self._engine.check_open()
        with self._changes:
            concerned = {target for _, target in self._cuts ^ cuts}
            told = []
            for name in sorted(concerned - {CALLER} - self._engine.ended_devices()):
                with contextlib.suppress(WorkerDiedError):
                    self._engine.wait_for_worker(name, self.timeout_s)
                senders = tuple(sorted(source for source, target in cuts if target == name))
                message = CutLinks(request=self._engine.next_request(), senders=senders)
                told.append(self._engine.request(name, message, "cutting links", self.timeout_s))
            while told:
                with contextlib.suppress(WorkerDiedError):
                    results_of([told.pop(0)])
            self._engine.cut_links([source for source, target in cuts if target == CALLER])
            self._cuts = cuts
