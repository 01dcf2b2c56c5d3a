"""The bus as the launcher needs it: calls that end, errors with a type, a connection that returns.

The race this file prevents: a connection breaks, nobody notices, and a call on it waits for ever.
Every call has a time limit, a supervisor sees the loss at once, fails what is waiting and connects
again, and whoever follows signals is told to look at everything afresh, because what was announced
in between is lost.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Callable, Coroutine, Sequence

from worker.errors import (
    BusGone,
    BusTimeout,
    NoSuchUnit,
    PropertyRejected,
    SystemdError,
    UnitExists,
)
from worker.systemd.connection import DBUS, Connection, bus_address
from worker.systemd.library import Message, MessageFlag, MessageType, Variant

logger = logging.getLogger(__name__)

SYSTEMD = "org.freedesktop.systemd1"
MANAGER_PATH = "/org/freedesktop/systemd1"
MANAGER = f"{SYSTEMD}.Manager"
PROPERTIES = f"{DBUS}.Properties"

_MAX_IN_FLIGHT = 16
_BACKOFF_FIRST_SEC = 0.1
_BACKOFF_LAST_SEC = 5.0
_REJECTED = re.compile(r"Cannot set property ([A-Za-z0-9]+), or unknown property")
_CONNECTION_ERRORS = frozenset(
    # The bus is there but systemd is not on it (yet): after a restart of either.
    f"{DBUS}.Error.{name}"
    for name in ("ServiceUnknown", "NameHasNoOwner", "NoReply", "Disconnected")
)
DENIED = frozenset(
    f"{DBUS}.Error.{name}"
    for name in ("AccessDenied", "InteractiveAuthorizationRequired", "AuthFailed")
)
_ALREADY_SUBSCRIBED = f"{SYSTEMD}.AlreadySubscribed"


class Bus:
    """A connection to systemd's manager over the system bus or the user's bus.

    ``on_signal`` gets the signals of systemd that ``matches`` (D-Bus match rules without sender)
    select; ``on_resync`` is called when signals may have been missed. ``needless`` is asked by
    path, name and undecoded body (see connection.Needless) which signals can be left out. All
    run in the event loop and must not block.
    """

    def __init__(
        self,
        *,
        user: bool = False,
        address: str | None = None,
        matches: Sequence[str] = (),
        on_signal: Callable[[Message], None] = lambda _message: None,
        on_resync: Callable[[], None] = lambda: None,
        needless: Callable[[str, str, bytes], bool] = lambda _path, _member, _body: False,
        call_timeout: float = 25.0,
    ) -> None:
        self._user = user
        self._address = address
        self._matches = [f"sender='{SYSTEMD}',{rule}" for rule in matches]
        self._matches.append(
            f"sender='{DBUS}',interface='{DBUS}',member='NameOwnerChanged',arg0='{SYSTEMD}'"
        )
        self._on_signal = on_signal
        self._on_resync = on_resync
        self._needless = needless
        self._call_timeout = call_timeout
        self._in_flight = asyncio.Semaphore(_MAX_IN_FLIGHT)
        self._connection: Connection | None = None
        self._ready = asyncio.Event()
        self._owner = ""
        self._supervisor: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def connected(self) -> bool:
        return self._connection is not None and self._connection.alive

    async def connect(self) -> None:
        """Connect for the first time; from then on lost connections come back by themselves.

        Raises SystemdError, naming the address. May be called again after that.
        """
        if self._supervisor is not None:
            return
        await self._connect()
        self._supervisor = asyncio.create_task(self._supervise(), name="bus supervisor")

    async def close(self) -> None:
        """Close for good; waiting calls raise BusGone."""
        tasks = [*self._tasks, *([self._supervisor] if self._supervisor else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._supervisor = None
        self._disconnect()
        self._ready.set()  # there is nothing to wait for any more

    async def wait_connected(self) -> None:
        """Wait until systemd can be reached. Raises BusGone if the bus is closed meanwhile."""
        await self._ready.wait()
        if self._supervisor is None:
            raise BusGone("the connection to D-Bus was closed")

    async def call(
        self,
        member: str,
        signature: str = "",
        body: Sequence[object] = (),
        *,
        path: str = MANAGER_PATH,
        interface: str = MANAGER,
        timeout: float | None = None,
    ) -> list[object]:
        """Call systemd and return the answer's values.

        Raises BusGone at once where there is no connection, BusTimeout after ``timeout`` seconds
        (the queue for one of the 16 places counts), and a SystemdError for an error answer.
        """
        message = _message(SYSTEMD, path, interface, member, signature, body)
        limit = self._call_timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(limit), self._in_flight:
                if self._connection is None:
                    raise BusGone(f"{member}: not connected to D-Bus")
                return await _exchange(self._connection, message, limit)
        except TimeoutError:
            raise BusTimeout(f"systemd did not answer {member} within {limit:g} s") from None

    async def get(self, path: str, interface: str, name: str) -> object:
        """One property."""
        body = [f"{SYSTEMD}.{interface}", name]
        (value,) = await self.call("Get", "ss", body, path=path, interface=PROPERTIES)
        return value.value if isinstance(value, Variant) else value

    async def get_all(self, path: str, interface: str) -> dict[str, object]:
        """All properties of an interface: 300 of a service, so not in the normal path."""
        body = [f"{SYSTEMD}.{interface}"]
        (values,) = await self.call("GetAll", "s", body, path=path, interface=PROPERTIES)
        assert isinstance(values, dict)
        return plain(values)

    async def _connect(self) -> None:
        self._disconnect()
        address = self._address or bus_address(user=self._user)
        connection = Connection(address, self._dispatch, self._is_needless)
        try:
            await connection.open(self._call_timeout)
            await self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self._ready.set()

    async def _prepare(self, connection: Connection) -> None:
        for rule in self._matches:
            await self._setup_call(connection, _message(DBUS, "/", DBUS, "AddMatch", "s", [rule]))
        # A rule's sender does not bind signals sent to us alone, so the sender is checked too.
        query = _message(DBUS, "/", DBUS, "GetNameOwner", "s", [SYSTEMD])
        owner = self._owner = str((await self._setup_call(connection, query))[0])
        try:
            await self._setup_call(
                connection, _message(SYSTEMD, MANAGER_PATH, MANAGER, "Subscribe")
            )
        except SystemdError as error:
            if error.name != _ALREADY_SUBSCRIBED:
                raise
        if self._owner != owner:  # a signal said so meanwhile
            raise BusGone("systemd left the bus while we subscribed to its signals")

    async def _setup_call(self, connection: Connection, message: Message) -> list[object]:
        try:
            return await _exchange(connection, message, self._call_timeout)
        except TimeoutError:
            raise BusTimeout(
                f"{message.destination} did not answer {message.member} over {connection.address}"
                f" within {self._call_timeout:g} s"
            ) from None

    def _disconnect(self) -> None:
        self._ready.clear()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _supervise(self) -> None:
        while True:
            assert self._connection is not None
            await self._connection.lost.wait()
            self._disconnect()
            logger.warning("lost the D-Bus connection, connecting again; jobs keep running")
            await self._reconnect()
            logger.info("connected to D-Bus again")
            self._resync()

    async def _reconnect(self) -> None:
        attempt = 0
        while True:
            try:
                await self._connect()
                return
            except Exception as error:  # giving up is no choice, whatever went wrong
                expected = isinstance(error, SystemdError)
                logger.log(
                    logging.WARNING if attempt in (0, 9) or not expected else logging.DEBUG,
                    "cannot connect to D-Bus (attempt %d): %s", attempt + 1, error,
                    exc_info=not expected,
                )  # fmt: skip
            # Full jitter: all who used this bus lost it at the same moment.
            limit = min(_BACKOFF_LAST_SEC, _BACKOFF_FIRST_SEC * 2 ** min(attempt, 10))
            await asyncio.sleep(random.uniform(0, limit))
            attempt += 1

    def _is_needless(self, sender: str, path: str, member: str, body: bytes) -> bool:
        # What others send is left to _dispatch: it must not pass for something systemd has said.
        return sender == self._owner and self._needless(path, member, body)

    def _dispatch(self, message: Message) -> None:
        try:
            if message.sender == DBUS and message.member == "NameOwnerChanged":
                name, _old, new = message.body
                if name == SYSTEMD:
                    self._owner = new
                    self._ready.clear()
                    if new and self.connected:
                        self._start(self._resubscribe())
            elif message.sender == self._owner:
                self._on_signal(message)
        except Exception:
            logger.exception("cannot handle the signal %s of %s", message.member, message.path)

    async def _resubscribe(self) -> None:
        # Re-executed, systemd remembers its subscribers; started anew, it does not.
        try:
            await self.call("Subscribe")
        except SystemdError as error:
            if error.name != _ALREADY_SUBSCRIBED:
                logger.warning("cannot subscribe to systemd's signals: %s", error)
                if self._connection is not None:
                    self._connection.close()  # the supervisor begins anew
                return
        self._ready.set()
        self._resync()

    def _resync(self) -> None:
        try:
            self._on_resync()
        except Exception:
            logger.exception("cannot start to look at all units again")

    def _start(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def plain(values: dict[str, object]) -> dict[str, object]:
    """A dictionary of properties without the variants around its values."""
    return {
        name: value.value if isinstance(value, Variant) else value for name, value in values.items()
    }


def translate(name: str, text: str, member: str) -> SystemdError:
    """The typed exception for a D-Bus error answer."""
    message = f"systemd refused {member}: {text or name}"
    if name in DENIED:
        message += " (run as root, or with --user for jobs of the user's own service manager)"
    if name == f"{SYSTEMD}.UnitExists":
        return UnitExists(message, name)
    if name == f"{SYSTEMD}.NoSuchUnit":
        return NoSuchUnit(message, name)
    if found := _REJECTED.search(text):
        return PropertyRejected(message, name, found[1])
    if name in _CONNECTION_ERRORS:
        return BusGone(message, name)
    if name in (f"{DBUS}.Error.Timeout", f"{DBUS}.Error.TimedOut"):
        return BusTimeout(message, name)
    return SystemdError(message, name)


async def _exchange(connection: Connection, message: Message, timeout: float) -> list[object]:
    reply = await connection.call(message, timeout)
    if reply.message_type is MessageType.ERROR:
        text = str(reply.body[0]) if reply.body else ""
        raise translate(reply.error_name or "", text, message.member)
    return list(reply.body)


def _message(
    destination: str,
    path: str,
    interface: str,
    member: str,
    signature: str = "",
    body: Sequence[object] = (),
) -> Message:
    return Message(
        destination=destination,
        path=path,
        interface=interface,
        member=member,
        signature=signature,
        body=list(body),
        # While systemd is away, an answer that says so; not an attempt to start it.
        flags=MessageFlag.NO_AUTOSTART,
    )
