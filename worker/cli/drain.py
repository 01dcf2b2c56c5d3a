"""``ffmpeg-worker drain`` and ``undrain``: whether the running agent takes new jobs."""

from __future__ import annotations

import json
import logging
import socket
import time
from pathlib import Path
from typing import Any

from worker.config import Settings
from worker.config.keys import integer
from worker.control import (
    LARGEST_ANSWER,
    REQUEST_SEC,
    VERSION,
    Status,
    short_address,
    socket_path,
)
from worker.errors import ConfigError, WorkerError
from worker.printable import escape

logger = logging.getLogger(__name__)

_seconds = integer(1, 31_536_000, " seconds")
_LONGEST_ID = 100
"""Characters of a job's id that are shown."""


class NoAgent(WorkerError):
    """Nobody serves the socket."""


class NoAnswer(WorkerError):
    """The agent is there and has not answered within the time."""


def drain(settings: Settings, *, wait: bool, timeout: str) -> int:
    """Have the agent take no new jobs; what runs ends in its own time, and heartbeats go on.

    With ``wait`` return when nothing runs and nothing is left to deliver, after ``timeout``
    seconds (empty: however long that takes) fail. How things stand goes to stdout. Returns the
    exit status. Raises ConfigError for a wrong ``timeout``, WorkerError if there is no agent, or
    if waiting was in vain.
    """
    try:
        seconds = _seconds(timeout) if timeout else None
    except ValueError as error:
        raise ConfigError(f"--timeout: {timeout[:40]!r} {error}") from None
    path = socket_path(settings.work_dir)
    status = Status.of(ask(path, "drain"))
    if wait:
        if not status.idle:
            logger.info("%s", sentence(status))
        try:
            status = Status.of(ask(path, "wait", timeout=seconds))
        except NoAnswer:
            status = Status.of(ask(path, "status"))
            raise WorkerError(
                f"not done after {seconds} s: {sentence(status)}; the worker goes on draining, "
                "ffmpeg-worker undrain has it take jobs again"
            ) from None
        if not status.draining:
            raise WorkerError(f"drain was undone meanwhile by undrain: {sentence(status)}")
    print(sentence(status))
    return 0


def undrain(settings: Settings) -> int:
    """Have the agent take jobs again. As drain()."""
    print(sentence(Status.of(ask(socket_path(settings.work_dir), "undrain"))))
    return 0


def sentence(status: Status) -> str:
    """How things stand, on one line fit to be printed."""
    running = [_shown(job) for job in status.running]
    parts = []
    if running:
        parts.append(f"{_count(len(running), 'job')} running ({', '.join(running)})")
    if status.undelivered:
        parts.append(f"{_count(status.undelivered, 'report')} not delivered")
    state = "draining" if status.draining else "taking jobs"
    return f"{state}: {', '.join(parts) or 'no job running, every report delivered'}"


def _shown(job: str) -> str:
    return escape(job if len(job) <= _LONGEST_ID else job[:_LONGEST_ID] + "…")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def ask(path: Path, command: str, *, timeout: float | None = 3 * REQUEST_SEC) -> dict[str, Any]:
    """Have the agent behind ``path`` do a command; blocks up to ``timeout`` seconds (None: for
    ever) and returns what it answers.

    Raises NoAgent, NoAnswer, or WorkerError with what the agent refused.
    """
    end = None if timeout is None else time.monotonic() + timeout
    line = b""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.settimeout(timeout)
            with short_address(path) as address:
                channel.connect(address)
            channel.sendall(json.dumps({"version": VERSION, "command": command}).encode() + b"\n")
            while not line.endswith(b"\n") and len(line) <= LARGEST_ANSWER:
                if end is not None:
                    channel.settimeout(max(end - time.monotonic(), 0.001))
                part = channel.recv(65536)
                if not part:
                    raise ConnectionResetError
                line += part
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError) as error:
        raise NoAgent(
            f"no worker runs with the work directory {path.parent}; if it has another one, name it "
            "with --work-dir, or the file that does with --config"
        ) from error
    except (TimeoutError, BlockingIOError) as error:  # the second: its queue is full, unix(7)
        raise NoAnswer(
            f"the worker with the work directory {path.parent} does not answer; its log, or "
            "systemctl status ffmpeg-worker, may say why"
        ) from error
    except (ConnectionResetError, BrokenPipeError) as error:
        raise WorkerError(
            f"the worker with the work directory {path.parent} hung up without an answer: it "
            "ended, or too many others are connected; try again when it runs"
        ) from error
    except OSError as error:
        raise WorkerError(
            f"cannot speak to the worker through {path}: {error.strerror}; only root and the "
            "worker's own user may"
        ) from error
    return _answered(line)


def _answered(line: bytes) -> dict[str, Any]:
    try:
        document = json.loads(line)
        if document["ok"] is True and isinstance(document["answer"], dict):
            return document["answer"]
        error = document["error"]
    except (ValueError, RecursionError, KeyError, TypeError):
        error = "an answer that this program does not know; restart the worker after an upgrade"
    raise WorkerError(f"the worker says: {error}")
