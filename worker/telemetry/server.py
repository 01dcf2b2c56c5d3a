"""``/metrics``, ``/health`` and ``/ready`` over HTTP.

Served from threads of its own, so that it answers even while the event loop is busy. It may face
a whole network: a connection gets one request, few bytes and little time, and there are never
more than a few at once.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.client import LineTooLong
from http.server import BaseHTTPRequestHandler
from typing import Any

from worker.errors import WorkerError
from worker.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

_MAX_CONNECTIONS = 16
_QUEUE = 128
"""Connections that wait to be taken, so that a scrape gets its turn in a flood of others."""
_MAX_REQUEST_BYTES = 16 * 1024
"""Request line and headers together."""
_MAX_SECONDS = 10.0
"""From the connection to the end of the answer."""
_SILENCE_SECONDS = 5.0
_TICK = 0.5
"""Seconds between two looks for overdue connections, as long as there is a connection."""
_TEXT = "text/plain; charset=utf-8"

Readiness = Callable[[], Sequence[str]]
"""Why the worker is not ready, in sentences; empty means it is."""


class Server:
    """Serves one worker's metrics and health from ``start()`` to ``stop()``."""

    def __init__(self, metrics: Metrics, readiness: Readiness, *, address: str, port: int) -> None:
        """``address`` empty: all, IPv6 and IPv4. ``port`` 0: any that is free."""
        self._metrics = metrics
        self._readiness = readiness
        self._address = address
        self._port = port
        self._listener: _Listener | None = None
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The port in use."""
        return self._listener.server_address[1] if self._listener else self._port

    def start(self) -> None:
        """Raises WorkerError where the address or the port cannot be had."""
        self._listener = _listen(self._address, self._port)
        self._listener.answer = self._answer
        self._thread = threading.Thread(target=self._listener.serve, name="metrics", daemon=True)
        self._thread.start()
        logger.info("serving /metrics, /health and /ready on port %d", self.port)

    def stop(self) -> None:
        """Stop listening; a second call does nothing."""
        if self._listener is None or self._thread is None:
            return
        self._listener.stop()
        self._thread.join()
        self._listener.server_close()
        self._listener = self._thread = None

    def _answer(self, path: str, accept: str) -> tuple[HTTPStatus, str, bytes]:
        if path == "/metrics":
            body, content_type = self._metrics.render(accept)
            return HTTPStatus.OK, content_type, body
        if path == "/health":
            return _json(HTTPStatus.OK, {"status": "healthy"})
        if path == "/ready":
            reasons = list(self._readiness())
            if reasons:
                return _json(
                    HTTPStatus.SERVICE_UNAVAILABLE, {"status": "not ready", "reasons": reasons}
                )
            return _json(HTTPStatus.OK, {"status": "ready"})
        return HTTPStatus.NOT_FOUND, _TEXT, b"not found; try /metrics, /health or /ready\n"


def _json(status: HTTPStatus, document: dict[str, Any]) -> tuple[HTTPStatus, str, bytes]:
    return status, "application/json", json.dumps(document).encode() + b"\n"


def _listen(address: str, port: int) -> _Listener:
    # "::" without IPV6_V6ONLY takes IPv4 as well; some hosts have no IPv6 at all
    candidates = ["::", "0.0.0.0"] if address in ("", "::") else [address]  # noqa: S104
    for candidate in candidates:
        try:
            return _Listener(candidate, port)
        except OSError as error:
            no_ipv6 = error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
            if no_ipv6 and candidate != candidates[-1]:
                continue
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                advice = "set METRICS_PORT (--metrics-port) to a free port from 1024, or to 0"
            else:
                advice = "set METRICS_ADDR (--metrics-addr) to an address of this machine"
            raise WorkerError(
                f"metrics cannot be served on {address or 'all addresses'}, port {port}: "
                f"{error.strerror or error}; {advice}"
            ) from error
    raise AssertionError("the last candidate returns or raises")


class _Listener(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = _QUEUE
    server_address: tuple[str, int]
    answer: Callable[[str, str], tuple[HTTPStatus, str, bytes]]

    def __init__(self, address: str, port: int) -> None:
        family, _, _, _, where = socket.getaddrinfo(
            address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        self.address_family = family
        self._free = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        self._lock = threading.Lock()
        self._open: dict[socket.socket, float] = {}
        self._stopped = False
        super().__init__((str(where[0]), port), _Handler)

    def serve(self) -> None:
        """Until stop(). Nothing wakes this thread while nobody is connected."""
        while not self._stopped:
            self.timeout = _TICK if self._open else None
            self.handle_request()
            self.service_actions()

    def stop(self) -> None:
        self._stopped = True
        self.socket.shutdown(socket.SHUT_RDWR)  # serve() then has a request that cannot be had

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            logger.debug("too many connections, closed the one from %s", client_address[0])
            self.shutdown_request(request)
            return
        with self._lock:
            self._open[request] = time.monotonic() + _MAX_SECONDS
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread to be had
            self._done(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._done(request)

    def _done(self, request: socket.socket) -> None:
        with self._lock:
            self._open.pop(request, None)
        self._free.release()

    def service_actions(self) -> None:
        """At every tick: end what takes too long, such as a client that sends byte by byte."""
        now = time.monotonic()
        with self._lock:
            overdue = [request for request, end in self._open.items() if end < now]
        for request in overdue:
            try:
                request.shutdown(socket.SHUT_RDWR)
            except OSError as error:  # it ended by itself meanwhile
                logger.debug("closing a slow connection: %s", error)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("connection from %s broke", client_address[0], exc_info=True)


class _Budget(io.BufferedIOBase):
    """A stream of lines that ends in LineTooLong after so many bytes."""

    def __init__(self, stream: io.BufferedIOBase, size: int) -> None:
        self._stream = stream
        self._left = size

    def readline(self, size: int | None = -1, /) -> bytes:
        line = self._stream.readline(self._left + 1)
        self._left -= len(line)
        if self._left < 0:
            raise LineTooLong("request")
        return line

    def close(self) -> None:
        self._stream.close()


class _Handler(BaseHTTPRequestHandler):
    server: _Listener
    timeout = _SILENCE_SECONDS
    default_request_version = "HTTP/1.0"  # no answer without a head, as version 0.9 had it

    def setup(self) -> None:
        super().setup()
        self.rfile = _Budget(self.rfile, _MAX_REQUEST_BYTES)

    def handle_one_request(self) -> None:
        self.close_connection = True
        self.requestline = self.request_version = self.command = ""
        try:
            super().handle_one_request()
        except LineTooLong:  # in the request line; in the headers the base class answers
            self.send_error(HTTPStatus.REQUEST_URI_TOO_LONG)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        try:
            status, content_type, body = self.server.answer(path, self.headers.get("Accept", ""))
        except Exception:
            logger.exception("answering %s failed", path)
            status, content_type, body = HTTPStatus.INTERNAL_SERVER_ERROR, _TEXT, b"see the log\n"
        self._send(status, content_type, body)

    do_HEAD = do_GET  # noqa: N815 - the base class's name

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Short and in plain text; a method that we do not have is 405, not 501."""
        status = HTTPStatus(code)
        if status is HTTPStatus.NOT_IMPLEMENTED:
            status = HTTPStatus.METHOD_NOT_ALLOWED
        self._send(status, _TEXT, f"{status.phrase.lower()}\n".encode())

    def _send(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        return "ffmpeg-worker"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        logger.debug("%s %s", self.address_string(), format % args)
