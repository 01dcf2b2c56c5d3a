"""What of systemd's signals is news."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from worker.errors import BusGone
from worker.systemd.bus import Bus
from worker.systemd.library import Message, MessageType, Variant
from worker.systemd.names import object_path
from worker.systemd.tracker import Tracked, Tracker

NAME = "ffmpeg-job-one.service"
MANAGER = "org.freedesktop.systemd1.Manager"


@pytest.fixture
def tracker() -> Tracker:
    return Tracker(Bus())


@pytest.fixture
def unit(tracker: Tracker) -> Tracked:
    unit = tracker.track(NAME)
    unit.armed = True
    return unit


def properties(**values: object) -> Message:
    signatures: dict[type, str] = {str: "s", int: "u"}
    changed = {name: Variant(signatures[type(value)], value) for name, value in values.items()}
    return Message(
        message_type=MessageType.SIGNAL,
        path="/x",
        interface="org.freedesktop.DBus.Properties",
        member="PropertiesChanged",
        signature="sa{sv}as",
        body=["org.freedesktop.systemd1.Service", changed, ["ExecStart"]],
        serial=1,
    )


def body(message: Message) -> bytes:
    """As it goes over the wire."""
    wire: bytes = bytes(message._marshall())  # type: ignore[no-untyped-call]
    return wire[-int.from_bytes(wire[4:8], "little") :]


def hear(tracker: Tracker, unit: Tracked, **values: object) -> bool:
    """As the connection does: asked first, told then. False if it was needless."""
    message = properties(**values)
    if tracker.needless(unit.path, "PropertiesChanged", body(message)):
        return False
    message.path = unit.path
    tracker.on_signal(message)
    return True


def manager(member: str, *values: Any) -> Message:
    signature = "b" if len(values) == 1 else "so"
    return Message(
        message_type=MessageType.SIGNAL,
        path="/org/freedesktop/systemd1",
        interface=MANAGER,
        member=member,
        signature=signature,
        body=list(values),
        serial=1,
    )


def test_units_of_others_are_no_news(tracker: Tracker, unit: Tracked) -> None:
    message = body(properties(Result="success", MainPID=7))
    other = "/org/freedesktop/systemd1/unit/cron_2eservice"
    assert tracker.needless(other, "PropertiesChanged", message)
    assert not tracker.needless(unit.path, "PropertiesChanged", message)
    for name, needless in ((NAME, False), ("tmp.mount", True)):
        removed = body(manager("UnitRemoved", name, object_path(name)))
        assert tracker.needless("/org/freedesktop/systemd1", "UnitRemoved", removed) is needless
    for member, value in (("Reloading", True), ("JobRemoved", False)):
        told = body(manager(member, value))
        assert not tracker.needless("/org/freedesktop/systemd1", member, told)


def test_only_changes_are_news(tracker: Tracker, unit: Tracked) -> None:
    assert hear(tracker, unit, Result="success", MainPID=7)
    assert not hear(tracker, unit, Result="success", MainPID=7)
    assert unit.live.main_pid == 7
    assert hear(tracker, unit, Result="success", MainPID=8)
    assert hear(tracker, unit, Result="success", MainPID=7)
    assert unit.live.main_pid == 7


def test_a_verdict_told_again_is_a_reason_to_look(tracker: Tracker, unit: Tracked) -> None:
    hear(tracker, unit, Result="success", ExecMainCode=1)
    assert tracker._wake.is_set()
    tracker._dirty.clear()
    tracker._wake.clear()
    # Only where the unit is has changed, which is a property of another interface.
    assert not hear(tracker, unit, Result="success", ExecMainCode=1)
    assert tracker._dirty == {NAME}
    assert tracker._wake.is_set()


def test_what_may_have_been_missed_is_news_again(tracker: Tracker, unit: Tracked) -> None:
    hear(tracker, unit, Result="success", MainPID=7)
    tracker.reconnected()
    assert hear(tracker, unit, Result="success", MainPID=7)
    unit.restart()
    assert hear(tracker, unit, Result="success", MainPID=7)


def test_after_the_end_only_a_failure_is_news(tracker: Tracker, unit: Tracked) -> None:
    hear(tracker, unit, Result="success", ExecMainCode=1)
    unit.freeze()
    succeeded = {"ReloadResult": "success", "Result": "success", "CleanResult": "success"}
    assert not hear(tracker, unit, **succeeded, ControlPID=9)
    failed = succeeded | {"Result": "exit-code"}
    assert hear(tracker, unit, **failed, ControlPID=0)
    assert unit.live.result == "exit-code"
    assert unit.final is not None
    assert unit.final.result == "success"


def test_units_that_are_not_over(tracker: Tracker, unit: Tracked) -> None:
    other = tracker.track("ffmpeg-job-two.service")
    assert tracker.unfinished == 2
    other.freeze()
    assert tracker.unfinished == 1
    tracker.forget(unit)
    assert tracker.unfinished == 0


@pytest.mark.parametrize("connected", [True, False])
def test_a_unit_is_unloaded_unless_all_are_loaded_again(
    tracker: Tracker, unit: Tracked, monkeypatch: pytest.MonkeyPatch, connected: bool
) -> None:
    monkeypatch.setattr(Bus, "connected", connected)
    removed = manager("UnitRemoved", NAME, unit.path)
    tracker.on_signal(removed)
    assert unit.gone.is_set()
    assert unit.unloaded is connected  # while connecting, the begin of a reload may be missed
    unit.expect_removal()
    assert not unit.gone.is_set()
    assert not unit.unloaded
    tracker.on_signal(manager("Reloading", True))
    tracker.on_signal(removed)
    assert unit.gone.is_set()
    assert not unit.unloaded
    tracker.on_signal(manager("Reloading", False))
    tracker.on_signal(removed)
    assert unit.unloaded is connected


def test_a_reload_whose_end_was_missed_is_over(
    tracker: Tracker, unit: Tracked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bus, "connected", True)
    tracker.on_signal(manager("Reloading", True))
    tracker.reconnected()
    tracker.on_signal(manager("UnitRemoved", NAME, unit.path))
    assert unit.unloaded


async def test_the_watchdog_hears_of_each_round_and_of_a_bus_that_is_away(
    tracker: Tracker, unit: Tracked, monkeypatch: pytest.MonkeyPatch
) -> None:
    away, back = asyncio.Event(), asyncio.Event()
    promises: list[float] = []

    async def rows(_names: object) -> dict[str, dict[str, object]]:
        if back.is_set():
            return {NAME: {"LoadState": "not-found"}}
        raise BusGone("lost")

    async def wait_connected(_bus: Bus) -> None:
        away.set()
        await back.wait()

    monkeypatch.setattr(tracker, "rows", rows)
    monkeypatch.setattr(Bus, "wait_connected", wait_connected)
    tracker.beat = promises.append
    tracker.open()
    tracker.mark(unit)
    await asyncio.wait_for(away.wait(), 5)
    assert promises[-1] == math.inf
    back.set()
    await asyncio.wait_for(unit.done.wait(), 5)
    await asyncio.sleep(0)
    assert promises[-1] < math.inf
    await tracker.close()
