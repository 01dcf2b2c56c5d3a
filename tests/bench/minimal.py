"""The yardstick: a loop that makes only the D-Bus calls which cannot be avoided.

One unit after the other, no errors expected, no reconnecting, no time limits. Per cycle: the
start, the signal with the verdict, one look at where the unit is, the stop that unloads it, and
the signal that it is unloaded.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence

from worker.systemd.library import Message, MessageBus, MessageType
from worker.systemd.names import object_path

_SYSTEMD = "org.freedesktop.systemd1"
_MANAGER = f"{_SYSTEMD}.Manager"
_SERVICE = f"{_SYSTEMD}.Service"
_PROPERTIES = "org.freedesktop.DBus.Properties"
_DBUS = "org.freedesktop.DBus"
_SOCKET = "unix:path=/run/dbus/system_bus_socket"
_MATCHES = (
    f"type='signal',sender='{_SYSTEMD}',interface='{_PROPERTIES}',member='PropertiesChanged',"
    f"path_namespace='/org/freedesktop/systemd1/unit',arg0='{_SERVICE}'",
    f"type='signal',sender='{_SYSTEMD}',interface='{_MANAGER}',member='UnitRemoved'",
)


class MinimalLoop:
    """One unit, started and unloaded again and again."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._path = object_path(unit)
        self._ended = asyncio.Event()
        self._unloaded = asyncio.Event()
        self._status = -1
        self._bus: MessageBus | None = None

    async def open(self) -> None:
        address = os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or _SOCKET
        self._bus = MessageBus(bus_address=address)
        await self._bus.connect()
        self._bus.add_message_handler(self._on_message)
        for rule in _MATCHES:
            await self._call(_DBUS, "/org/freedesktop/DBus", _DBUS, "AddMatch", "s", [rule])
        await self._manager("Subscribe", "", [])

    def close(self) -> None:
        assert self._bus is not None
        self._bus.disconnect()  # type: ignore[no-untyped-call]

    async def cycle(self, properties: Sequence[object]) -> tuple[float, float]:
        """Seconds until the verdict was known, and until the unit was gone."""
        self._ended.clear()
        self._unloaded.clear()
        begun = time.perf_counter()
        body: list[object] = [self._unit, "fail", properties, []]
        await self._manager("StartTransientUnit", "ssa(sv)a(sa(sv))", body)
        await self._ended.wait()
        reply = await self._manager("ListUnitsByNames", "as", [[self._unit]])
        verdict = time.perf_counter() - begun
        row = reply.body[0][0]
        if (row[3], self._status) != ("active", 0):  # RemainAfterExit= keeps a clean exit active
            raise RuntimeError(f"{self._unit} is {row[3]} with exit status {self._status}")
        await self._manager("StopUnit", "ss", [self._unit, "replace"])
        await self._unloaded.wait()
        return verdict, time.perf_counter() - begun

    async def _manager(self, member: str, signature: str, body: list[object]) -> Message:
        path = "/org/freedesktop/systemd1"
        return await self._call(_SYSTEMD, path, _MANAGER, member, signature, body)

    async def _call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str,
        body: list[object],
    ) -> Message:
        assert self._bus is not None
        reply = await self._bus.call(
            Message(
                destination=destination,
                path=path,
                interface=interface,
                member=member,
                signature=signature,
                body=body,
            )
        )
        assert reply is not None
        if reply.message_type is MessageType.ERROR:
            raise RuntimeError(f"{member}: {reply.error_name}: {reply.body}")
        return reply

    def _on_message(self, message: Message) -> None:
        if message.member == "PropertiesChanged" and message.path == self._path:
            changed = message.body[1]
            if "ExecMainCode" in changed and changed["ExecMainCode"].value > 0:
                self._status = changed["ExecMainStatus"].value
                self._ended.set()
        elif message.member == "UnitRemoved" and message.body[0] == self._unit:
            self._unloaded.set()
