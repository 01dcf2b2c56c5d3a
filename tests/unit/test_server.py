from __future__ import annotations

import contextlib
import http.client
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.errors import Reason, WorkerError
from worker.telemetry import server as server_module
from worker.telemetry.metrics import Metrics
from worker.telemetry.server import Server


class Readiness:
    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.broken = False

    def __call__(self) -> list[str]:
        if self.broken:
            raise RuntimeError("no answer")
        return self.reasons


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_TICK", 0.02)


@pytest.fixture
def readiness() -> Readiness:
    return Readiness()


@pytest.fixture
def server(readiness: Readiness) -> Iterator[Server]:
    server = Server(Metrics("n", 1), readiness, address="127.0.0.1", port=0)
    server.start()
    yield server
    server.stop()


class Answer:
    def __init__(self, server: Server, method: str, path: str, **headers: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        self.status, self.headers, self.body = answer.status, answer.headers, answer.read()
        connection.close()


def raw(server: Server, data: bytes) -> bytes:
    """What comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(data)
        parts = []
        while part := client.recv(65536):
            parts.append(part)
        return b"".join(parts)


def test_metrics(server: Server) -> None:
    answer = Answer(server, "GET", "/metrics?name=x")
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert b'ffrtmp_worker_active_jobs{node_id="n:1"} 0.0\n' in answer.body
    answer = Answer(server, "GET", "/metrics", Accept="application/openmetrics-text")
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert answer.body.endswith(b"# EOF\n")


def test_health(server: Server) -> None:
    answer = Answer(server, "GET", "/health")
    assert (answer.status, json.loads(answer.body)) == (200, {"status": "healthy"})
    assert answer.headers["Content-Type"] == "application/json"


def test_ready_and_why_not(server: Server, readiness: Readiness) -> None:
    answer = Answer(server, "GET", "/ready")
    assert (answer.status, json.loads(answer.body)) == (200, {"status": "ready"})
    readiness.reasons = ["disk is 96 % full"]
    answer = Answer(server, "GET", "/ready")
    assert answer.status == 503
    assert json.loads(answer.body) == {"status": "not ready", "reasons": ["disk is 96 % full"]}


def test_a_check_that_breaks_is_an_answer_all_the_same(
    server: Server, readiness: Readiness, caplog: pytest.LogCaptureFixture
) -> None:
    readiness.broken = True
    answer = Answer(server, "GET", "/ready")
    assert answer.status == 500
    assert b"no answer" not in answer.body
    assert "answering /ready failed" in caplog.text
    assert Answer(server, "GET", "/health").status == 200


def test_head_has_the_headers_alone(server: Server) -> None:
    answer = Answer(server, "HEAD", "/health")
    assert (answer.status, answer.body) == (200, b"")
    assert int(answer.headers["Content-Length"]) == len(Answer(server, "GET", "/health").body)


@pytest.mark.parametrize(
    "path",
    [
        "/", "/metricsx", "/metrics/", "/%6detrics", "/../metrics", "/x/../metrics",
        "/metrics/../../etc/passwd", "/%2e%2e/metrics", "http://elsewhere/metrics", "/metrics;x",
        "/metrics%00", "*",
    ],
)  # fmt: skip
def test_anything_else_is_not_found(server: Server, path: str) -> None:
    assert Answer(server, "GET", path).status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "BREW"])
def test_other_methods(server: Server, method: str) -> None:
    answer = Answer(server, method, "/metrics")
    assert answer.status == 405
    assert answer.headers["Allow"] == "GET, HEAD"


def test_one_request_a_connection(server: Server) -> None:
    answer = raw(server, b"GET /health HTTP/1.1\r\nConnection: keep-alive\r\n\r\n" * 50)
    assert answer.count(b"HTTP/1.0 200") == 1


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * 1000 + b"\r\n", b"431"),
        (b"GET /metrics HTTP/1.1\r\nA: " + b"b" * 17_000, b"431"),
        (b"GET /metrics HTTP/9.9\r\n\r\n", b"505"),
        (b"GET /metrics x\r\n\r\n", b"400"),
        (b"GET\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"200"),
        (b"GET /metrics HTTP/1.1\r\nAccept: " + b"text/plain;q=0.1," * 900 + b"\r\n\r\n", b"200"),
        (b"GET /metrics HTTP/1.1\r\nAccept: \xff;version=\xff;escaping=\xff\r\n\r\n", b"200"),
    ],
)
def test_odd_requests(
    server: Server, data: bytes, status: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    answer = raw(server, data)
    assert status in answer.partition(b"\r\n")[0]
    assert len(answer) < 64 * 1024
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]
    assert Answer(server, "GET", "/health").status == 200


def sockets() -> set[str]:
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(str(link.readlink()))
    return {name for name in found if name.startswith("socket:")}


def test_a_flood_costs_few_threads_and_no_sockets(server: Server) -> None:
    before = sockets()
    threads = threading.active_count()
    clients = [socket.socket() for _ in range(300)]
    for client in clients:
        client.setblocking(False)
        client.connect_ex(("127.0.0.1", server.port))
        assert threading.active_count() <= threads + server_module._MAX_CONNECTIONS
    for client in clients:
        client.close()
    # Some may be on their way: the kernel repeats what did not fit into the queue, ever slower.
    deadline = time.monotonic() + 90
    while sockets() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not sockets() - before
    assert Answer(server, "GET", "/health").status == 200


def test_labels_come_from_closed_sets(server: Server) -> None:
    text = Answer(server, "GET", "/metrics").body.decode()
    labels = set(re.findall(r'(\w+)="([^"]*)"', text))
    values = {name: {value for other, value in labels if other == name} for name, _ in labels}
    assert values.keys() == {"node_id", "reason", "le", "version"}
    assert values["node_id"] == {"n:1"}
    assert values["reason"] == {reason.value for reason in Reason}


def test_what_is_shown_is_ascii_on_one_line(server: Server, readiness: Readiness) -> None:
    readiness.reasons = ["a\nb\x1b[2J\u202e\ud800"]
    body = Answer(server, "GET", "/ready").body
    assert body.isascii()
    assert body.count(b"\n") == 1
    assert b"\x1b" not in body


def test_the_server_does_not_tell_its_python(server: Server) -> None:
    for path in ("/health", "/none"):
        assert Answer(server, "GET", path).headers["Server"] == "ffmpeg-worker"
    assert b"Python" not in raw(server, b"NONSENSE\r\n\r\n")


def test_a_request_that_is_too_long(server: Server) -> None:
    size = server_module._MAX_REQUEST_BYTES
    assert raw(server, b"GET /" + b"x" * size).startswith(b"HTTP/1.0 414 ")
    headers = b"GET /health HTTP/1.0\r\nA: " + b"x" * size
    assert raw(server, headers[: size + 1]).startswith(b"HTTP/1.0 431 ")


def test_a_slow_client_is_cut_off(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_MAX_SECONDS", 0.0)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(b"GET /heal")
        assert client.recv(100) == b""  # long before the silence limit


def test_connections_beyond_the_limit_are_closed_and_places_come_back(server: Server) -> None:
    limit = server_module._MAX_CONNECTIONS
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(limit)]
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        assert client.recv(100) == b""
    for one in held:
        one.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        one.settimeout(10)
        while one.recv(4096):
            pass
        one.close()
    assert Answer(server, "GET", "/health").status == 200


def test_a_port_in_use_names_the_key(server: Server, readiness: Readiness) -> None:
    other = Server(Metrics("n", 1), readiness, address="127.0.0.1", port=server.port)
    with pytest.raises(WorkerError, match=r"Address already in use; set METRICS_PORT"):
        other.start()


def test_an_address_of_another_machine_names_the_key(readiness: Readiness) -> None:
    other = Server(Metrics("n", 1), readiness, address="192.0.2.1", port=0)
    with pytest.raises(WorkerError, match=r"set METRICS_ADDR"):
        other.start()


def test_all_addresses_is_both_families(readiness: Readiness) -> None:
    server = Server(Metrics("n", 1), readiness, address="", port=0)
    server.start()
    try:
        families = ["127.0.0.1"]
        if socket.has_ipv6:
            families.append("::1")
        for address in families:
            connection = http.client.HTTPConnection(address, server.port, timeout=10)
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200
            connection.close()
    finally:
        server.stop()


def test_without_ipv6_it_is_ipv4(readiness: Readiness, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoIPv6(server_module._Listener):
        def __init__(self, address: str, port: int) -> None:
            if address == "::":
                raise OSError(97, "Address family not supported by protocol")
            super().__init__(address, port)

    monkeypatch.setattr(server_module, "_Listener", NoIPv6)
    server = Server(Metrics("n", 1), readiness, address="", port=0)
    server.start()
    assert Answer(server, "GET", "/health").status == 200
    server.stop()


def test_after_stop_nobody_listens_and_stop_again_is_fine(server: Server) -> None:
    port = server.port
    server.stop()
    server.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
