"""Makes the parties of a cluster known to each other: who listens where, who accepts whom, and that they are connected.

Knows requests and who reaches whom; neither sockets nor threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import Future

from lingualinked.cluster.reach import Reach
from lingualinked.cluster.remote_text import readable
from lingualinked.device import CALLER
from lingualinked.errors import LingualinkedError, UnreachableError, WorkerDiedError
from lingualinked.protocol.messages import (
    ConnectPeer,
    IntroduceWorker,
    Listening,
    ListenOverNetwork,
    PeerConnected,
)
from lingualinked.transport.tcp_listener import TcpEndpoint

Introduction = IntroduceWorker | ConnectPeer | ListenOverNetwork
_Ask = Callable[[str, Callable[[int], Introduction], str], "Future[object]"]
_Request = tuple[str, Callable[[int], Introduction], str]  # to whom, what by its number, and in words
_Steps = Generator[Sequence[_Request], Sequence[object], None]  # requests, and then their answers


class Introductions:
    """Introduces workers to each other, each pair in steps, all of which are requests that both answer.

    ``ask`` sends a request, made from its number, to a worker; ``await_connection`` tells why the caller is not connected to
    a worker, or an empty text once it is.
    """

    def __init__(
        self,
        reach: Reach,
        public_keys: Mapping[str, str],
        ask: _Ask,
        await_connection: Callable[[str, Callable[[str], None]], None],
    ) -> None:
        self._reach = reach
        self._public_keys = public_keys
        self._ask = ask
        self._await_connection = await_connection

    def introduce(self, device: str, others: Collection[str], on_ready: Callable[[Exception | None], None]) -> None:
        """Introduce a worker and others to each other; call ``on_ready`` in the end, with the first error if there was one.

        A worker that dies meanwhile holds nobody up.
        """
        outcomes: list[Exception] = []
        waiting = set(others)

        def introduced(other: str, error: Exception | None) -> None:
            waiting.discard(other)
            if error is not None and not isinstance(error, WorkerDiedError):
                outcomes.append(error)
            if not waiting:
                on_ready(outcomes[0] if outcomes else None)

        def caller_connected(reason: str) -> None:
            if reason:
                on_ready(UnreachableError(CALLER, device, self._reach.address(device, CALLER), reason))
                return
            if not waiting:
                on_ready(None)
            for other in sorted(others):
                self._run(self._steps(device, other), functools.partial(introduced, other))

        if self._reach.uses_network(CALLER, device):
            self._await_connection(device, caller_connected)
        else:
            caller_connected("")

    def _steps(self, one: str, other: str) -> _Steps:
        # 1) the one that is on this host listens where the other one reaches it
        missing = self._reach.missing_endpoint(one, other)
        if missing is not None:
            name, endpoint = missing
            (answer,) = yield [self._listening(name, endpoint)]
            assert isinstance(answer, Listening)
            self._reach.add_endpoint(name, endpoint.host, answer.address)
        # 2) each accepts the other: only then may one connect, since a refusal is final
        pairs = [(one, other), (other, one)]
        yield [self._introduction(*pair) for pair in pairs]
        # 3) over a network it may turn out that one can't reach the other
        if self._reach.uses_network(one, other):
            answers = yield [self._connecting(*pair) for pair in pairs]
            for (to, about), connected in zip(pairs, answers, strict=True):
                assert isinstance(connected, PeerConnected)
                if connected.why_not:
                    raise UnreachableError(to, about, self._reach.address(about, to), readable(connected.why_not))

    def _listening(self, name: str, endpoint: TcpEndpoint) -> _Request:
        return name, lambda request: ListenOverNetwork(request=request, endpoint=endpoint), "listening over the network"

    def _introduction(self, to: str, about: str) -> _Request:
        def make(request: int) -> IntroduceWorker:
            return IntroduceWorker(
                request=request,
                name=about,
                public_key=self._public_keys[about],
                address=self._reach.address(about, to),
                same_host=self._reach.shares_host(about, to),
            )

        return to, make, f"the introduction of {about!r}"

    def _connecting(self, to: str, about: str) -> _Request:
        return to, lambda request: ConnectPeer(request=request, name=about), f"connecting to {about!r}"

    def _run(
        self, steps: _Steps, on_done: Callable[[Exception | None], None], answers: Sequence[object] | None = None
    ) -> None:
        """Make the requests of each step once all of the step before are answered; stop at the first error."""
        try:
            requests = next(steps) if answers is None else steps.send(answers)
        except StopIteration:
            on_done(None)
            return
        except LingualinkedError as error:
            on_done(error)
            return
        futures = [self._ask(*request) for request in requests]
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
