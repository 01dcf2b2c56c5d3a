"""One D-Bus connection of dbus-next, with its sharp edges covered.

Three of the library's habits need more than care at the call: authentication spins for ever when
the bus closes the socket half way; sockets are left open after a failure; a broken connection
leaves exceptions in futures that nobody looks at.

It is slow, too: to decode one of systemd's signals takes longer than to act on it, and most of
them repeat what is known, or are of other units. So they are looked at before they are decoded.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import struct
from collections.abc import Callable
from typing import Any

from worker.errors import BusGone, SystemdError
from worker.systemd.library import (
    MarshallerStreamEndError,
    Message,
    MessageBus,
    MessageType,
    Unmarshaller,
)

DBUS = "org.freedesktop.DBus"
_SYSTEM_SOCKET = "unix:path=/run/dbus/system_bus_socket"

Needless = Callable[[str, str, str, bytes], bool]
"""Whether nobody needs a signal, by sender, path, name (member), and body as it goes over the wire
of a little-endian machine."""

# The D-Bus Specification, "Message Format": byte order, type, flags, version, length of the body,
# serial, length of the header fields; each of those is a code, a signature and the value.
_FIXED = struct.Struct("<BB2xI4xI")
_LITTLE_ENDIAN = ord("l")
_FIELDS = [
    re.compile(rb"%c\x01%c\x00....([^\x00]+)\x00" % field, re.DOTALL)
    for field in ((7, b"s"), (1, b"o"), (3, b"s"))  # sender, path, member
]


def bus_address(*, user: bool) -> str:
    """Where the system or the user bus listens. Raises SystemdError if there is no user bus."""
    if not user:
        return os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or _SYSTEM_SOCKET
    if address := os.environ.get("DBUS_SESSION_BUS_ADDRESS"):
        return address
    if folder := os.environ.get("XDG_RUNTIME_DIR"):
        return f"unix:path={folder}/bus"
    raise SystemdError(
        "no user bus: neither DBUS_SESSION_BUS_ADDRESS nor XDG_RUNTIME_DIR is set. Log in as the"
        " user; after su or sudo: export XDG_RUNTIME_DIR=/run/user/$(id -u), and where that folder"
        " is missing, loginctl enable-linger USER first"
    )


class _Unmarshaller(Unmarshaller):
    """Reads one message, leaving out those that are needless."""

    def __init__(self, stream: Any, needless: Needless) -> None:
        super().__init__(stream)  # type: ignore[no-untyped-call]
        self._needless = needless

    def unmarshall(self) -> Message | None:
        try:
            while self._next_is_needless():
                self.buf.clear()
        except MarshallerStreamEndError:
            return None
        message: Message | None = super().unmarshall()  # type: ignore[no-untyped-call]
        return message

    def _next_is_needless(self) -> bool:
        self.offset = 0
        self.read(16, prefetch=True)  # type: ignore[no-untyped-call]
        order, kind, body_size, fields_size = _FIXED.unpack_from(self.buf)
        if order != _LITTLE_ENDIAN or kind != MessageType.SIGNAL.value:
            return False
        body = 16 + fields_size + -fields_size % 8
        self.read(body + body_size, prefetch=True)  # type: ignore[no-untyped-call]
        sender, path, member = (
            found[1].decode() if (found := field.search(self.buf, 16, body)) else ""
            for field in _FIELDS
        )
        return self._needless(sender, path, member, bytes(self.buf[body:]))


class _MessageBus(MessageBus):
    """dbus-next is finished software, so its private names can be relied upon."""

    def __init__(self, address: str, needless: Needless) -> None:
        self._needless = needless
        super().__init__(bus_address=address)
        self._disconnect_future.add_done_callback(_look_at)

    def _create_unmarshaller(self) -> Unmarshaller:
        return _Unmarshaller(self._stream, self._needless)

    def _setup_socket(self) -> None:
        try:
            super()._setup_socket()  # type: ignore[no-untyped-call]
        except BaseException:
            self.release()
            raise

    async def _auth_readline(self) -> str:
        line = bytearray()
        while not line.endswith(b"\r\n"):
            data = await self._loop.sock_recv(self._sock, 1)
            if not data or len(line) > 4096:
                raise ConnectionError("the bus closed the connection during authentication")
            line += data
        return line[:-2].decode("ascii", "replace")

    def release(self) -> None:
        """Close the socket, which the library leaves to the garbage collector."""
        for name in ("_stream", "_sock"):
            if hasattr(self, name):
                with contextlib.suppress(OSError):
                    getattr(self, name).close()


class Connection:
    """Sends calls and pairs their answers. Once broken it stays broken; make a new one."""

    def __init__(
        self,
        address: str,
        on_signal: Callable[[Message], None],
        needless: Needless = lambda _sender, _path, _member, _body: False,
    ) -> None:
        self.address = address
        self.lost = asyncio.Event()
        self._on_signal = on_signal
        self._needless = needless
        self._bus: _MessageBus | None = None
        self._replies: dict[int, asyncio.Future[Message]] = {}
        self._unsent: asyncio.Future[None] | None = None
        self._write_turn = asyncio.Lock()

    @property
    def alive(self) -> bool:
        return self._bus is not None and self._bus.connected and not self.lost.is_set()

    async def open(self, timeout: float) -> None:
        """Connect and authenticate. Raises BusGone, naming the address."""
        try:
            async with asyncio.timeout(timeout):
                # Its constructor connects the socket and looks for the running event loop.
                self._bus = _MessageBus(self.address, self._needless)
                await self._bus.connect()
        except Exception as error:  # the library raises whatever went wrong, OSError to ValueError
            self.close()
            what = str(error) or type(error).__name__
            raise BusGone(
                f"cannot connect to D-Bus at {self.address}: {what}. Is dbus running?"
            ) from error
        except asyncio.CancelledError:
            self.close()
            raise
        self._bus.add_message_handler(self._dispatch)
        self._bus._disconnect_future.add_done_callback(lambda _future: self._break())
        if not self._bus.connected:  # lost between the greeting and here
            self._break()

    async def call(self, message: Message, timeout: float) -> Message:
        """Send a call and wait for its answer (which may be an error message).

        Raises BusGone when the connection is, or gets, lost, and TimeoutError.
        """
        bus = self._bus
        if bus is None or not self.alive:
            raise BusGone(f"not connected to D-Bus at {self.address}")
        message.serial = bus.next_serial()
        reply: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._replies[message.serial] = reply
        try:
            async with asyncio.timeout(timeout):
                # One message in the library's queue at a time: it treats a full socket buffer
                # as fatal when it comes to a second one.
                async with self._write_turn:
                    if self._unsent is not None and not self._unsent.done():
                        await asyncio.shield(self._unsent)  # left behind by a call that gave up
                    if reply.done():  # lost while we waited for our turn
                        return await reply
                    self._unsent = bus.send(message)
                    self._unsent.add_done_callback(_look_at)
                    with contextlib.suppress(OSError, EOFError):  # the supervisor tells
                        await asyncio.shield(self._unsent)
                return await reply
        finally:
            self._replies.pop(message.serial, None)
            _look_at(reply)

    def close(self) -> None:
        """Close for good; waiting calls raise BusGone."""
        bus, self._bus = self._bus, None
        if bus is not None:
            if bus.connected:
                bus.disconnect()  # type: ignore[no-untyped-call]
            bus._finalize(None)  # type: ignore[no-untyped-call]
            bus.release()
        self._break()

    def _dispatch(self, message: Message) -> None:
        if message.message_type is MessageType.SIGNAL:
            self._on_signal(message)
            return
        waiting = self._replies.get(message.reply_serial)
        if waiting is not None and not waiting.done() and _is_reply(message):
            waiting.set_result(message)

    def _break(self) -> None:
        self.lost.set()
        if self._unsent is not None and not self._unsent.done():
            self._unsent.set_exception(ConnectionError("connection lost"))
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(
                    BusGone(f"the connection to D-Bus at {self.address} broke during a call")
                )


def _is_reply(message: Message) -> bool:
    return message.message_type in (MessageType.METHOD_RETURN, MessageType.ERROR)


def _look_at(future: asyncio.Future[Any]) -> None:
    """Mark a future's exception as seen, so that asyncio does not report it as forgotten."""
    if future.done() and not future.cancelled():
        future.exception()
