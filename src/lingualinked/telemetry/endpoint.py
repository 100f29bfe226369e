"""An HTTP endpoint that serves a pipeline's metrics to Prometheus.

Knows HTTP and threads; what it serves is read anew for each scrape, and what that means is not its business.
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
from types import TracebackType
from typing import Any, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from lingualinked.checks import is_integer
from lingualinked.errors import ArgumentError, ResourceError
from lingualinked.interrupts import uninterrupted
from lingualinked.telemetry.metrics import Reading, new_registry

logger = logging.getLogger("lingualinked.telemetry")

_MAX_REQUESTS = 16  # at the same time; more connections are closed at once
_SILENCE_S = 10.0  # that a client may keep a request waiting for its next byte
_STOP_S = 5.0  # that a request under way may take once the endpoint is closing


class MetricsEndpoint:
    """Where Prometheus scrapes a model's metrics, until it is closed or the model is.

    Made by `Telemetry.serve`. Every scrape asks the workers anew. Any path answers, ``/metrics`` by convention. Also a
    context manager.

    Attributes
    ----------
    address : str
        Where it listens.
    port : int
        Its port; the one that was free where 0 was asked for.
    url : str
        What to tell Prometheus.
    """

    def __init__(self, read: Callable[[], Reading], port: int, address: str) -> None:
        if not is_integer(port, at_least=0) or port >= 2**16:
            raise ArgumentError(f"port={port!r} is not a port: give a whole number up to 65535, or 0 for a free port")
        if not isinstance(address, str) or not address:
            raise ArgumentError(f"address={address!r} is not an address: give a name or number of this machine")
        registry = new_registry(read)
        from prometheus_client import make_wsgi_app

        try:
            self._server = _Server(address, port)
        except OSError as error:
            raise ArgumentError(
                f"no metrics can be served at port {port} of {address!r}: {error.strerror or error}; give another port, "
                "0 for one that is free, or another address of this machine"
            ) from error
        self._server.set_app(make_wsgi_app(registry))
        self._owner_pid = os.getpid()
        self.address = address
        self.port = self._server.server_port
        self.url = f"http://{f'[{address}]' if ':' in address else address}:{self.port}/metrics"
        # Its thread alone keeps it: whoever serves need not hold it, and it goes once it is closed.
        self._thread = threading.Thread(target=self._run, name="lingualinked-metrics", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            self._server.server_close()
            raise ResourceError("no thread can be started to serve metrics: raise the limit, or end others") from error

    def _run(self) -> None:
        self._server.serve_forever()

    @property
    def closed(self) -> bool:
        """Whether it has been closed, by `close` or with its model."""
        return self._server.is_closing

    @uninterrupted
    def close(self) -> None:
        """Stop serving; returns once its port is free and its threads have ended. Does nothing the second time."""
        self._server.is_closing = True
        if os.getpid() != self._owner_pid:  # a forked child has the socket and none of the threads
            self._server.server_close()
        elif threading.current_thread().name.startswith("lingualinked-"):
            # A finalizer ran on a thread of ours, which can't wait for its own end.
            threading.Thread(target=self._close, name="closing-lingualinked").start()
        else:
            self._close()

    def _close(self) -> None:
        self._server.stop()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<MetricsEndpoint {self.url}{': closed' if self.closed else ''}>"


class _Handler(WSGIRequestHandler):
    timeout = _SILENCE_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in the base class
        logger.debug(format, *args)


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """Answers each request on a thread of its own, and knows them all, so that none outlives it."""

    daemon_threads = True  # an interpreter that ends waits for no client

    def __init__(self, address: str, port: int) -> None:
        self.is_closing = False
        self._requests: dict[threading.Thread, socket.socket] = {}
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family = found[0][0]
        super().__init__((address, port), _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks a name server for this machine's name
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
            raise  # the loop closes the connection, and goes on

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._requests.pop(threading.current_thread(), None)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - its signature
        logger.debug("a request for metrics from %s has failed: %s", client_address, sys.exc_info()[1])

    def stop(self) -> None:
        """End the loop, then the requests: their clients are hung up on, and what is asked of workers is waited for."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes the loop, which would look up twice a second only
        self.shutdown()
        self.server_close()
        for thread, request in list(self._requests.items()):
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)
            thread.join(_STOP_S)
