"""The demo master's HTTP: connections, TLS, the key, and everything that can go wrong."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

from tests.fakes.routes import ROUTES, Call
from tests.fakes.shapes import RefusedError

if TYPE_CHECKING:
    from tests.fakes.master import FakeMaster

Kind = Literal["status", "garbage", "half", "hang", "drop", "lose"]


@dataclass
class Fault:
    """Something that goes wrong with the next ``count`` requests of a route.

    ``status`` answers with an error, ``garbage`` with something that is no protocol, ``drop``
    closes the connection, ``hang`` answers only when the master is released or closed; none
    of these does what was asked. ``lose`` does it and closes the connection without a word,
    ``half`` closes it in the middle of the answer.
    """

    route: str
    kind: Kind
    count: int = 1
    status: int = 500
    body: str = "Internal Server Error"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What came in."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    peer: tuple[str, int]
    at: float = field(default_factory=time.monotonic)
    """When it had come in, by time.monotonic()."""

    @property
    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)


class Server(ThreadingHTTPServer):
    """A thread for each connection; all of them end when the master closes."""

    daemon_threads = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], master: FakeMaster) -> None:
        self.master = master
        self._open: set[socket.socket] = set()
        self._guard = threading.Lock()
        super().__init__(address, _Handler)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """One connection, on its own thread; so that is where the TLS handshake belongs."""
        connection: socket.socket = request
        tls = self.master.tls
        if tls is not None:
            if request.recv(1, socket.MSG_PEEK) != b"\x16":  # no handshake record
                text = "Client sent an HTTP request to an HTTPS server.\n"
                request.sendall(f"HTTP/1.0 400 Bad Request\r\n\r\n{text}".encode())
                request.recv(65536)  # unread bytes would turn the close into a reset
                return
            connection = tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        with self._guard:
            self._open.add(connection)
        try:
            if isinstance(connection, ssl.SSLSocket):
                _shake_hands(connection)
            super().finish_request(connection, client_address)
        finally:
            with self._guard:
                self._open.discard(connection)
            connection.close()

    def hang_up(self) -> None:
        """Shut every open connection, so that no thread goes on waiting for a request."""
        with self._guard:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections may break and handshakes fail; anything else is a bug of this file."""
        error = sys.exception()
        if error is not None and not isinstance(error, OSError):
            self.master.errors.append(error)


def _shake_hands(connection: ssl.SSLSocket) -> None:
    try:
        connection.do_handshake()
    except ssl.SSLError:
        # Read what the client has sent, or it gets a reset and may not see the alert.
        socket.socket.shutdown(connection, socket.SHUT_WR)
        while socket.socket.recv(connection, 65536):
            pass
        raise


class _HangUp(Exception):
    """Leave the connection without an answer."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *args: object) -> None:
        """Requests are noted, not printed."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except _HangUp:
            self.close_connection = True

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_DELETE = do_PATCH = do_GET  # noqa: N815

    def _serve(self) -> None:
        master = self.server.master
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        fault = master.take_fault(
            Request(self.command, path, dict(self.headers), body, self.client_address)
        )
        match fault:
            case Fault(kind="drop"):
                raise _HangUp
            case Fault(kind="hang"):
                master.released.wait()
                raise _HangUp
            case Fault(kind="status"):
                return self._answer(fault.status, f"{fault.body}\n", fault.headers)
            case Fault(kind="garbage"):
                return self._answer(200, "<html>it works</html>", fault.headers)
        try:
            status, data = self._route(path, body)
        except RefusedError as refusal:
            status, data = refusal.status, f"{refusal.text}\n" if refusal.text else ""
        if fault is not None and fault.kind == "lose":
            raise _HangUp
        return self._answer(status, data, {}, half=fault is not None)

    def _route(self, path: str, body: bytes) -> tuple[int, object]:
        """Middleware runs on matches only: unknown routes are told apart without a key."""
        methods = {method for method, pattern, _ in ROUTES if pattern.fullmatch(path)}
        if not methods:
            raise RefusedError(404, "404 page not found")
        if self.command not in methods:
            raise RefusedError(405, "")
        if path != "/health":
            self._authorize()
        for method, pattern, action in ROUTES:
            found = pattern.fullmatch(path)
            if found is not None and method == self.command:
                query = {k: v[0] for k, v in parse_qs(urlsplit(self.path).query).items()}
                parts = [unquote(part) for part in found.groups()]
                return action(self.server.master.store, Call(parts, query, body))
        raise AssertionError("unreachable")

    def _authorize(self) -> None:
        key = self.server.master.api_key
        given = self.headers.get("Authorization")
        if key is None:
            return
        if not given:
            raise RefusedError(401, "Missing Authorization header")
        if given != f"Bearer {key}":
            raise RefusedError(401, "Invalid API key")

    def _answer(
        self, status: int, data: object, headers: Mapping[str, str], *, half: bool = False
    ) -> None:
        text = data if isinstance(data, str) else json.dumps(data) + "\n"
        kind = "text/plain; charset=utf-8" if isinstance(data, str) else "application/json"
        body = text.encode()
        self.send_response(status)
        if body:
            self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if half else body)
        if half:
            raise _HangUp
