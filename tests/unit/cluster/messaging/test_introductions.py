"""The steps in which workers learn of each other, with futures that the test completes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import pytest

from lingualinked.cluster.messaging.introductions import Introduction, Introductions
from lingualinked.cluster.messaging.reach import Reach, RemoteHost
from lingualinked.errors import UnreachableError, WorkerDiedError
from lingualinked.protocol.messages import (
    Acknowledged,
    ConnectPeer,
    IntroduceWorker,
    Listening,
    ListenOverNetwork,
    PeerConnected,
)


class Asked:
    """Introductions whose requests wait for the test to answer them."""

    def __init__(self) -> None:
        self.reach = Reach("me")
        self.reach.add_party("caller", "ipc:///run/0")
        self.waiting: list[tuple[str, Introduction, Future[object]]] = []
        self.connecting: dict[str, Future[str]] = {}
        self.admitted: list[str] = []
        self.ready: list[Exception | None] = []
        keys = {name: f"key of {name}" for name in ("here", "near", "nas", "pi")}
        self.introductions = Introductions(self.reach, keys, self.ask, self.connect, self.admit)

    def ask(self, to: str, make: Callable[[int], Introduction], what: str) -> Future[object]:
        future: Future[object] = Future()
        self.waiting.append((to, make(len(self.waiting)), future))
        return future

    def connect(self, name: str) -> Future[str]:
        future: Future[str] = Future()
        if self.reach.uses_network("caller", name):
            self.connecting[name] = future
        else:
            future.set_result("")
        return future

    def admit(self, name: str) -> list[str]:
        self.admitted.append(name)
        return self.admitted[:-1]

    def add(self, name: str) -> None:
        if name in ("nas", "pi"):
            self.reach.add_remote(name, RemoteHost(name, f"10.0.0.{len(name)}", "10.0.0.1"))
        self.reach.add_party(name, "tcp://0.0.0.0:5601" if name in ("nas", "pi") else f"ipc:///run/{name}")
        self.introductions.introduce(name, self.ready.append)

    def answer(self, answer: Callable[[str, Introduction], object]) -> list[tuple[str, Introduction]]:
        """Answer all that waits; return what that was."""
        waiting, self.waiting = self.waiting, []
        for to, message, future in waiting:
            future.set_result(answer(to, message))
        return [(to, message) for to, message, _ in waiting]


def acknowledge(_: str, message: Introduction) -> object:
    if isinstance(message, ListenOverNetwork):
        return Listening(request=message.request, address=f"tcp://{message.endpoint.host}:7")
    kind = PeerConnected if isinstance(message, ConnectPeer) else Acknowledged
    return kind(request=message.request, **({"why_not": ""} if kind is PeerConnected else {}))


def test_workers_of_this_host_are_introduced_and_ready() -> None:
    asked = Asked()
    asked.add("here")
    assert asked.ready == [None]
    asked.add("near")
    told = asked.answer(acknowledge)
    assert [(to, type(message), message.name, message.same_host) for to, message in told] == [  # type: ignore[union-attr]
        ("near", IntroduceWorker, "here", True),
        ("here", IntroduceWorker, "near", True),
    ]
    assert asked.ready == [None, None]


def test_over_a_network_they_listen_then_accept_then_connect() -> None:
    asked = Asked()
    asked.add("here")
    asked.add("nas")
    assert asked.waiting == []  # until the caller is connected itself
    asked.connecting["nas"].set_result("")
    assert [(to, type(message)) for to, message in asked.answer(acknowledge)] == [("here", ListenOverNetwork)]
    told = asked.answer(acknowledge)
    assert [(to, message.name, message.address, message.same_host) for to, message in told] == [  # type: ignore[union-attr]
        ("nas", "here", "tcp://10.0.0.1:7", False),
        ("here", "nas", "tcp://10.0.0.3:5601", False),
    ]
    assert [(to, type(message)) for to, message in asked.answer(acknowledge)] == [
        ("nas", ConnectPeer),
        ("here", ConnectPeer),
    ]
    assert asked.ready == [None, None]


def test_a_pair_that_can_not_connect_is_named() -> None:
    asked = Asked()
    asked.add("nas")
    asked.connecting["nas"].set_result("")
    asked.add("pi")
    asked.connecting["pi"].set_result("")
    asked.answer(acknowledge)
    asked.answer(lambda to, message: PeerConnected(request=message.request, why_not="refused" if to == "nas" else ""))
    error = asked.ready[-1]
    assert isinstance(error, UnreachableError)
    assert (error.source, error.target, error.address, error.cause) == ("nas", "pi", "tcp://10.0.0.2:5601", "refused")
    assert "device 'nas' can't connect to device 'pi' at tcp://10.0.0.2:5601 (refused)" in str(error)
    assert "links={('nas', 'pi'): ll.Link(relay=...)}" in str(error)


def test_a_worker_that_the_caller_can_not_reach_is_named() -> None:
    asked = Asked()
    asked.add("nas")
    asked.connecting["nas"].set_result("connection refused")
    (error,) = asked.ready
    assert isinstance(error, UnreachableError)
    assert "the caller can't connect to device 'nas' at tcp://10.0.0.3:5601 (connection refused)" in str(error)
    assert "Device(advertise=...)" in str(error)


@pytest.mark.parametrize("error", [WorkerDiedError("here", "killed"), ValueError("no")])
def test_the_death_of_another_one_holds_nobody_up_and_other_errors_are_told_once_all_is_done(error: Exception) -> None:
    asked = Asked()
    asked.add("here")
    asked.add("near")
    (_, first, one), (_, _, other) = asked.waiting
    other.set_exception(error)
    assert asked.ready == [None]
    one.set_result(Acknowledged(request=first.request))
    assert asked.ready == [None, None if isinstance(error, WorkerDiedError) else error]


def test_a_device_that_is_dropped_meanwhile_holds_nobody_up() -> None:
    asked = Asked()
    asked.add("here")
    asked.add("nas")
    asked.connecting["nas"].set_result("")
    asked.reach.forget("nas")
    asked.answer(acknowledge)
    assert [type(error) for error in asked.ready] == [type(None), KeyError]


def test_the_death_of_a_relay_is_told() -> None:
    asked, opened = Asked(), Future[str]()
    asked.introductions.relay = lambda source, target: "pi" if (source, target) == ("nas", "here") else None
    asked.introductions.open_relay = lambda hub, address: opened
    asked.add("here")
    asked.reach.add_remote("pi", RemoteHost("pi", "10.0.0.2", "10.0.0.1"))
    asked.add("nas")
    asked.connecting["nas"].set_result("")
    asked.answer(acknowledge)
    opened.set_exception(died := WorkerDiedError("pi", "its daemon has ended"))
    assert asked.ready == [None, died]


def test_a_pair_may_be_led_through_a_relay() -> None:
    asked, opened = Asked(), Future[str]()
    asked.introductions.relay = lambda source, target: "pi" if (source, target) == ("nas", "here") else None
    targets: list[tuple[str, str]] = []

    def open_relay(hub: str, address: str) -> Future[str]:
        targets.append((hub, address))
        return opened

    asked.introductions.open_relay = open_relay
    asked.add("here")
    asked.reach.add_remote("pi", RemoteHost("pi", "10.0.0.2", "10.9.9.9"))
    asked.add("nas")
    asked.connecting["nas"].set_result("")
    listening = asked.answer(acknowledge) + asked.answer(acknowledge)
    assert [(to, message.endpoint.host) for to, message in listening] == [("here", "10.0.0.1"), ("here", "10.9.9.9")]  # type: ignore[union-attr]
    assert targets == [("pi", "tcp://10.9.9.9:7")]  # as the relay reaches it
    assert asked.waiting == []
    opened.set_result("tcp://10.0.0.2:99")
    told = asked.answer(acknowledge)
    assert [(to, message.address) for to, message in told] == [  # type: ignore[union-attr]
        ("nas", "tcp://10.0.0.2:99"),
        ("here", "tcp://10.0.0.3:5601"),
    ]
    asked.answer(acknowledge)
    assert asked.ready == [None, None]
