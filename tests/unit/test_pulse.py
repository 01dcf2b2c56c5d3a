"""The watchdog is fed while every loop keeps its promise, and by no process that cannot."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.clock import Clock
from worker.telemetry.notify import Notifier
from worker.telemetry.pulse import Pulse, feed


@pytest.fixture
def pulse(clock: Clock) -> Pulse:
    return Pulse(clock)


# promises


def test_a_promise_holds_until_its_time_is_over(pulse: Pulse, clock: Clock) -> None:
    assert pulse.stuck() == []
    pulse.beat("polling", within=10)
    clock.now += 10
    assert pulse.stuck() == []
    clock.now += 0.5
    assert pulse.stuck() == ["polling"]
    assert pulse.overdue() == {"polling": 0.5}


def test_a_beat_is_a_new_promise(pulse: Pulse, clock: Clock) -> None:
    pulse.beat("polling", within=10)
    clock.now += 8
    pulse.beat("polling", within=3)
    clock.now += 3
    assert pulse.stuck() == []
    clock.now += 1
    assert pulse.stuck() == ["polling"]
    pulse.beat("polling", within=10)
    assert pulse.stuck() == []


def test_who_waits_on_purpose_is_not_stuck(pulse: Pulse, clock: Clock) -> None:
    pulse.parked("polling")
    pulse.beat("polling", within=10)
    pulse.parked("polling")
    clock.now += 1e6
    assert pulse.stuck() == []
    pulse.beat("polling", within=10)
    clock.now += 11
    assert pulse.stuck() == ["polling"]


def test_each_loop_is_for_itself_and_the_longest_stuck_comes_first(
    pulse: Pulse, clock: Clock
) -> None:
    pulse.beat("polling", within=30)
    pulse.beat("heartbeats", within=5)
    pulse.beat("watch", within=100)
    clock.now += 40
    assert pulse.overdue() == {"heartbeats": 35.0, "polling": 10.0}
    assert pulse.stuck() == ["heartbeats", "polling"]


# feeding


class Enough(Exception):
    """Ends a feed()."""


class Systemd:
    """$NOTIFY_SOCKET, with a watchdog of 20 s; its time passes when feed() sleeps."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.channel.bind(str(path))
        self.channel.setblocking(False)
        self.environ = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "20000000"}
        self.fed: list[float] = []
        self.pauses: list[float] = []
        self._clock = clock
        self._start = clock.now
        self.after: Callable[[float], None] = lambda now: None
        """Called with the seconds since the start after each of feed()'s pauses."""

    async def sleep(self, seconds: float) -> None:
        try:
            while data := self.channel.recv(4096):
                assert data == b"WATCHDOG=1"
                self.fed.append(self._clock.now - self._start)
        except BlockingIOError:
            pass
        self.pauses.append(seconds)
        self._clock.now += seconds
        now = self._clock.now - self._start
        if now > 100:
            raise Enough
        self.after(now)


@pytest.fixture
def systemd(tmp_path: Path, clock: Clock) -> Iterator[Systemd]:
    systemd = Systemd(tmp_path / "notify", clock)
    yield systemd
    systemd.channel.close()


async def fed(systemd: Systemd, pulse: Pulse) -> None:
    with pytest.raises(Enough):
        await feed(pulse, Notifier(systemd.environ), sleep=systemd.sleep)


async def test_fed_at_half_of_the_time(systemd: Systemd, pulse: Pulse) -> None:
    await fed(systemd, pulse)
    assert systemd.fed == [float(second) for second in range(0, 101, 10)]


async def test_a_stuck_loop_is_named_and_nothing_is_sent(
    systemd: Systemd, pulse: Pulse, caplog: pytest.LogCaptureFixture
) -> None:
    pulse.beat("heartbeats", within=1000)
    pulse.beat("polling", within=15)
    await fed(systemd, pulse)
    assert systemd.fed == [0.0, 10.0]
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "stuck: polling (5.0 s late); the watchdog is not fed, and systemd restarts the worker "
        "after 20 s without"
    ]
    assert caplog.records[0].levelname == "ERROR"


async def test_fed_again_as_soon_as_the_loop_is_back(
    systemd: Systemd, pulse: Pulse, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    pulse.beat("polling", within=15)

    def after(now: float) -> None:
        if now == 24:
            pulse.beat("polling", within=20)
        if now == 34:
            pulse.parked("polling")

    systemd.after = after
    await fed(systemd, pulse)
    assert systemd.fed[:5] == [0.0, 10.0, 24.0, 34.0, 44.0]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[1] == "no loop is stuck any more; the watchdog is fed again"


async def test_after_a_freeze_all_promises_are_broken_and_soon_kept_again(
    systemd: Systemd, pulse: Pulse, clock: Clock
) -> None:
    loops = ("heartbeats", "polling", "watch")
    for name in loops:
        pulse.beat(name, within=15)

    def after(now: float) -> None:
        if now == 10:
            clock.now += 17  # frozen: we wake late, and the loops have not had their turn yet
        elif now == 29:
            for name in loops:
                pulse.beat(name, within=1000)

    systemd.after = after
    await fed(systemd, pulse)
    assert systemd.fed[:3] == [0.0, 29.0, 39.0]


@pytest.mark.parametrize("usec", ["", "0"])
async def test_without_a_watchdog_it_returns_at_once(
    systemd: Systemd, pulse: Pulse, usec: str
) -> None:
    systemd.environ["WATCHDOG_USEC"] = usec
    await feed(pulse, Notifier(systemd.environ), sleep=systemd.sleep)
    assert systemd.fed == systemd.pauses == []


# for real

CHILD = """
import asyncio, sys
from tests.unit.clock import Clock
from worker.telemetry.notify import Notifier
from worker.telemetry.pulse import Pulse, feed

async def main():
    pulse = Pulse()
    commands = asyncio.StreamReader()
    loop = asyncio.get_running_loop()

    def block():  # the whole event loop, until the next line
        sys.stdin.buffer.raw.readline()
        print("blocks", flush=True)
        sys.stdin.buffer.raw.readline()

    loop.add_reader(0, block)

    async def beats():
        while True:
            pulse.beat("child", within=0.5)
            await asyncio.sleep(0.1)

    await asyncio.gather(feed(pulse, Notifier()), beats())

asyncio.run(main())
"""
PERIOD = 0.2
"""Half of the child's watchdog time, in seconds."""


@pytest.fixture
def child(tmp_path: Path) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        environ = {
            **os.environ,
            "NOTIFY_SOCKET": str(tmp_path / "notify"),
            "WATCHDOG_USEC": str(int(2 * PERIOD * 1_000_000)),
        }
        environ.pop("WATCHDOG_PID", None)
        with subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environ,
            cwd=Path(__file__).parents[2],
        ) as process:
            try:
                yield channel, process
            finally:
                process.kill()


def hears(channel: socket.socket, seconds: float) -> bool:
    channel.settimeout(seconds)
    try:
        return channel.recv(4096) == b"WATCHDOG=1"
    except TimeoutError:
        return False


def drained(channel: socket.socket) -> None:
    channel.setblocking(False)
    try:
        while channel.recv(4096):
            pass
    except BlockingIOError:
        return


def test_a_blocked_event_loop_sends_nothing(
    child: tuple[socket.socket, subprocess.Popen[bytes]],
) -> None:
    channel, process = child
    assert process.stdin is not None
    assert process.stdout is not None
    assert hears(channel, 30)
    assert hears(channel, 30)
    process.stdin.write(b"block\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"blocks\n"
    drained(channel)
    assert not hears(channel, 4 * PERIOD)
    process.stdin.write(b"go on\n")
    process.stdin.flush()
    assert hears(channel, 30)
    assert hears(channel, 30)


def test_a_process_that_was_frozen_goes_on_feeding(
    child: tuple[socket.socket, subprocess.Popen[bytes]],
) -> None:
    channel, process = child
    assert hears(channel, 30)
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    drained(channel)
    assert not hears(channel, 4 * PERIOD)
    process.send_signal(signal.SIGCONT)
    assert hears(channel, 30)
    assert hears(channel, 30)
