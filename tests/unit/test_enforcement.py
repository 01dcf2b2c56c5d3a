"""Which limits hold: read from made-up cgroup trees, and asked of a launcher that misbehaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest

from worker.errors import BusGone, SystemdError
from worker.systemd import enforcement
from worker.systemd.enforcement import Enforcement, Limit, check, examine
from worker.systemd.launch import Launch
from worker.systemd.launcher import Launcher
from worker.systemd.state import UnitState

UNIT = "ffmpeg-limits-check-1.service"
PLACE = f"/ffmpeg.slice/{UNIT}"
V1 = ("cpu", "memory", "pids", "blkio")
V1_CGROUPS = {**dict.fromkeys(V1, PLACE), "name=systemd": PLACE, "": PLACE, "freezer": "/"}
V1_USER = {**dict.fromkeys(V1, "/user.slice"), "name=systemd": PLACE, "": PLACE}
V1_FILES = {
    f"cpu{PLACE}/cpu.cfs_quota_us": "50000\n",
    f"cpu{PLACE}/cpu.cfs_period_us": "100000\n",
    f"cpu{PLACE}/cpu.shares": "1536\n",
    f"memory{PLACE}/memory.limit_in_bytes": f"{64 << 20}\n",
    f"pids{PLACE}/pids.max": "64\n",
    f"blkio{PLACE}/blkio.bfq.weight": "168\n",
    # what a user's processes are in on v1 has limits too, but not theirs
    "cpu/user.slice/cpu.shares": "1536\n",
    "pids/user.slice/pids.max": "64\n",
}
V2_CGROUPS = {"": PLACE}
V2_FILES = {
    "cgroup.controllers": "cpuset cpu io memory pids\n",
    f"{PLACE}/cgroup.controllers": "cpu io memory pids\n",
    f"{PLACE}/cpu.max": "50000 100000\n",
    f"{PLACE}/cpu.weight": "150\n",
    f"{PLACE}/memory.max": f"{64 << 20}\n",
    f"{PLACE}/memory.swap.max": "0\n",
    f"{PLACE}/pids.max": "64\n",
    f"{PLACE}/io.weight": "default 150\n8:0 100\n",
}
HEADING = "Filename Type Size Used Priority\n"
SWAP = f"{HEADING}/dev/sda2 partition 1 0 -2\n"
BFQ = {"block/sda/queue/scheduler": "none mq-deadline [bfq]\n"}
NO_BFQ = {"block/sda/queue/scheduler": "[none] mq-deadline bfq\n"}


class Machine:
    """The kernel's files as a test wants them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def look(
        self,
        cgroups: Mapping[str, str],
        files: Mapping[str, str],
        *,
        user: bool = False,
        swaps: str = HEADING,
        disks: Mapping[str, str] = NO_BFQ,
    ) -> Enforcement:
        files = {f"cgroup/{name}": text for name, text in files.items()}
        for name, text in {**files, **disks, "proc/swaps": swaps}.items():
            path = self._folder / name.replace("//", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="ascii")
        return examine(
            UNIT,
            cgroups,
            user=user,
            root=self._folder / "cgroup",
            proc=self._folder / "proc",
            sys_block=self._folder / "block",
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def without(files: Mapping[str, str], *names: str) -> dict[str, str]:
    return {path: text for path, text in files.items() if path.rpartition("/")[2] not in names}


def test_all_holds_on_v2(machine: Machine) -> None:
    found = machine.look(V2_CGROUPS, V2_FILES, disks=BFQ, swaps=SWAP)
    assert found == Enforcement(tuple(Limit), {}, "cgroup v2, system manager")
    assert found.label == "cpu,memory,swap,tasks"


def test_v1_without_swap_misses_nothing_of_the_limits(machine: Machine) -> None:
    found = machine.look(V1_CGROUPS, V1_FILES, disks=BFQ)
    held = (Limit.CPU, Limit.MEMORY, Limit.TASKS, Limit.CPU_WEIGHT, Limit.IO_WEIGHT)
    assert found == Enforcement(held, {}, "cgroup v1, system manager")


def test_swap_that_v1_cannot_forbid(machine: Machine) -> None:
    found = machine.look(V1_CGROUPS, V1_FILES, disks=BFQ, swaps=SWAP)
    assert Limit.SWAP not in found.holds
    assert list(found.missing) == [Limit.SWAP]
    assert "swapoff" in found.missing[Limit.SWAP]


def test_a_user_on_v1_has_no_limits_whatever_its_slice_has(machine: Machine) -> None:
    found = machine.look(V1_USER, V1_FILES, user=True, disks=BFQ)
    assert found.holds == ()
    assert found.label == ""
    assert found.place == "cgroup v1, user manager"
    assert set(found.missing) == set(Limit) - {Limit.SWAP}
    assert all("without --user" in why for why in found.missing.values())


def test_a_user_without_delegation_on_v2(machine: Machine) -> None:
    files = without(V2_FILES, "cpu.max", "cpu.weight", "io.weight", "io.bfq.weight")
    files[f"{PLACE}/cgroup.controllers"] = "memory pids\n"
    found = machine.look(V2_CGROUPS, files, user=True, disks=BFQ)
    assert found.label == "memory,swap,tasks"
    assert set(found.missing) == {Limit.CPU, Limit.CPU_WEIGHT, Limit.IO_WEIGHT}
    for why in found.missing.values():
        assert "systemctl edit user@.service" in why
        assert "Delegate=cpu cpuset io memory pids" in why


@pytest.mark.parametrize("user", [True, False])
def test_a_kernel_without_cpu_quotas(machine: Machine, user: bool) -> None:
    """Delegation would not help."""
    found = machine.look(V2_CGROUPS, without(V2_FILES, "cpu.max"), user=user, disks=BFQ)
    assert list(found.missing) == [Limit.CPU]
    assert "kernel or container" in found.missing[Limit.CPU]


def test_a_value_that_is_not_the_one_set_does_not_count(machine: Machine) -> None:
    files = V2_FILES | {
        f"{PLACE}/cpu.max": "max 100000\n",
        f"{PLACE}/memory.max": "max\n",
        f"{PLACE}/memory.swap.max": "max\n",
        f"{PLACE}/pids.max": "512\n",
        f"{PLACE}/cpu.weight": "100\n",
        f"{PLACE}/io.weight": "default 100\n",
    }
    found = machine.look(V2_CGROUPS, files, disks=BFQ, swaps=SWAP)
    assert found.holds == ()
    assert set(found.missing) == set(Limit)


def test_an_io_weight_needs_a_disk_that_heeds_it(machine: Machine) -> None:
    assert Limit.IO_WEIGHT in machine.look(V2_CGROUPS, V2_FILES, disks=BFQ).holds
    found = machine.look(V2_CGROUPS, V2_FILES, disks=NO_BFQ)
    assert "bfq" in found.missing[Limit.IO_WEIGHT]
    by_cost = V2_FILES | {"io.cost.qos": "8:0 enable=1 ctrl=auto\n"}
    assert Limit.IO_WEIGHT in machine.look(V2_CGROUPS, by_cost, disks=NO_BFQ).holds


def test_an_untouched_weight_of_an_old_kernel_is_none(machine: Machine) -> None:
    files = without(V1_FILES, "blkio.bfq.weight")
    untouched = files | {f"blkio{PLACE}/blkio.weight": "500\n"}
    assert Limit.IO_WEIGHT in machine.look(V1_CGROUPS, untouched, disks=BFQ).missing
    heard = files | {f"blkio{PLACE}/blkio.weight": "750\n"}
    assert Limit.IO_WEIGHT in machine.look(V1_CGROUPS, heard, disks=BFQ).holds


def test_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Enforcement(
        (Limit.CPU, Limit.TASKS, Limit.CPU_WEIGHT),
        {Limit.MEMORY: "do this", Limit.SWAP: "do this", Limit.IO_WEIGHT: "do that"},
        "cgroup v2, user manager",
    ).log()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "INFO",
            "limits that the kernel enforces here: CPU, tasks (cgroup v2, user manager);"
            " CPU weight",
        ),
        ("WARNING", "NOT enforced here: memory, swap: do this"),
        ("INFO", "NOT enforced here: I/O weight: do that"),
    ]


def test_the_log_where_nothing_holds(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Enforcement((), {Limit.CPU: "do this"}, "cgroup v1, user manager").log()
    assert "enforces here: none (cgroup v1, user manager)" in caplog.text


# with a launcher that does as the test wants


class FakeUnit:
    def __init__(self, name: str) -> None:
        self.name = name
        self.state = UnitState()
        self.reaped = False

    async def reap(self) -> None:
        self.reaped = True


class FakeLauncher:
    def __init__(self) -> None:
        self.error: Exception | None = None
        self.launches: list[Launch] = []
        self.units: list[FakeUnit] = []
        self.pid: object = 0
        self.others: list[tuple[str, str]] = []
        self.stopped: list[str] = []
        self.bus = self

    async def start(self, launch: Launch) -> FakeUnit:
        if self.error:
            raise self.error
        self.launches.append(launch)
        self.units.append(FakeUnit(launch.unit))
        return self.units[-1]

    async def get(self, _path: str, interface: str, name: str) -> object:
        assert (interface, name) == ("Service", "MainPID")
        return self.pid

    async def call(self, member: str, _signature: str, body: list[list[str]]) -> list[object]:
        assert member == "ListUnitsByPatterns"
        assert body == [[], ["ffmpeg-limits-check-*.service"]]
        return [[[name, "", "loaded", "active", sub] for name, sub in self.others]]

    async def stop_and_reap(self, name: str) -> None:
        self.stopped.append(name)


@pytest.fixture
def launcher() -> FakeLauncher:
    return FakeLauncher()


async def look(launcher: FakeLauncher) -> Enforcement | None:
    return await check(cast("Launcher", launcher), user=False)


@pytest.mark.parametrize("error", [SystemdError("refused"), BusGone("gone"), OSError("denied")])
async def test_an_error_is_a_warning(
    launcher: FakeLauncher, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    launcher.error = error
    assert await look(launcher) is None
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == f"cannot tell which limits hold: {error}"
    assert not record.exc_info


async def test_a_defect_is_a_warning_that_says_where(
    launcher: FakeLauncher, caplog: pytest.LogCaptureFixture
) -> None:
    launcher.error = RuntimeError("a defect")
    assert await look(launcher) is None
    assert caplog.records[0].exc_info


async def test_no_answer_is_a_warning(
    launcher: FakeLauncher, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enforcement, "_PATIENCE_SEC", 0.05)
    monkeypatch.setattr(launcher, "start", lambda _launch: asyncio.Event().wait())
    assert await look(launcher) is None
    assert "no answer in 0.05 s" in caplog.text


async def test_a_unit_that_ended_early_is_a_warning_and_reaped(
    launcher: FakeLauncher, caplog: pytest.LogCaptureFixture
) -> None:
    assert await look(launcher) is None
    assert "ended early" in caplog.text
    assert launcher.units[0].reaped


async def test_no_job_can_have_the_name_and_all_limits_are_set(launcher: FakeLauncher) -> None:
    await look(launcher)
    await look(launcher)
    first, second = launcher.launches
    assert first.unit != second.unit
    assert not first.unit.startswith("ffmpeg-job-")
    assert first.slice == "ffmpeg-default.slice"
    limits = first.limits
    assert None not in (limits.cpu_percent, limits.memory_bytes, limits.cpu_weight)
    assert limits.io_weight is not None


@pytest.mark.parametrize("error", [None, SystemdError("another agent was faster")])
async def test_what_a_killed_agent_left_goes_but_not_what_another_one_uses(
    launcher: FakeLauncher, monkeypatch: pytest.MonkeyPatch, error: SystemdError | None
) -> None:
    launcher.others = [("a.service", "exited"), ("b.service", "running"), ("c.service", "failed")]
    launcher.pid = 1
    monkeypatch.setattr(enforcement, "examine", lambda *_, user: Enforcement((), {}, str(user)))

    async def stop_and_reap(name: str) -> None:
        launcher.stopped.append(name)
        if error:
            raise error

    monkeypatch.setattr(launcher, "stop_and_reap", stop_and_reap)
    assert await look(launcher) == Enforcement((), {}, "False")
    assert launcher.stopped == ["a.service", "c.service"]
    assert launcher.units[0].reaped
