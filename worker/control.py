"""The control socket: how ``ffmpeg-worker drain`` speaks to the agent that runs.

It is ``control.sock`` in the work directory. That folder is what tells one agent of a machine from
another, both sides know it from the same configuration, and the agent can write to it in every
sandbox it works in. One request, one answer, one JSON line each:

    {"version": 1, "command": "drain"}
    {"version": 1, "ok": true, "answer": {"draining": true, "running": ["17"], "undelivered": 0}}
    {"version": 1, "ok": false, "error": "a sentence"}

Only root and the agent's own user get an answer (mode 0600, and SO_PEERCRED, unix(7)). Whatever a
client does, it costs the agent one of a few connections for a few seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.errors import WorkerError

logger = logging.getLogger(__name__)

VERSION = 1
PATIENT = frozenset({"wait"})
"""Commands that are answered when there is something to say, however late. Their client keeps the
connection open; when it closes it, or goes on talking, the command is cancelled."""
LARGEST_REQUEST = 4096
LARGEST_ANSWER = 1 << 20
"""Bytes, the line break included; enough for 170 jobs with the longest ids there can be."""
REQUEST_SEC = 5.0
"""For the request to be read, for the command to be done, and for the answer to be taken, each."""
MOST_CLIENTS = 16
MOST_PATIENT = 12
"""Clients of patient commands among them: who waits must not keep others from undoing a drain."""

_LONGEST_ADDRESS = 107
"""Bytes of a path that fit into an address (unix(7): sun_path has 108, the last one is NUL)."""

Command = Callable[[], Awaitable[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class Status:
    """What every command answers."""

    draining: bool
    running: tuple[str, ...]
    """Ids of the jobs that run, as the master wrote them: escape before printing."""
    undelivered: int
    """Results that the master does not have yet."""

    @property
    def idle(self) -> bool:
        """Nothing runs, and nothing is left to be told."""
        return not self.running and not self.undelivered

    def answer(self) -> dict[str, Any]:
        return {
            "draining": self.draining,
            "running": list(self.running),
            "undelivered": self.undelivered,
        }

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Status:
        """Raises WorkerError if this is none."""
        draining, running = answer.get("draining"), answer.get("running")
        undelivered = answer.get("undelivered")
        if (
            not isinstance(draining, bool)
            or not isinstance(running, list)
            or not all(isinstance(job, str) for job in running)
            or type(undelivered) is not int
        ):
            raise WorkerError(
                "the worker's answer is none that this program knows: is it of another version? "
                "Restart the worker after an upgrade"
            )
        return cls(draining, tuple(running), undelivered)


class News:
    """Wakes all who wait for a change. They look again for themselves what is true now."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def tell(self) -> None:
        """Something has changed."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        """Until the next change."""
        await self._event.wait()


def socket_path(work_dir: Path) -> Path:
    return work_dir / "control.sock"


class Control:
    """Answers commands from ``start()`` to ``close()``, in the running event loop."""

    def __init__(self, path: Path, commands: Mapping[str, Command]) -> None:
        self._path = path
        self._commands = commands
        self._lock: int | None = None
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._patient = 0

    async def start(self) -> None:
        """Raises WorkerError if another process serves this socket, or it cannot be made.

        A socket that a dead agent left behind is replaced. Whether its agent is dead is told by a
        lock (flock(2)), not by trying: an agent that hangs is not dead.
        """
        try:
            self._lock = _lock(self._path.with_name(self._path.name + ".lock"))
            if self._lock is None:
                raise WorkerError(
                    f"another worker serves {self._path}; stop it, or give this one a WORK_DIR, "
                    "NODE_NAME and METRICS_PORT of its own"
                )
            self._server = await asyncio.start_unix_server(
                self._connected,
                sock=_bound(self._path),
                limit=LARGEST_REQUEST,
                backlog=MOST_CLIENTS,
            )
        except OSError as error:
            self._unlock()
            raise WorkerError(
                f"the control socket {self._path} cannot be made: {error.strerror or error}; "
                "WORK_DIR (--work-dir) has to be a folder that takes sockets"
            ) from error
        except WorkerError:
            self._unlock()
            raise

    async def close(self) -> None:
        """Cut off whoever is connected and remove the socket; may be repeated."""
        if self._server is not None:
            self._server.close()
            self._server = None
            for client in self._clients:
                client.cancel()
            await asyncio.gather(*self._clients, return_exceptions=True)
            try:
                self._path.unlink(missing_ok=True)
            except OSError as error:
                logger.debug("%s stays behind: %s", self._path, error.strerror)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._clients) >= MOST_CLIENTS or self._server is None:
            logger.debug("too many clients on %s: one is turned away", self._path)
            writer.transport.abort()
            return
        client = asyncio.create_task(self._serve(reader, writer), name="control client")
        self._clients.add(client)
        client.add_done_callback(self._clients.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answer = await self._answer(reader, writer)
            if answer is None:
                return
            line = json.dumps({"version": VERSION, **answer}).encode("ascii") + b"\n"
            if len(line) > LARGEST_ANSWER:
                line = json.dumps(_refused("the answer is too long to be sent")).encode() + b"\n"
            async with asyncio.timeout(REQUEST_SEC):
                writer.write(line)
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError) as error:
            logger.debug("a client of %s went away without its answer: %r", self._path, error)
        except Exception:
            logger.exception("internal error on %s", self._path)
        finally:
            writer.transport.abort()  # does nothing to what is closed already

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> dict[str, Any] | None:
        """None: the client went away before it could be answered."""
        uid = _peer(writer)
        if uid not in (0, os.geteuid()):
            logger.warning("user %d may not use %s and was refused", uid, self._path)
            return _refused("only root and the worker's own user may do that")
        try:
            async with asyncio.timeout(REQUEST_SEC):
                line = await reader.readuntil(b"\n")
        except TimeoutError:
            return _refused(f"no request came within {REQUEST_SEC:g} s")
        except asyncio.LimitOverrunError:
            return _refused(f"a request is one line of at most {LARGEST_REQUEST} bytes")
        except asyncio.IncompleteReadError:
            return None
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict) or request.get("version") != VERSION:
            return _refused(f"a request is a JSON object with version {VERSION} and a command")
        name = request.get("command")
        command = self._commands.get(name) if isinstance(name, str) else None
        if command is None:
            return _refused(f"there is no such command; there are {', '.join(self._commands)}")
        if name in PATIENT:
            return await self._patiently(command, reader)
        return await _done(command, REQUEST_SEC)

    async def _patiently(
        self, command: Command, reader: asyncio.StreamReader
    ) -> dict[str, Any] | None:
        if self._patient >= MOST_PATIENT:
            return _refused(f"{MOST_PATIENT} others wait already; end some of them")
        self._patient += 1
        work = asyncio.create_task(_done(command, None), name="control command")
        hung_up = asyncio.create_task(reader.read(1), name="control hang-up")
        try:
            await asyncio.wait({work, hung_up}, return_when="FIRST_COMPLETED")
            return work.result() if work.done() else None
        finally:
            self._patient -= 1
            for task in (work, hung_up):
                task.cancel()
            await asyncio.gather(work, hung_up, return_exceptions=True)


async def _done(command: Command, seconds: float | None) -> dict[str, Any]:
    try:
        async with asyncio.timeout(seconds):
            return {"ok": True, "answer": dict(await command())}
    except TimeoutError:
        return _refused("the worker is too busy; try again")
    except WorkerError as error:
        return _refused(str(error))
    except Exception:
        logger.exception("internal error in a command of the control socket")
        return _refused("internal error; the worker's log has it")


def _refused(error: str) -> dict[str, Any]:
    return {"version": VERSION, "ok": False, "error": error}


def _peer(writer: asyncio.StreamWriter) -> int:
    """The client's uid when it connected; -1 where the kernel does not say."""
    size = struct.calcsize("iII")
    try:
        credentials = writer.get_extra_info("socket").getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, size
        )
    except OSError:  # gone already
        return -1
    return int(struct.unpack("iII", credentials)[1])


def _lock(path: Path) -> int | None:
    """A lock that ends with this process; None if another one has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:
        os.close(fd)
        raise
    return fd


def _bound(path: Path) -> socket.socket:
    """A socket with that path, 0600. Nobody can connect before it listens."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(
                errno.EEXIST, "a file that is no socket is in its place, move it away"
            )
        path.unlink()
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with short_address(path) as address:
            channel.bind(address)
        path.chmod(0o600)
        channel.setblocking(False)
    except OSError:
        channel.close()
        raise
    return channel


@contextlib.contextmanager
def short_address(path: Path) -> Iterator[str]:
    """``path``, or another one for the same file that is short enough for a socket."""
    if len(os.fsencode(path)) <= _LONGEST_ADDRESS:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
