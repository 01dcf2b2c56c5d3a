"""The control socket: who may speak to it, what it answers, and what no client can do to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from worker import control as module
from worker.control import (
    LARGEST_ANSWER,
    LARGEST_REQUEST,
    MOST_CLIENTS,
    MOST_PATIENT,
    Command,
    Control,
    News,
    Status,
    short_address,
    socket_path,
)
from worker.errors import WorkerError

STATUS = b'{"version": 1, "command": "status"}\n'
PATIENCE = 20.0
"""Seconds after which a test fails that waits for an answer."""
WAIT = b'{"version": 1, "command": "wait"}\n'


class Agent:
    """Commands as the agent has them, and some that go wrong."""

    def __init__(self) -> None:
        self.draining = False
        self.running = ["17"]
        self.news = News()
        self.waiting = 0
        self.waits_changed = News()
        self.commands: Mapping[str, Command] = {
            "drain": self.drain,
            "status": self.status,
            "wait": self.wait,
            "never": self.never,
            "refuse": self.refuse,
            "defect": self.defect,
            "long": self.long,
            "unspeakable": self.unspeakable,
        }

    async def status(self) -> dict[str, Any]:
        return Status(self.draining, tuple(self.running), 0).answer()

    async def drain(self) -> dict[str, Any]:
        self.draining = True
        return await self.status()

    async def wait(self) -> dict[str, Any]:
        self.waiting += 1
        self.waits_changed.tell()
        try:
            while self.running:
                await self.news.wait()
        finally:
            self.waiting -= 1
            self.waits_changed.tell()
        return await self.status()

    async def waits(self, number: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while self.waiting != number:
                await self.waits_changed.wait()

    async def never(self) -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def refuse(self) -> dict[str, Any]:
        raise WorkerError("not now\nbecause")

    async def defect(self) -> dict[str, Any]:
        raise ZeroDivisionError

    async def long(self) -> dict[str, Any]:
        return {"text": "x" * LARGEST_ANSWER}

    async def unspeakable(self) -> dict[str, Any]:
        return {"text": object()}


@pytest.fixture
def agent() -> Agent:
    return Agent()


@pytest.fixture
async def control(tmp_path: Path, agent: Agent) -> AsyncIterator[Control]:
    control = Control(socket_path(tmp_path), agent.commands)
    await control.start()
    yield control
    await control.close()
    assert {task.get_name() for task in asyncio.all_tasks()}.isdisjoint(
        {"control client", "control command", "control hang-up"}
    )


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connect(folder: Path) -> Streams:
    with short_address(socket_path(folder)) as address:
        return await asyncio.open_unix_connection(address, limit=2 * LARGEST_ANSWER)


async def say(folder: Path, data: bytes) -> dict[str, Any]:
    """What is answered to ``data``; an empty dict if the connection was closed without."""
    reader, writer = await connect(folder)
    try:
        async with asyncio.timeout(PATIENCE):
            writer.write(data)
            line = await reader.readline()
            if line:
                with contextlib.suppress(ConnectionResetError):  # not all we sent was read
                    assert await reader.read() == b""  # one line, then the end
        return json.loads(line) if line else {}
    finally:
        writer.close()


# what is asked and answered


async def test_a_command_and_its_answer(tmp_path: Path, control: Control, agent: Agent) -> None:
    assert await say(tmp_path, b'{"version": 1, "command": "drain"}\n') == {
        "version": 1,
        "ok": True,
        "answer": {"draining": True, "running": ["17"], "undelivered": 0},
    }
    assert agent.draining


async def test_hostile_ids_are_one_ascii_line(
    tmp_path: Path, control: Control, agent: Agent
) -> None:
    agent.running = ["a\nb", "\ud800\x1b", "ü" * 1024]
    assert (await say(tmp_path, STATUS))["answer"]["running"] == agent.running


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"\n", "a request is a JSON object"),
        (b"drain\n", "a request is a JSON object"),
        (b"\xff\xfe\n", "a request is a JSON object"),
        (b'["drain"]\n', "a request is a JSON object"),
        (b"[" * 4000 + b"\n", "a request is a JSON object"),
        (b'{"command": "status"}\n', "with version 1"),
        (b'{"version": 2, "command": "status"}\n', "with version 1"),
        (b'{"version": 1}\n', "no such command; there are drain, status"),
        (b'{"version": 1, "command": "reboot"}\n', "no such command"),
        (b'{"version": 1, "command": ["status"]}\n', "no such command"),
        (b" " * LARGEST_REQUEST + STATUS, "at most 4096 bytes"),
        (b"x" * (3 * LARGEST_REQUEST), "at most 4096 bytes"),
        (b'{"version": 1, "command": "refuse"}\n', "not now\nbecause"),
        (b'{"version": 1, "command": "defect"}\n', "internal error"),
        (b'{"version": 1, "command": "long"}\n', "too long"),
    ],
)
async def test_refusals(tmp_path: Path, control: Control, line: bytes, error: str) -> None:
    answer = await say(tmp_path, line)
    assert answer["ok"] is False
    assert error in answer["error"]
    assert (await say(tmp_path, STATUS))["ok"] is True


async def test_an_answer_that_is_no_json_is_a_line_in_the_log(
    tmp_path: Path, control: Control, caplog: pytest.LogCaptureFixture
) -> None:
    assert await say(tmp_path, b'{"version": 1, "command": "unspeakable"}\n') == {}
    assert "internal error" in caplog.text
    assert (await say(tmp_path, STATUS))["ok"] is True


# clients that misbehave


async def test_who_says_nothing_is_cut_off(
    tmp_path: Path, control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REQUEST_SEC", 0.05)
    answer = await say(tmp_path, STATUS[:-1])
    assert answer["error"] == "no request came within 0.05 s"


async def test_a_command_that_takes_too_long(
    tmp_path: Path, control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REQUEST_SEC", 0.05)
    answer = await say(tmp_path, b'{"version": 1, "command": "never"}\n')
    assert answer["error"] == "the worker is too busy; try again"


async def test_who_does_not_take_the_answer_is_cut_off(
    tmp_path: Path, control: Control, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REQUEST_SEC", 0.05)
    agent.running = ["x" * 1000] * 900  # more than the kernel buffers
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(socket_path(tmp_path)))
        client.sendall(STATUS)
        while not control._clients:
            await asyncio.sleep(0)
        await asyncio.gather(*control._clients)
        rest = b""
        while part := client.recv(1 << 20):
            rest += part
    assert 0 < len(rest) < 900_000


async def test_a_flood_ends_with_its_client(tmp_path: Path, control: Control) -> None:
    with contextlib.suppress(ConnectionError):  # cut off while it sends
        assert (await say(tmp_path, b"x" * 10_000_000))["ok"] is False
    assert (await say(tmp_path, STATUS))["ok"] is True


@pytest.mark.parametrize("data", [b"", STATUS[:10], STATUS, STATUS + b"more"])
async def test_who_hangs_up_at_once_harms_nobody(
    tmp_path: Path, control: Control, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    for _ in range(5):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(socket_path(tmp_path)))
            client.sendall(data)
    assert (await say(tmp_path, STATUS))["ok"] is True
    assert not [record for record in caplog.records if record.levelname != "DEBUG"]


async def test_only_so_many_at_a_time(tmp_path: Path, control: Control) -> None:
    silent = [await connect(tmp_path) for _ in range(MOST_CLIENTS)]
    while len(control._clients) < MOST_CLIENTS:
        await asyncio.sleep(0)
    with contextlib.suppress(ConnectionError):
        assert await say(tmp_path, STATUS) == {}
    for _, writer in silent:
        writer.close()
    while control._clients:
        await asyncio.sleep(0)
    assert (await say(tmp_path, STATUS))["ok"] is True


@pytest.mark.parametrize(("uid", "ok"), [(0, True), (os.geteuid(), True), (4711, False)])
async def test_whom_it_answers(
    tmp_path: Path,
    control: Control,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    uid: int,
    ok: bool,
) -> None:
    monkeypatch.setattr(module, "_peer", lambda writer: uid)
    answer = await say(tmp_path, STATUS)
    assert answer["ok"] is ok
    if not ok:
        assert answer["error"] == "only root and the worker's own user may do that"
        assert "user 4711 may not use" in caplog.text


async def test_the_kernel_says_who_is_there(
    tmp_path: Path, control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    peer = module._peer

    def spy(writer: asyncio.StreamWriter) -> int:
        seen.append(peer(writer))
        return seen[-1]

    monkeypatch.setattr(module, "_peer", spy)
    await say(tmp_path, STATUS)
    assert seen == [os.geteuid()]


# waiting


async def test_wait_is_answered_when_it_is_so(
    tmp_path: Path, control: Control, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REQUEST_SEC", 0.05)  # no limit for who waits
    asked = asyncio.create_task(say(tmp_path, WAIT))
    await agent.waits(1)
    agent.news.tell()  # nothing of interest
    await asyncio.sleep(0.1)
    assert not asked.done()
    agent.running.clear()
    agent.news.tell()
    assert (await asked)["answer"]["running"] == []


@pytest.mark.parametrize("last", [b"", b"more"])
async def test_who_hangs_up_or_talks_on_waits_no_longer(
    tmp_path: Path, control: Control, agent: Agent, last: bytes
) -> None:
    reader, writer = await connect(tmp_path)
    writer.write(WAIT)
    await agent.waits(1)
    if last:
        writer.write(last)
    else:
        writer.close()
    await agent.waits(0)
    assert await reader.read() == b""
    writer.close()


async def test_who_waits_leaves_room_for_others(
    tmp_path: Path, control: Control, agent: Agent
) -> None:
    waiting = [asyncio.create_task(say(tmp_path, WAIT)) for _ in range(MOST_PATIENT)]
    await agent.waits(MOST_PATIENT)
    assert "others wait already" in (await say(tmp_path, WAIT))["error"]
    assert (await say(tmp_path, STATUS))["ok"] is True
    agent.running.clear()
    agent.news.tell()
    assert all(answer["ok"] for answer in await asyncio.gather(*waiting))
    assert (await say(tmp_path, WAIT))["ok"] is True


async def test_close_cuts_off_who_waits(tmp_path: Path, control: Control, agent: Agent) -> None:
    asked = asyncio.create_task(say(tmp_path, WAIT))
    await agent.waits(1)
    await control.close()
    assert await asked == {}
    assert agent.waiting == 0
    assert not socket_path(tmp_path).exists()
    await control.close()


# the socket in the file system


async def test_the_socket_is_private(tmp_path: Path, control: Control) -> None:
    mode = socket_path(tmp_path).stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


async def test_a_live_one_is_not_stolen(tmp_path: Path, control: Control, agent: Agent) -> None:
    inode = socket_path(tmp_path).stat().st_ino
    second = Control(socket_path(tmp_path), agent.commands)
    with pytest.raises(WorkerError, match="another worker serves"):
        await second.start()
    await second.close()
    assert socket_path(tmp_path).stat().st_ino == inode
    assert (await say(tmp_path, STATUS))["ok"] is True


CHILD = """
import asyncio, sys
from pathlib import Path
from worker.control import Control

async def main():
    await Control(Path(sys.argv[1]), {}).start()
    print("serves", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_one_that_hangs_keeps_its_socket_and_a_dead_one_is_replaced(
    tmp_path: Path, agent: Agent
) -> None:
    path = socket_path(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"serves\n"
            process.send_signal(signal.SIGSTOP)
            control = Control(path, agent.commands)
            with pytest.raises(WorkerError, match="another worker serves"):
                await control.start()
        finally:
            process.kill()
    assert path.is_socket()
    await control.start()
    assert (await say(tmp_path, STATUS))["ok"] is True
    await control.close()


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path, agent: Agent) -> None:
    path = socket_path(tmp_path)
    path.write_text("mine")
    control = Control(path, agent.commands)
    with pytest.raises(WorkerError, match="no socket is in its place"):
        await control.start()
    assert path.read_text() == "mine"
    path.unlink()
    await control.start()  # the lock was let go
    await control.close()


async def test_a_folder_that_is_not_there(tmp_path: Path, agent: Agent) -> None:
    with pytest.raises(WorkerError, match="cannot be made: No such file or directory"):
        await Control(socket_path(tmp_path / "none"), agent.commands).start()


async def test_a_path_that_is_too_long_for_a_socket(tmp_path: Path, agent: Agent) -> None:
    folder = tmp_path / ("ü" * 60) / ("y" * 100)
    folder.mkdir(parents=True)
    control = Control(socket_path(folder), agent.commands)
    await control.start()
    assert (await say(folder, STATUS))["ok"] is True
    assert stat.S_IMODE(socket_path(folder).stat().st_mode) == 0o600
    await control.close()
    assert not socket_path(folder).exists()


def test_the_longest_address_is_what_the_kernel_takes(tmp_path: Path) -> None:
    room = struct.calcsize("108s") - 1 - len(os.fsencode(tmp_path)) - 1
    for name in ("x" * room, "x" * (room + 1)):
        path = tmp_path / name
        with short_address(path) as address, socket.socket(socket.AF_UNIX) as channel:
            assert (address == str(path)) is (len(name) == room)
            channel.bind(address)
        assert path.is_socket()


# what is answered


def test_a_status_survives_the_way() -> None:
    status = Status(True, ("a", "b"), 3)
    assert Status.of(json.loads(json.dumps(status.answer()))) == status


@pytest.mark.parametrize(
    ("status", "idle"),
    [
        (Status(True, (), 0), True),
        (Status(True, ("a",), 0), False),
        (Status(True, (), 1), False),
        (Status(False, (), 0), True),
    ],
)
def test_idle(status: Status, idle: bool) -> None:
    assert status.idle is idle


@pytest.mark.parametrize(
    "change",
    [{"draining": 1}, {"running": "ab"}, {"running": [1]}, {"undelivered": None}],
)
def test_what_is_no_status(change: dict[str, Any]) -> None:
    with pytest.raises(WorkerError, match="another version"):
        Status.of(Status(True, ("a",), 0).answer() | change)
