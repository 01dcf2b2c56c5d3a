"""Attachments without a systemd: what is asked for, who is refused, what the kernel's files say."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from worker.errors import BusGone, NoSuchUnit, PropertyRejected, SystemdError, UnitExists
from worker.systemd.attachment import (
    AttachError,
    ScopeLimits,
    attachable,
    limit_properties,
    not_attached,
    scope_name,
    scope_properties,
)
from worker.systemd.bus import Bus
from worker.systemd.names import safe_id
from worker.systemd.processes import InForce, Processes, limits_in_force, parse_stat
from worker.systemd.property import Property
from worker.systemd.scope import Scopes, attachments

OWN = os.getpid()
HOME = "/system.slice/other.service"


class Proc:
    """A /proc of made-up processes; one that is born anew has another start time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.births = 100
        (folder / "self/ns").mkdir(parents=True)
        self._namespaces("self", "host")

    def add(
        self,
        pid: int,
        parent: int = 1,
        *,
        name: str = "ffmpeg",
        state: str = "S",
        flags: int = 0x400000,
        cgroup: str = HOME,
        world: str = "host",
        owner: int | None = None,
    ) -> None:
        self.births += 1
        place = self.folder / str(pid)
        (place / "ns").mkdir(parents=True, exist_ok=True)
        numbers = f"{state} {parent} 1 1 0 -1 {flags} {'0 ' * 12}{self.births} 0 0"
        (place / "stat").write_bytes(f"{pid} ({name}) {numbers}\n".encode())
        (place / "status").write_text(f"Name:\tx\nTgid:\t{owner or pid}\nRssAnon:\t    2048 kB\n")
        self._namespaces(str(pid), world)
        self.move(pid, cgroup)

    def move(self, pid: int, cgroup: str) -> None:
        (self.folder / str(pid) / "cgroup").write_text(f"0::{cgroup}\n")

    def end(self, pid: int) -> None:
        (self.folder / str(pid) / "stat").unlink()

    def _namespaces(self, process: str, world: str) -> None:
        for kind in ("pid", "cgroup"):
            link = self.folder / process / "ns" / kind
            link.unlink(missing_ok=True)
            link.symlink_to(f"{kind}:[{world}]")


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    proc = Proc(tmp_path / "proc")
    proc.add(1, 0, name="systemd", cgroup="/init.scope")
    proc.add(10)
    proc.add(11, 10, name="a (b) c")
    proc.add(12, 11)
    proc.add(13)
    return proc


@pytest.fixture
def look(proc: Proc) -> Processes:
    return Processes(proc.folder)


def pids(look: Processes, pid: int) -> list[int]:
    return sorted(member.pid for member in look.family(pid))


# processes


def test_a_line_of_stat_with_an_odd_name() -> None:
    line = "7 (a) R 1\x1b) S 3 7 7 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 4711 0 0"
    process = parse_stat(line)
    assert (process.pid, process.parent, process.started) == (7, 3, 4711)
    assert process.name == "a) R 1?"
    assert not process.ended
    assert not process.kernel


def test_a_family(proc: Proc, look: Processes) -> None:
    assert look.family(10)[0].pid == 10
    assert pids(look, 10) == [10, 11, 12]
    assert pids(look, 12) == [12]
    assert look.family(99) == []
    proc.add(11, 10, state="Z")
    assert pids(look, 10) == [10, 12]  # not yet given to another parent
    assert look.family(11) == []


def test_what_is_known_of_a_process(look: Processes) -> None:
    assert look.anonymous_bytes(10) == 2 << 20
    assert look.anonymous_bytes(99) == 0
    assert look.unit(10) == "other.service"
    assert look.unit(1) == "init.scope"
    assert look.unit(99) == ""


@pytest.mark.parametrize(
    ("lines", "unit"),
    [
        ("0::/a.slice/x.scope\n", "x.scope"),
        ("3:cpu,cpuacct:/\n1:name=systemd:/a.slice/x.service/inner\n0::/\n", "x.service"),
        ("1:name=systemd:/docker/1234\n", ""),
        ("0::/user.slice/user@7.service/app.slice/x.scope\n", "x.scope"),
        ("0::/\n", ""),
    ],
)
def test_the_unit_of_a_process(proc: Proc, look: Processes, lines: str, unit: str) -> None:
    (proc.folder / "10/cgroup").write_text(lines)
    assert look.unit(10) == unit


# who may be attached


def test_an_ordinary_process_may(look: Processes) -> None:
    assert [member.pid for member in attachable(look, 10)] == [10, 11, 12]


def test_others_may_not(proc: Proc, look: Processes) -> None:
    proc.add(2, 0, name="kthreadd", flags=0x208040)
    proc.add(20, cgroup="/ffmpeg.slice/ffmpeg-live.slice/ffmpeg-job-17.service")
    proc.add(30, cgroup="/ffmpeg.slice/ffmpeg-default.slice/ffmpeg-job-attached-30.scope")
    proc.add(31, 13, cgroup="/ffmpeg.slice/ffmpeg-default.slice/ffmpeg-job-attached-31.scope")
    proc.add(40, cgroup="/system.slice/ffmpeg-worker.service")
    proc.add(50, world="container")
    proc.add(60, owner=10)
    proc.add(70)
    proc.add(OWN, 70)
    for pid, text in {
        1: "process 1 is the service manager",
        2: r"2 \(kthreadd\) is a thread of the kernel",
        99: "no process has the PID 99",
        20: "is in ffmpeg-job-17.service already: it is a job of the worker",
        30: "in ffmpeg-job-attached-30.scope already: ffmpeg-worker detach 30 comes first",
        13: "its child 31 is in ffmpeg-job-attached-31.scope already: ffmpeg-worker detach 31",
        40: "is the worker",
        50: "is in a container",
        60: "60 is a thread: attach its process, 10",
        70: "process 70 runs this command",
        OWN: f"process {OWN} is this command itself",
    }.items():
        with pytest.raises(AttachError, match=text) as caught:
            attachable(look, pid)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_status == 1


def test_what_is_not_attached_is_told_where_to_look(proc: Proc, look: Processes) -> None:
    proc.add(31, 30, cgroup="/ffmpeg.slice/ffmpeg-default.slice/ffmpeg-job-attached-30.scope")
    assert "is in ffmpeg-job-attached-30.scope: ffmpeg-worker detach 30" in not_attached(look, 31)
    assert "process 10 is not attached: systemctl list-units" in not_attached(look, 10)
    proc.add(40, cgroup="/user@7.service/ffmpeg.slice/ffmpeg-job-attached-40.scope")
    assert "try it with --user, or without" in not_attached(look, 40)


# properties


def values(properties: Sequence[Property]) -> dict[str, object]:
    names = [item.name for item in properties]
    assert len(names) == len(set(names))
    return {item.name: item.value for item in properties}


def test_all_limits() -> None:
    found = values(limit_properties(ScopeLimits(150, 64 << 20, 90)))
    assert found["CPUQuotaPerSecUSec"] == 1_500_000
    assert (found["MemoryMax"], found["MemorySwapMax"]) == (64 << 20, 0)
    assert found["RuntimeMaxUSec"] == 90_000_000
    assert found["Slice"] == "ffmpeg-default.slice"


def test_what_is_not_asked_for_is_not_limited() -> None:
    found = values(limit_properties(ScopeLimits()))
    assert not {"CPUQuotaPerSecUSec", "MemoryMax", "MemorySwapMax", "RuntimeMaxUSec"} & set(found)
    assert values(scope_properties([1], ""))["TasksMax"] == 2**64 - 1


def test_no_limit_is_silently_left_out_where_systemd_does_not_know_it() -> None:
    properties = [*scope_properties([3], "x"), *limit_properties(ScopeLimits(1, 1, 1))]
    needed = {item.name for item in properties if not item.optional}
    assert needed >= {"PIDs", "CPUQuotaPerSecUSec", "MemoryMax", "RuntimeMaxUSec"}


def test_no_job_can_have_the_name_of_an_attachment() -> None:
    assert not safe_id("attached-17").startswith("attached")
    assert scope_name(17) == "ffmpeg-job-attached-17.scope"


# limits in force

UNIT = "ffmpeg-job-attached-7.scope"


def files(root: Path, contents: Mapping[str, str]) -> Path:
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_in_force_on_v2(tmp_path: Path) -> None:
    root = files(
        tmp_path,
        {
            f"a.slice/{UNIT}/cpu.max": "25000 50000\n",
            f"a.slice/{UNIT}/memory.max": "67108864\n",
            f"a.slice/{UNIT}/memory.swap.max": "0\n",
        },
    )
    assert limits_in_force(UNIT, {"": f"/a.slice/{UNIT}"}, root) == InForce(50.0, 64 << 20, 0)


def test_nothing_in_force_on_v2(tmp_path: Path) -> None:
    root = files(
        tmp_path,
        {f"{UNIT}/cpu.max": "max 100000\n", f"{UNIT}/memory.max": "max\n", "x/cpu.max": "1 1\n"},
    )
    assert limits_in_force(UNIT, {"": f"/{UNIT}"}, root) == InForce()
    assert limits_in_force(UNIT, {"": "/x"}, root) == InForce()
    assert limits_in_force(UNIT, {}, root) == InForce()


def test_in_force_on_v1(tmp_path: Path) -> None:
    root = files(
        tmp_path,
        {
            f"cpu/s/{UNIT}/cpu.cfs_quota_us": "150000\n",
            f"cpu/s/{UNIT}/cpu.cfs_period_us": "100000\n",
            f"memory/s/{UNIT}/memory.limit_in_bytes": "67108864\n",
        },
    )
    place = f"/s/{UNIT}"
    cgroups = {"cpu": place, "cpuacct": "/", "memory": place, "name=systemd": place, "": place}
    assert limits_in_force(UNIT, cgroups, root) == InForce(150.0, 64 << 20, None)
    assert limits_in_force(UNIT, {**cgroups, "cpu": "/s"}, root).cpu_percent is None


def test_nothing_in_force_on_v1(tmp_path: Path) -> None:
    root = files(
        tmp_path,
        {
            f"cpu/{UNIT}/cpu.cfs_quota_us": "-1\n",
            f"cpu/{UNIT}/cpu.cfs_period_us": "100000\n",
            f"memory/{UNIT}/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert limits_in_force(UNIT, {"cpu": f"/{UNIT}", "memory": f"/{UNIT}"}, root) == InForce()


# on a bus that does as the test wants


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
                raise SystemdError(text, "org.freedesktop.DBus.Error.Failed")
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


LIMITS = ScopeLimits(cpu_percent=50)
MINE = scope_name(10)


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
    refusal = SystemdError(
        "Process with ID 12 does not exist.", "org.freedesktop.DBus.Error.Failed"
    )
    systemd.errors = [refusal]
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
            raise SystemdError("does not exist", "org.freedesktop.DBus.Error.Failed")

    scopes.bus = bus = Refusing(proc)
    assert (await scopes.attach(10, LIMITS)).pids == {10, 11, 12}
    assert bus.added == [11, 12]
    assert (await scopes.detach(10)).pids == {10, 11}
    assert MINE not in bus.units


async def test_a_refusal_for_another_reason_is_told(scopes: Scopes, systemd: Systemd) -> None:
    systemd.errors = [SystemdError("no", "org.freedesktop.DBus.Error.Failed")] * 4
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
            raise SystemdError("does not exist", "org.freedesktop.DBus.Error.Failed")

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
        raise SystemdError("does not exist", "org.freedesktop.DBus.Error.Failed")

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
