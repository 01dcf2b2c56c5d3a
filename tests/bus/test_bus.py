"""The connection itself: errors with a type, calls that end, and a bus that returns."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import dbus
import pytest

from worker.errors import (
    BusGone,
    BusTimeout,
    NoSuchUnit,
    PropertyRejected,
    SystemdError,
    UnitExists,
)
from worker.systemd.bus import MANAGER_PATH, Bus, translate
from worker.systemd.connection import bus_address
from worker.systemd.library import Message
from worker.systemd.tracker import MATCHES

if TYPE_CHECKING:
    from .conftest import Systemd

UNIT_PATH = "/org/freedesktop/systemd1/unit/a_2eservice"


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("org.freedesktop.systemd1.UnitExists", "Unit a already loaded.", UnitExists),
        ("org.freedesktop.systemd1.NoSuchUnit", "Unit a not loaded.", NoSuchUnit),
        (
            "org.freedesktop.DBus.Error.PropertyReadOnly",
            "Cannot set property OOMPolicy, or unknown property.",
            PropertyRejected,
        ),
        ("org.freedesktop.DBus.Error.ServiceUnknown", "", BusGone),
        ("org.freedesktop.DBus.Error.NoReply", "", BusGone),
        ("org.freedesktop.DBus.Error.TimedOut", "", BusTimeout),
        ("org.freedesktop.DBus.Error.AccessDenied", "no", SystemdError),
    ],
)
def test_errors_have_a_type(name: str, text: str, kind: type[SystemdError]) -> None:
    error = translate(name, text, "StartTransientUnit")
    assert type(error) is kind
    assert error.name == name
    assert "StartTransientUnit" in str(error)
    if isinstance(error, PropertyRejected):
        assert error.property_name == "OOMPolicy"


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DBUS_SYSTEM_BUS_ADDRESS", "DBUS_SESSION_BUS_ADDRESS", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert bus_address(user=False) == "unix:path=/run/dbus/system_bus_socket"
    with pytest.raises(SystemdError, match="enable-linger"):
        bus_address(user=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert bus_address(user=True) == "unix:path=/run/user/7/bus"
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", "unix:path=/s")
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/y")
    assert (bus_address(user=True), bus_address(user=False)) == ("unix:path=/s", "unix:path=/y")


@pytest.mark.parametrize("answer", [b"", b"OK 123", b"REJECTED EXTERNAL\r\n", b"\xff\r\n"])
async def test_a_bus_that_hangs_up_while_connecting(tmp_path: Path, answer: bytes) -> None:
    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    path = tmp_path / "bus"
    async with await asyncio.start_unix_server(serve, path):
        bus = Bus(address=f"unix:path={path}", call_timeout=10)
        begun = time.monotonic()
        with pytest.raises(SystemdError, match=str(path)):
            await bus.connect()
        assert time.monotonic() - begun < 5
        await bus.close()


async def test_a_bus_that_says_nothing(tmp_path: Path) -> None:
    over = asyncio.Event()

    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await over.wait()
        writer.close()
        await writer.wait_closed()

    path = tmp_path / "bus"
    async with await asyncio.start_unix_server(serve, path):
        bus = Bus(address=f"unix:path={path}", call_timeout=0.2)
        with pytest.raises(BusGone, match=str(path)):
            await bus.connect()
        over.set()
        await bus.close()


@pytest.mark.parametrize("address", ["", "nonsense", "unix:path=/nonexistent", "x:y=z"])
async def test_addresses_that_lead_nowhere(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent")
    bus = Bus(address=address)
    with pytest.raises(SystemdError, match="Is dbus running"):
        await bus.connect()
    with pytest.raises(BusGone):
        await bus.call("ListUnitsByNames", "as", [[]])
    await bus.close()


class Heard:
    def __init__(self) -> None:
        self.signals: list[str] = []
        self.resyncs = asyncio.Event()
        self.fail = False
        self.asked: list[tuple[str, str, bytes]] = []
        self.needless_paths: set[str] = set()

    def needless(self, path: str, member: str, body: bytes) -> bool:
        self.asked.append((path, member, body))
        return path in self.needless_paths

    def signal(self, message: Message) -> None:
        if self.fail:
            raise RuntimeError("no good")
        self.signals.append(message.member)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
async def bus(systemd: Systemd, heard: Heard) -> AsyncIterator[Bus]:
    bus = Bus(
        matches=MATCHES,
        on_signal=heard.signal,
        on_resync=heard.resyncs.set,
        needless=heard.needless,
    )
    await bus.connect()
    yield bus
    await bus.close()


async def test_only_systemd_is_believed(systemd: Systemd, bus: Bus, heard: Heard) -> None:
    forger = dbus.bus.BusConnection(systemd.address)
    assert bus._connection is not None
    assert bus._connection._bus is not None
    for destination in (None, bus._connection._bus.unique_name):
        forged = dbus.lowlevel.SignalMessage(
            UNIT_PATH, "org.freedesktop.DBus.Properties", "PropertiesChanged"
        )
        forged.append("org.freedesktop.systemd1.Service", {}, [], signature="sa{sv}as")
        if destination:
            forged.set_destination(destination)
        forger.send_message(forged)
    forger.flush()
    forger.call_blocking("org.freedesktop.DBus", "/", "org.freedesktop.DBus", "GetId", "", ())
    await bus.call("ListUnitsByNames", "as", [[]])
    assert heard.signals == []
    assert heard.asked == []
    systemd.manager("Reload")
    await bus.call("ListUnitsByNames", "as", [[]])
    assert heard.signals == ["Reloading", "Reloading"]
    forger.close()


async def test_needless_signals_are_left_out(systemd: Systemd, bus: Bus, heard: Heard) -> None:
    heard.needless_paths.add(UNIT_PATH)
    for name in ("a.service", "b.service"):
        systemd.Load(name, "failed", "failed", 1, 7)
        systemd.manager("ResetFailedUnit", name)
    await bus.call("ListUnitsByNames", "as", [["x" * 100_000]])  # an answer in many pieces
    other = UNIT_PATH.replace("a_2e", "b_2e")
    changed, removed = "PropertiesChanged", "UnitRemoved"
    assert [(path, member) for path, member, _body in heard.asked] == [
        *[(UNIT_PATH, changed)] * 2, (MANAGER_PATH, removed),
        *[(other, changed)] * 2, (MANAGER_PATH, removed),
    ]  # fmt: skip
    body = heard.asked[0][2]
    assert b"ExecMainStatus" in body
    assert b"PropertiesChanged" not in body
    # Neither what comes before nor what comes after such a signal is lost.
    assert heard.signals == [removed, changed, changed, removed]


async def test_a_handler_that_fails_does_no_harm(
    systemd: Systemd, bus: Bus, heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    heard.fail = True
    with caplog.at_level(logging.ERROR):
        systemd.manager("Reload")
        await bus.call("ListUnitsByNames", "as", [[]])
    assert "cannot handle the signal Reloading" in caplog.text
    heard.fail = False
    systemd.manager("Reload")
    await bus.call("ListUnitsByNames", "as", [[]])
    assert heard.signals == ["Reloading", "Reloading"]


async def test_waiting_calls_fail_at_once_when_the_bus_goes(systemd: Systemd, bus: Bus) -> None:
    systemd.Hang(["StartTransientUnit"])
    body = ["a.service", "fail", [], []]
    call = asyncio.create_task(bus.call("StartTransientUnit", "ssa(sv)a(sa(sv))", body))
    await bus.call("ListUnitsByNames", "as", [[]])
    begun = time.monotonic()
    systemd.stop_bus()
    with pytest.raises(BusGone):
        await call
    with pytest.raises(BusGone):
        await bus.call("ListUnitsByNames", "as", [[]])
    assert time.monotonic() - begun < 2


async def test_it_comes_back_and_hears_again(systemd: Systemd, bus: Bus, heard: Heard) -> None:
    for _ in range(2):
        systemd.stop_bus()
        systemd.start()
        await asyncio.wait_for(heard.resyncs.wait(), 20)
        heard.resyncs.clear()
        heard.signals.clear()
        systemd.manager("Reload")
        await bus.call("ListUnitsByNames", "as", [[]])
        assert heard.signals == ["Reloading", "Reloading"]


async def test_closing_wakes_those_who_wait_for_a_connection(systemd: Systemd, bus: Bus) -> None:
    systemd.stop_bus()
    with pytest.raises(BusGone):
        await bus.call("ListUnitsByNames", "as", [[]])
    waiting = asyncio.create_task(bus.wait_connected())
    await asyncio.sleep(0)
    await bus.close()
    with pytest.raises(BusGone, match="was closed"):
        await asyncio.wait_for(waiting, 5)


async def test_closing_ends_it(systemd: Systemd, bus: Bus) -> None:
    await bus.close()
    assert not bus.connected
    with pytest.raises(BusGone):
        await bus.call("ListUnitsByNames", "as", [[]])
    systemd.stop_bus()


async def test_large_messages_in_a_crowd(bus: Bus) -> None:
    calls = (bus.call("ListUnitsByNames", "as", [["x" * 1000] * 500]) for _ in range(60))
    answers = await asyncio.gather(*calls)
    assert len(answers) == 60
    assert bus.connected
