"""What a daemon may do to a caller that trusts its key: it gets a `DaemonError` at most, as readable text."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import msgspec
import pytest
import zmq

import lingualinked as ll
from lingualinked.protocol.daemon import (
    Beat,
    Enter,
    Entered,
    FromDaemon,
    HostFacts,
    Refused,
    WorkerEnded,
    WorkerLeased,
    decode_to_daemon,
    encode,
)
from lingualinked.transport.keys.key_files import make_key
from lingualinked.transport.keys.keys import generate_keypair
from lingualinked.versions import installed_versions

pytestmark = pytest.mark.process

EVIL = "\x1b]0;evil\x07"
FACTS = HostFacts(
    name=EVIL,
    versions=installed_versions(),
    system="",
    processor=EVIL,
    num_cores=1,
    threads=1,
    accelerator="cpu",
    memory_bytes=1,
    available_bytes=1,
    leasable_bytes=None,
    free_disk_bytes=1,
    host_id="",
    allows_relays=False,
    advertise=None,
)
ENTERED = Entered(facts=FACTS)
LEASED = WorkerLeased(name="a", memory_bytes=1 << 30, threads=1, accelerator="cpu")
Start = Callable[..., ll.Device]


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start what answers `Enter` with the given messages, so many times, and then closes the connection."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
    make_key("default")
    with contextlib.ExitStack() as ends:
        context = ends.enter_context(zmq.Context())
        router = ends.enter_context(context.socket(zmq.ROUTER))
        router.linger = router.sndhwm = 0
        keys = generate_keypair()
        router.curve_server = True
        router.curve_publickey, router.curve_secretkey = keys.public.encode(), keys.secret.encode()
        port = router.bind_to_random_port("tcp://127.0.0.1")

        def make(*messages: FromDaemon, times: int = 1) -> ll.Device:
            def serve() -> None:
                assert router.poll(30_000)
                caller, payload = router.recv_multipart()
                assert isinstance(decode_to_daemon(payload), Enter)
                for _ in range(times):
                    for message in messages:
                        router.send_multipart([caller, encode(message)])

            thread = threading.Thread(target=serve)
            thread.start()
            ends.callback(thread.join)
            return ll.Device(name="a", address=f"tcp://127.0.0.1:{port}", server_key=keys.public)

        yield make


@pytest.mark.parametrize(
    "messages",
    [
        (Refused(reason=EVIL),),
        (WorkerEnded(name="a", how=EVIL),),
        (LEASED,),
        (ENTERED, ENTERED),
        (ENTERED, LEASED, LEASED),
        (msgspec.structs.replace(ENTERED, facts=msgspec.structs.replace(FACTS, advertise=EVIL)), LEASED),
    ],
)
def test_what_it_says_is_readable_and_due(start: Start, messages: tuple[FromDaemon, ...]) -> None:
    device = start(*messages)
    with pytest.raises(ll.LingualinkedError, match=r"evil|is not due") as caught:
        ll.Cluster([device]).wait()
    assert "\x1b" not in str(caught.value)


def test_a_flood_is_cut_off(start: Start) -> None:
    with pytest.raises(ll.DaemonError, match="too many messages"):
        ll.Cluster([start(Beat(), times=50_000)])
