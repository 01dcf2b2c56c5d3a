"""Attaching and detaching, on a bus that does as the test wants."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.unit.attach.proc import Proc
from worker.errors import BusGone, NoSuchUnit, PropertyRejected, SystemdError, UnitExists
from worker.systemd.attachment import AttachError, ScopeLimits, scope_name
from worker.systemd.bus import Bus
from worker.systemd.processes import Processes
from worker.systemd.scope import Scopes, attachments

FAILED = "org.freedesktop.DBus.Error.Failed"
LIMITS = ScopeLimits(cpu_percent=50)
MINE = scope_name(10)


class Systemd(Bus):
    """Scopes as systemd has them, on the processes of a Proc."""

    def __init__(self, proc: Proc) -> None:
        super().__init__(address="unix:path=/nonexistent")
        self.proc = proc
        self.units: dict[str, set[int]] = {}
        self.sent: list[dict[str, object]] = []
        self.errors: list[SystemdError] = []
        self.moves = True
        self.on_start: list[object] = []
        self.added: list[int] = []

    async def connect(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def get(self, path: str, interface: str, name: str) -> object:
        return "252.39" if name == "Version" else self.sent[0].get(name, 2**64 - 1)

    async def call(
        self, member: str, signature: str = "", body: Sequence[object] = (), **_: object
    ) -> list[object]:
        method = getattr(self, f"do_{member}")
        result: list[object] = method(*body)
        return result

    def put(self, unit: str, pid: int) -> None:
        for members in self.units.values():
            members.discard(pid)
        self.units[unit].add(pid)
        self.units = {name: pids for name, pids in self.units.items() if pids or name == unit}
        self.proc.move(pid, f"/ffmpeg.slice/{unit}")

    def do_StartTransientUnit(  # noqa: N802
        self, unit: str, mode: str, rows: list[list[object]], aux: object
    ) -> list[object]:
        properties = {str(name): variant.value for name, variant in rows}  # type: ignore[attr-defined]
        if self.errors:
            raise self.errors.pop(0)
        if unit in self.units:
            raise UnitExists("exists", "org.freedesktop.systemd1.UnitExists")
        wanted: list[int] = properties["PIDs"]
        for pid in wanted:
            if not (self.proc.folder / str(pid) / "stat").exists():
                text = f"Process with ID {pid} does not exist."
                raise SystemdError(text, FAILED)
        self.sent.append(properties)
        if self.moves:
            self.units[unit] = set()
            for pid in wanted:
                self.put(unit, pid)
        for event in self.on_start:
            event()  # type: ignore[operator]
        self.on_start = []
        return ["/job/1"]

    def do_AttachProcessesToUnit(self, unit: str, path: str, pids: list[int]) -> list[object]:  # noqa: N802
        for pid in pids:
            self.added.append(pid)
            self.put(unit, pid)
        return []

    def do_GetUnitProcesses(self, unit: str) -> list[object]:  # noqa: N802
        if unit not in self.units:
            raise NoSuchUnit("none", "org.freedesktop.systemd1.NoSuchUnit")
        return [[["/x", pid, "ffmpeg"] for pid in self.units[unit]]]

    def do_GetUnit(self, unit: str) -> list[object]:  # noqa: N802
        self.do_GetUnitProcesses(unit)
        return ["/unit"]

    def do_ListUnitsByNames(self, names: list[str]) -> list[object]:  # noqa: N802
        return [[[names[0], "", "loaded", "active", "running", "", "/", 0, "", "/"]]]

    def do_ListUnitsByPatterns(self, states: list[str], patterns: list[str]) -> list[object]:  # noqa: N802
        assert (states, patterns) == (["active"], ["ffmpeg-job-attached-*.scope"])
        return [[[name, ""] for name in self.units]]


@pytest.fixture
def systemd(proc: Proc) -> Systemd:
    return Systemd(proc)


@pytest.fixture
async def scopes(systemd: Systemd, look: Processes, tmp_path: Path) -> Scopes:
    scopes = Scopes(processes=look, cgroup_root=tmp_path)
    scopes.bus = systemd
    await scopes.connect()
    return scopes


async def test_attach_and_detach(scopes: Scopes, systemd: Systemd) -> None:
    done = await scopes.attach(10, ScopeLimits(50, 64 << 20, 60))
    assert (done.unit, done.pids, done.outside) == (MINE, frozenset({10, 11, 12}), frozenset())
    assert (done.came_from, done.held_bytes, done.runtime_sec) == ("other.service", 6 << 20, 60)
    assert await attachments(systemd) == {MINE}
    gone = await scopes.detach(10)
    assert (gone.unit, gone.pids) == ("ffmpeg-detached-10.scope", frozenset({10, 11, 12}))
    assert "CPUQuotaPerSecUSec" not in systemd.sent[1]
    assert MINE not in systemd.units


async def test_children_born_meanwhile_are_brought_in(
    scopes: Scopes, systemd: Systemd, proc: Proc
) -> None:
    systemd.on_start = [lambda: proc.add(14, 12), lambda: proc.add(15, 14)]
    done = await scopes.attach(10, LIMITS)
    assert done.pids == {10, 11, 12, 14, 15}
    assert sorted(systemd.added) == [14, 15]


async def test_a_child_that_ends_meanwhile_is_left_out(
    scopes: Scopes, systemd: Systemd, proc: Proc
) -> None:
    systemd.errors = [SystemdError("Process with ID 12 does not exist.", FAILED)]
    proc.add(12, 11, state="Z")
    assert (await scopes.attach(10, LIMITS)).pids == {10, 11}


async def test_a_family_of_which_one_always_ends(scopes: Scopes, proc: Proc) -> None:
    class Refusing(Systemd):
        def do_StartTransientUnit(  # noqa: N802
            self, unit: str, mode: str, rows: list[list[Any]], aux: object
        ) -> list[object]:
            wanted = {name: variant.value for name, variant in rows}["PIDs"]
            if len(wanted) == 1:
                return super().do_StartTransientUnit(unit, mode, rows, aux)
            if unit != MINE:
                proc.add(12, 11, state="Z")
                self.units[MINE].discard(12)
            raise SystemdError("does not exist", FAILED)

    scopes.bus = bus = Refusing(proc)
    assert (await scopes.attach(10, LIMITS)).pids == {10, 11, 12}
    assert bus.added == [11, 12]
    assert (await scopes.detach(10)).pids == {10, 11}
    assert MINE not in bus.units


async def test_a_refusal_for_another_reason_is_told(scopes: Scopes, systemd: Systemd) -> None:
    systemd.errors = [SystemdError("no", FAILED)] * 4
    with pytest.raises(SystemdError, match="no"):
        await scopes.attach(10, LIMITS)
    assert len(systemd.errors) == 1


async def test_a_process_that_ends_meanwhile(scopes: Scopes, systemd: Systemd, proc: Proc) -> None:
    systemd.on_start = [lambda: proc.end(10)]
    with pytest.raises(AttachError, match="10 ended meanwhile; 2 of its children are limited"):
        await scopes.attach(10, LIMITS)
    for pid in (11, 12):
        proc.end(pid)
    proc.add(10)
    systemd.units.clear()
    systemd.moves = False
    systemd.on_start = [lambda: proc.end(10)]
    with pytest.raises(AttachError, match="ended before it could be limited"):
        await scopes.attach(10, LIMITS)


async def test_a_pid_that_went_to_another_before_the_start(
    scopes: Scopes, systemd: Systemd, proc: Proc
) -> None:
    class Refusing(Systemd):
        def do_StartTransientUnit(self, *body: object) -> list[object]:  # noqa: N802
            proc.add(10)
            raise SystemdError("does not exist", FAILED)

    scopes.bus = Refusing(proc)
    with pytest.raises(AttachError, match="ended before it could be limited"):
        await scopes.attach(10, LIMITS)


@pytest.mark.parametrize("pid", [10, 12])
async def test_a_pid_that_went_to_another_during_it(
    scopes: Scopes, systemd: Systemd, proc: Proc, pid: int
) -> None:
    systemd.on_start = [lambda: proc.add(pid, 11 if pid == 12 else 1, cgroup=f"/{MINE}")]
    with pytest.raises(AttachError, match="went to another while 10 was attached"):
        await scopes.attach(10, LIMITS)
    assert set(systemd.units) == {"ffmpeg-detached-10.scope"}


async def test_what_systemd_does_not_move(scopes: Scopes, systemd: Systemd) -> None:
    systemd.moves = False
    with pytest.raises(AttachError, match="could not move process 10 into"):
        await scopes.attach(10, LIMITS)


async def test_a_scope_that_children_of_an_earlier_process_are_in(
    scopes: Scopes, systemd: Systemd
) -> None:
    systemd.units[MINE] = {13}
    with pytest.raises(AttachError, match="still holds children of an earlier process 10"):
        await scopes.attach(10, LIMITS)
    assert (await scopes.detach(10)).pids == {13}


async def test_a_second_detached_scope(scopes: Scopes, systemd: Systemd) -> None:
    await scopes.attach(10, LIMITS)
    systemd.units["ffmpeg-detached-10.scope"] = {13}
    assert (await scopes.detach(10)).unit == "ffmpeg-detached-10-2.scope"


async def test_detach_of_what_has_just_ended(scopes: Scopes, systemd: Systemd) -> None:
    await scopes.attach(10, LIMITS)

    def end(*_: object) -> list[object]:
        systemd.units.clear()
        raise SystemdError("does not exist", FAILED)

    systemd.do_StartTransientUnit = end  # type: ignore[method-assign,assignment]
    done = await scopes.detach(10)
    assert (done.unit, done.pids) == ("", frozenset())


async def test_detach_of_what_is_not_attached(scopes: Scopes) -> None:
    with pytest.raises(AttachError, match="process 10 is not attached"):
        await scopes.detach(10)


@pytest.mark.parametrize("name", ["AccessDenied", "InteractiveAuthorizationRequired"])
async def test_not_permitted(scopes: Scopes, systemd: Systemd, name: str) -> None:
    systemd.errors = [SystemdError("no", f"org.freedesktop.DBus.Error.{name}")]
    with pytest.raises(AttachError, match="run this as root, or with --user"):
        await scopes.attach(10, LIMITS)


async def test_an_unknown_property_that_is_no_limit_is_left_out(
    scopes: Scopes, systemd: Systemd
) -> None:
    systemd.errors = [
        PropertyRejected("x", "n", "OOMPolicy"),
        PropertyRejected("x", "n", "TasksMax"),
    ]
    await scopes.attach(10, LIMITS)
    assert not {"OOMPolicy", "TasksMax"} & set(systemd.sent[0])


async def test_an_unknown_limit_is_not_left_out(scopes: Scopes, systemd: Systemd) -> None:
    systemd.errors = [PropertyRejected("x", "n", "MemorySwapMax")]
    with pytest.raises(PropertyRejected):
        await scopes.attach(10, ScopeLimits(memory_bytes=1 << 30))


async def test_a_lost_bus_is_not_asked_twice(scopes: Scopes, systemd: Systemd) -> None:
    systemd.errors = [BusGone("gone"), BusGone("gone")]
    with pytest.raises(BusGone):
        await scopes.attach(10, LIMITS)
    assert len(systemd.errors) == 1


async def test_an_old_systemd_has_no_time_limit(scopes: Scopes, systemd: Systemd) -> None:
    async def old(*_: object) -> object:
        return "239 (239-82.el8)"

    systemd.get = old  # type: ignore[method-assign,assignment]
    await scopes.connect()
    with pytest.raises(AttachError, match="systemd 239 cannot end a scope after a time"):
        await scopes.attach(10, ScopeLimits(cpu_percent=1, runtime_sec=5))
    assert systemd.units == {}
    assert (await scopes.attach(10, LIMITS)).runtime_sec is None
