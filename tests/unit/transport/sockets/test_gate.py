from __future__ import annotations

import socket
import sys
import threading

import pytest

from lingualinked.transport.sockets.gate import MOST_WAITING, Gate

WAIT_S = 30.0


def start_connecting(address: tuple[str, int]) -> socket.socket:
    client = socket.socket()
    client.setblocking(False)
    assert client.connect_ex(address) in (0, 115)
    return client


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux filters what comes to a socket")
def test_a_closed_gate_keeps_new_connections_waiting_and_leaves_others_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(WAIT_S)
        gate = Gate(listener)
        with (
            socket.create_connection(listener.getsockname(), timeout=WAIT_S) as before,
            listener.accept()[0] as other_end,
        ):
            # 1) closed, from another thread
            thread = threading.Thread(target=gate.adjust, args=(MOST_WAITING,))
            thread.start()
            thread.join()
            assert gate.is_closed
            with start_connecting(listener.getsockname()) as client:
                listener.settimeout(0.05)
                with pytest.raises(TimeoutError):
                    listener.accept()
                before.sendall(b"as ever")
                assert other_end.recv(100) == b"as ever"
                # 2) opened: what waits comes in by itself
                gate.adjust(MOST_WAITING // 2)
                assert not gate.is_closed
                listener.settimeout(WAIT_S)
                with listener.accept()[0] as accepted:
                    assert accepted.getpeername() == client.getsockname()


def test_it_closes_at_a_limit_and_opens_at_half_of_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        gate = Gate(listener)
        seen = []
        for num_waiting in (MOST_WAITING - 1, MOST_WAITING, MOST_WAITING // 2 + 1, MOST_WAITING // 2, MOST_WAITING - 1):
            gate.adjust(num_waiting)
            seen.append(gate.is_closed)
    assert seen == ([False, True, True, False, False] if sys.platform == "linux" else [False] * 5)


def test_the_gate_of_a_socket_that_is_closed_has_no_effect() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        gate = Gate(listener)
    gate.adjust(MOST_WAITING)
    assert not gate.is_closed
