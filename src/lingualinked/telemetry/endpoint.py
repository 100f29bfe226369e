"""An HTTP endpoint that serves a pipeline's metrics to Prometheus.

Knows HTTP and threads; gets new metrics for each scrape, and does not interpret them.
"""

from __future__ import annotations

import logging
import os
import socket
import socketserver
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from lingualinked.checks import is_integer
from lingualinked.errors import ArgumentError, ResourceError
from lingualinked.interrupts import uninterrupted
from lingualinked.own_threads import close_from_here
from lingualinked.telemetry.metrics import Reading, new_registry

logger = logging.getLogger("lingualinked.telemetry")

_MAX_REQUESTS = 16  # at the same time; further connections are closed immediately
_SILENCE_S = 10.0  # the longest pause of a client within its request
_STOP_S = 5.0  # the longest that closing waits for a request in progress


class MetricsEndpoint:
    """An HTTP endpoint with a model's metrics, which runs until it or the model is closed.

    Start it with `Telemetry.serve`. Every scrape queries the workers. Any path answers; ``/metrics`` is the convention. Also a
    context manager.

    Attributes
    ----------
    address : str
        The address that it listens on.
    port : int
        Its port; the chosen one if 0 was requested.
    url : str
        The URL for Prometheus to scrape.
    """

    def __init__(self, read: Callable[[], Reading], port: int, address: str) -> None:
        if not is_integer(port, at_least=0) or port >= 2**16:
            raise ArgumentError(
                f"port={port!r} is not a valid port: pass an integer from 1 to 65535, or 0 for a free port"
            )
        if not isinstance(address, str) or not address:
            raise ArgumentError(
                f"address={address!r} is not a valid address: pass a host name or IP address of this machine"
            )
        registry = new_registry(read)
        from prometheus_client import make_wsgi_app

        try:
            self._server = _Server(address, port)
        except OSError as error:
            raise ArgumentError(
                f"metrics can't be served at port {port} of {address!r}: {error.strerror or error}; pass another port, "
                "0 for a free one, or another address of this machine"
            ) from error
        self._server.set_app(make_wsgi_app(registry))
        self._owner_pid = os.getpid()
        self.address = address
        self.port = self._server.server_port
        self.url = f"http://{f'[{address}]' if ':' in address else address}:{self.port}/metrics"
        # Only its thread refers to it, so the user need not keep it, and it is freed once it is closed.
        self._thread = threading.Thread(target=self._run, name="lingualinked-metrics", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            self._server.server_close()
            raise ResourceError(
                "can't start a thread to serve metrics: raise the limit of threads, or end other threads"
            ) from error

    def _run(self) -> None:
        self._server.serve_forever()

    @property
    def closed(self) -> bool:
        """Whether it has been closed, by `close` or with its model."""
        return self._server.is_closing

    @uninterrupted
    def close(self) -> None:
        """Stop serving; returns when the port is free and all threads have ended. A second call does nothing."""
        self._server.is_closing = True
        if os.getpid() != self._owner_pid:  # a forked child has the socket but none of the threads
            self._server.server_close()
        else:
            close_from_here(self._close)

    def _close(self) -> None:
        self._server.stop()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<MetricsEndpoint {self.url}{': closed' if self.closed else ''}>"


class _Handler(WSGIRequestHandler):
    timeout = _SILENCE_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in the base class
        logger.debug(format, *args)


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """Answers each request in its own thread, and tracks these threads, so that none outlives the server."""

    daemon_threads = True  # so that no client delays the end of the interpreter

    def __init__(self, address: str, port: int) -> None:
        self.is_closing = False
        self._requests: dict[threading.Thread, socket.socket] = {}
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family = found[0][0]
        super().__init__((address, port), _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own would query a name server
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002 - its signature
        return len(self._requests) < _MAX_REQUESTS

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(
            target=self.process_request_thread,
            args=(request, client_address),
            name="lingualinked-metrics-request",
            daemon=True,
        )
        self._requests[thread] = request
        try:
            thread.start()
        except RuntimeError:
            del self._requests[thread]
            raise  # the loop closes the connection and goes on

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._requests.pop(threading.current_thread(), None)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - its signature
        logger.debug("a request for metrics from %s has failed: %s", client_address, sys.exc_info()[1])

    def stop(self) -> None:
        """End the loop, then disconnect the clients and wait for their requests."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes the loop, which polls only twice a second
        self.shutdown()
        self.server_close()
        for thread, request in list(self._requests.items()):
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)
            thread.join(_STOP_S)
