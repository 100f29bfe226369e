"""Makes the parties of a cluster known to each other: who listens where, who accepts whom, and that they are connected.

Knows requests and who reaches whom; neither sockets nor threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from lingualinked.cluster.messaging.reach import Reach
from lingualinked.cluster.workers.remote_text import readable
from lingualinked.device import CALLER
from lingualinked.errors import UnreachableError, WorkerDiedError
from lingualinked.protocol.messages import (
    ConnectPeer,
    IntroduceWorker,
    Listening,
    ListenOverNetwork,
    PeerConnected,
)

Introduction = IntroduceWorker | ConnectPeer | ListenOverNetwork
_Steps = Generator[Sequence[Future[Any]], Sequence[object], None]  # what each step waits for; and the results of that


class Introductions:
    """Introduces workers to each other, each pair in steps.

    ``ask`` sends a request, made from its number, to a worker. ``connect`` connects the caller to a worker, and says why that
    did not work, or an empty text. ``admit`` is told of a worker that the caller is connected to, and returns the others.
    """

    def __init__(
        self,
        reach: Reach,
        public_keys: Mapping[str, str],
        ask: Callable[[str, Callable[[int], Introduction], str], Future[object]],
        connect: Callable[[str], Future[str]],
        admit: Callable[[str], Collection[str]],
    ) -> None:
        self._reach = reach
        self._public_keys = public_keys
        self._ask = ask
        self._connect = connect
        self._admit = admit
        # Through which device one party reaches another one, and what opens a relay there to an address.
        self.relay: Callable[[str, str], str | None] = lambda source, target: None
        self.open_relay: Callable[[str, str], Future[str]]

    def introduce(self, device: str, on_ready: Callable[[Exception | None], None]) -> None:
        """Introduce a worker and all others to each other; call ``on_ready`` in the end, with the first error if there was one.

        A worker that dies meanwhile holds nobody up.
        """
        outcomes: list[Exception] = []
        waiting: set[str] = set()

        def introduced(other: str, error: Exception | None) -> None:
            waiting.discard(other)
            is_death = isinstance(error, WorkerDiedError) and error.device in (device, other)  # or a relay's
            if error is not None and not is_death:
                outcomes.append(error)
            if not waiting:
                on_ready(outcomes[0] if outcomes else None)

        def met_caller(error: Exception | None) -> None:
            others = [] if error is not None else sorted(self._admit(device))
            waiting.update(others)
            if not others:
                on_ready(error)
            for other in others:
                self._run(self._meet(device, other), functools.partial(introduced, other))

        self._run(self._meet_caller(device), met_caller)

    def _meet_caller(self, device: str) -> _Steps:
        yield from self._lead_through_relay(CALLER, device)
        (why_not,) = yield [self._connect(device)]
        if why_not:
            raise UnreachableError(CALLER, device, self._reach.address(device, CALLER), str(why_not))

    def _meet(self, one: str, other: str) -> _Steps:
        pairs = [(one, other), (other, one)]
        # 1) the one that is on this host listens where the other one reaches it; or a relay does
        yield from self._listen(one, other)
        for pair in pairs:
            yield from self._lead_through_relay(*pair)
        # 2) each accepts the other: only then may one connect, since a refusal is final
        yield [self._introduce(*pair) for pair in pairs]
        # 3) over a network it may turn out that one can't reach the other
        if self._reach.uses_network(one, other):
            answers = yield [
                self._ask(to, functools.partial(ConnectPeer, name=about), f"connecting to {about!r}")
                for to, about in pairs
            ]
            for (to, about), connected in zip(pairs, answers, strict=True):
                assert isinstance(connected, PeerConnected)
                if connected.why_not:
                    raise UnreachableError(to, about, self._reach.address(about, to), readable(connected.why_not))

    def _listen(self, one: str, other: str) -> _Steps:
        missing = self._reach.missing_endpoint(one, other)
        if missing is not None:
            name, endpoint = missing

            def make(request: int) -> ListenOverNetwork:
                return ListenOverNetwork(request=request, endpoint=endpoint)

            (answer,) = yield [self._ask(name, make, "listening over the network")]
            assert isinstance(answer, Listening)
            self._reach.add_endpoint(name, endpoint.host, answer.address)

    def _lead_through_relay(self, source: str, target: str) -> _Steps:
        hub = self.relay(source, target)
        if hub is not None and self._reach.uses_network(source, target):
            yield from self._listen(target, hub)
            (address,) = yield [self.open_relay(hub, self._reach.address(target, hub))]
            self._reach.add_relay(source, target, str(address))

    def _introduce(self, to: str, about: str) -> Future[object]:
        def make(request: int) -> IntroduceWorker:
            return IntroduceWorker(
                request=request,
                name=about,
                public_key=self._public_keys[about],
                address=self._reach.address(about, to),
                same_host=self._reach.shares_host(about, to),
            )

        return self._ask(to, make, f"the introduction of {about!r}")

    def _run(
        self, steps: _Steps, on_done: Callable[[Exception | None], None], answers: Sequence[object] | None = None
    ) -> None:
        """Go on with each step once all that the one before waits for is there; stop at the first error."""
        try:
            futures = next(steps) if answers is None else steps.send(answers)
        except StopIteration:
            on_done(None)
            return
        except Exception as error:  # noqa: BLE001 - a device that was dropped meanwhile is not known; nobody may wait for ever
            on_done(error)
            return
        left = len(futures)

        def answered(_: Future[object]) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                errors = [error for error in (future.exception() for future in futures) if isinstance(error, Exception)]
                if errors:
                    on_done(errors[0])
                else:
                    self._run(steps, on_done, [future.result() for future in futures])

        for future in list(futures):
            future.add_done_callback(answered)
