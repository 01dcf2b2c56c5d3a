"""``drain`` and ``undrain`` on the command line, against a real control socket."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from worker import cli
from worker.cli.arguments import parse
from worker.cli.drain import NoAgent, NoAnswer, ask, sentence
from worker.control import Control, News, Status, socket_path
from worker.errors import ConfigError, WorkerError

pytestmark = pytest.mark.usefixtures("no_settings", "logging_restored")


class FakeAgent:
    """Serves a control socket in a thread, as an agent would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.status = Status(False, (), 0)
        self.asked: list[str] = []
        self.on_wait: Callable[[], None] = lambda: None
        """Called when somebody begins to wait."""
        self._news = News()
        self._loop = asyncio.new_event_loop()
        self._control = Control(
            socket_path(folder),
            {
                "drain": lambda: self._set(True, "drain"),
                "undrain": lambda: self._set(False, "undrain"),
                "status": self._status,
                "wait": self._wait,
            },
        )
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._control.start(), self._loop).result(10)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._control.close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def become(self, draining: bool, running: tuple[str, ...] = (), undelivered: int = 0) -> None:
        self.status = Status(draining, running, undelivered)
        self._news.tell()

    async def _set(self, draining: bool, command: str) -> Mapping[str, Any]:
        self.asked.append(command)
        self.become(draining, self.status.running, self.status.undelivered)
        return self.status.answer()

    async def _status(self) -> Mapping[str, Any]:
        self.asked.append("status")
        return self.status.answer()

    async def _wait(self) -> Mapping[str, Any]:
        self.asked.append("wait")
        asyncio.get_running_loop().call_soon(self.on_wait)
        while self.status.draining and not self.status.idle:
            await self._news.wait()
        return self.status.answer()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    agent = FakeAgent(tmp_path)
    yield agent
    agent.close()


def run(folder: Path, *words: str) -> int:
    return cli.main([*words, "--work-dir", str(folder)])


# the command line


def test_the_words_of_drain_and_undrain() -> None:
    arguments = parse(["drain"])
    assert (arguments.command, arguments.wait, arguments.timeout) == ("drain", False, "")
    arguments = parse(["drain", "-wait", "--timeout", "60", "--user"])
    assert (arguments.command, arguments.wait, arguments.timeout) == ("drain", True, "60")
    assert arguments.flags == {"--user": "true"}
    assert arguments.limits == {}
    arguments = parse(["--wait", "drain"])
    assert (arguments.wait, arguments.timeout) == (True, "")
    assert parse(["undrain"]).command == "undrain"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["drain", "now"], "drain takes flags only"),
        (["undrain", "now"], "undrain takes flags only"),
        (["drain", "--timeout", "5"], "--timeout: drain takes it together with --wait"),
        (["undrain", "--wait"], "--wait: only for drain"),
        (["--wait"], "--wait: only for drain"),
        (["undrain", "--timeout", "5"], "--timeout: only for attach"),
        (["drain", "--wait", "--cpu-percent", "5"], "--cpu-percent: only for attach"),
        (["drain", "--wait=yes"], "argument --wait: ignored explicit argument"),
    ],
)
def test_wrong_command_lines(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(argv)


@pytest.mark.parametrize("text", ["0", "-1", "10s", "1.5", "31536001", "inf"])
def test_wrong_timeouts_have_no_effect(
    agent: FakeAgent, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    assert run(agent.folder, "drain", "--wait", "--timeout", text) == 2
    assert f"--timeout: '{text}' must be a whole number" in capsys.readouterr().err
    assert agent.asked == []


# what is done


def test_drain_says_what_runs(agent: FakeAgent, capsys: pytest.CaptureFixture[str]) -> None:
    agent.status = Status(False, ("a", "b"), 1)
    assert run(agent.folder, "drain") == 0
    output = capsys.readouterr()
    assert output.out == "draining: 2 jobs running (a, b), 1 report not delivered\n"
    assert output.err == ""
    assert agent.status.draining
    assert agent.asked == ["drain"]


def test_undrain(agent: FakeAgent, capsys: pytest.CaptureFixture[str]) -> None:
    agent.status = Status(True, ("a",), 0)
    assert run(agent.folder, "undrain") == 0
    assert capsys.readouterr().out == "taking jobs: 1 job running (a)\n"
    assert not agent.status.draining


def test_wait_ends_when_nothing_is_left(
    agent: FakeAgent, capsys: pytest.CaptureFixture[str]
) -> None:
    agent.status = Status(False, ("a",), 0)

    def job_ends() -> None:
        agent.become(True, (), 1)  # its report is still on the way
        asyncio.get_running_loop().call_soon(agent.become, True)

    agent.on_wait = job_ends
    assert run(agent.folder, "drain", "--wait", "--timeout", "60") == 0
    output = capsys.readouterr()
    assert output.out == "draining: no job running, every report delivered\n"
    assert "draining: 1 job running (a)" in output.err
    assert agent.asked == ["drain", "wait"]


def test_wait_of_an_idle_agent_asks_it_all_the_same(
    agent: FakeAgent, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(agent.folder, "drain", "--wait") == 0
    assert agent.asked == ["drain", "wait"]  # the agent alone knows of a job that is on its way


def test_wait_in_vain(agent: FakeAgent, capsys: pytest.CaptureFixture[str]) -> None:
    agent.status = Status(False, ("a",), 0)
    assert run(agent.folder, "drain", "--wait", "--timeout", "1") == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "not done after 1 s: draining: 1 job running (a); the worker goes on" in output.err
    assert agent.status.draining


def test_wait_for_a_drain_that_is_undone(
    agent: FakeAgent, capsys: pytest.CaptureFixture[str]
) -> None:
    agent.status = Status(False, ("a",), 0)
    agent.on_wait = lambda: agent.become(False, ("a", "b"))
    assert run(agent.folder, "drain", "--wait") == 1
    assert "undone meanwhile by undrain: taking jobs: 2 jobs" in capsys.readouterr().err


def test_an_agent_that_ends_meanwhile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agent = FakeAgent(tmp_path)
    agent.status = Status(False, ("a",), 0)
    closer = threading.Thread(target=agent.close)
    agent.on_wait = closer.start
    assert run(tmp_path, "drain", "--wait") == 1
    closer.join(10)
    assert "hung up without an answer" in capsys.readouterr().err


# when there is nobody, or somebody else


def test_no_agent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("drain", "undrain"):
        assert run(tmp_path, command) == 1
        assert capsys.readouterr().err == (
            f"ffmpeg-worker: no worker runs with the work directory {tmp_path}; if it has another "
            "one, name it with --work-dir, or the file that does with --config\n"
        )


def test_the_socket_of_a_dead_agent(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as channel:
        channel.bind(str(socket_path(tmp_path)))
    with pytest.raises(NoAgent):
        ask(socket_path(tmp_path), "status")


def test_a_folder_that_may_not_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(channel: socket.socket, address: str) -> None:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(WorkerError, match="Permission denied; only root and the worker's own user"):
        ask(socket_path(tmp_path), "status")


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as channel:
        channel.bind(str(socket_path(tmp_path)))
        channel.listen(0)
        yield channel


def test_an_agent_that_hangs(tmp_path: Path, listener: socket.socket) -> None:
    with pytest.raises(NoAnswer, match="does not answer"):
        ask(socket_path(tmp_path), "status", timeout=0.1)
    with pytest.raises(NoAnswer):  # the first one fills its queue
        ask(socket_path(tmp_path), "status", timeout=0.1)


def answering(listener: socket.socket, data: bytes) -> threading.Thread:
    def answer() -> None:
        client, _ = listener.accept()
        with client:
            client.recv(4096)
            client.sendall(data)

    thread = threading.Thread(target=answer)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"ok": false, "error": "not now"}\n', "the worker says: not now"),
        (b'{"ok": false}\n', "an answer that this program does not know"),
        (b'{"ok": true, "answer": []}\n', "an answer that this program does not know"),
        (b"[1]\n", "an answer that this program does not know"),
        (b"SSH-2.0\n", "an answer that this program does not know"),
        (b"[" * 100_000 + b"\n", "an answer that this program does not know"),
        (b"", "hung up without an answer"),
        (b'{"ok": true', "hung up without an answer"),
    ],
)
def test_answers_of_another_kind(
    tmp_path: Path, listener: socket.socket, data: bytes, message: str
) -> None:
    thread = answering(listener, data)
    with pytest.raises(WorkerError, match=message):
        ask(socket_path(tmp_path), "status")
    thread.join(10)


def test_what_the_agent_refuses_is_one_safe_line_each(
    tmp_path: Path, listener: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    thread = answering(listener, json.dumps({"ok": False, "error": "\x1b[2J"}).encode() + b"\n")
    assert run(tmp_path, "undrain") == 1
    thread.join(10)
    assert capsys.readouterr().err == "ffmpeg-worker: the worker says: \\x1b[2J\n"


# what is said


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (Status(True, (), 0), "draining: no job running, every report delivered"),
        (Status(True, (), 2), "draining: 2 reports not delivered"),
        (Status(False, ("17",), 0), "taking jobs: 1 job running (17)"),
        (
            Status(True, ("a\n\x1b[2J", "\u202e\ud800"), 0),
            r"draining: 2 jobs running (a\n\x1b[2J, \u202e\ud800)",
        ),
        (Status(True, ("x" * 1024,), 0), f"draining: 1 job running ({'x' * 100}…)"),
    ],
)
def test_sentences(status: Status, text: str) -> None:
    assert sentence(status) == text
