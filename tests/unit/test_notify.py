from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.telemetry.notify import Notifier


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        channel.setblocking(False)
        yield channel


def notifier(channel: socket.socket) -> Notifier:
    return Notifier({"NOTIFY_SOCKET": channel.getsockname()})


def test_messages(systemd: socket.socket) -> None:
    notify = notifier(systemd)
    assert notify.enabled
    notify.ready("2 jobs")
    assert systemd.recv(4096) == b"READY=1\nSTATUS=2 jobs"
    notify.ready()
    assert systemd.recv(4096) == b"READY=1"
    notify.status("waiting")
    assert systemd.recv(4096) == b"STATUS=waiting"
    notify.stopping("stopping 1 job")
    assert systemd.recv(4096) == b"STOPPING=1\nSTATUS=stopping 1 job"
    notify.watchdog()
    assert systemd.recv(4096) == b"WATCHDOG=1"
    notify.extend_timeout(1.5)
    assert systemd.recv(4096) == b"EXTEND_TIMEOUT_USEC=1500000"


def test_a_status_cannot_smuggle_in_another_assignment(systemd: socket.socket) -> None:
    notifier(systemd).status("a\nMAINPID=1\n")
    assert systemd.recv(4096) == b"STATUS=a MAINPID=1"


def test_an_empty_status_sends_nothing(systemd: socket.socket) -> None:
    notifier(systemd).status("")
    with pytest.raises(BlockingIOError):
        systemd.recv(4096)


def test_abstract_sockets() -> None:
    name = f"ffmpeg-worker-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind("\0" + name)
        Notifier({"NOTIFY_SOCKET": "@" + name}).ready()
        assert channel.recv(4096) == b"READY=1"


def test_without_a_socket_nothing_is_done() -> None:
    notify = Notifier({"WATCHDOG_USEC": "1000000"})
    assert not notify.enabled
    assert notify.watchdog_seconds is None
    notify.ready("x")


def test_what_cannot_be_sent_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notify = Notifier({"NOTIFY_SOCKET": str(tmp_path / "none")})
    notify.ready()
    notify.watchdog()
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert [record.getMessage() for record in warnings] == [
        "systemd could not be told READY=1: [Errno 2] No such file or directory"
    ]


def test_a_full_socket_does_not_block(systemd: socket.socket) -> None:
    notify = notifier(systemd)
    for _ in range(10_000):  # far more than a datagram socket queues
        notify.watchdog()
    assert systemd.recv(4096) == b"WATCHDOG=1"


def test_an_address_of_another_kind_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    assert not Notifier({"NOTIFY_SOCKET": "vsock:2:1234"}).enabled
    assert "no UNIX socket" in caplog.text


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_watchdog_time(environ: dict[str, str], seconds: float | None) -> None:
    assert Notifier({"NOTIFY_SOCKET": "/run/x"} | environ).watchdog_seconds == seconds
