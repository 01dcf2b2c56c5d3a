"""Limits changed by an operator: when to read, what is told, and what a lost bus does to it."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from worker.errors import BusGone, SystemdError
from worker.systemd import overrides
from worker.systemd.launch import Launch, UnitLimits
from worker.systemd.launcher import Launcher
from worker.systemd.names import object_path
from worker.systemd.overrides import Overrides, described, transient_folder
from worker.systemd.state import UNSET, UnitState
from worker.systemd.unit import Unit

MIB = 1 << 20
NAME = "ffmpeg-job-one.service"
GROUP = f"/ffmpeg.slice/{NAME}"
RUNNING = UnitState(load_state="loaded", active_state="active", control_group=GROUP)


class Setting:
    """A unit with its limits as systemd tells them, and the folder of its drop-ins."""

    def __init__(self, base: Path) -> None:
        self.folder = base / f"{NAME}.d"
        self.cgroups = base / "cgroups"
        self.values: dict[str, object] = {
            "CPUQuotaPerSecUSec": 2_000_000,
            "MemoryMax": 500 * MIB,
            "CPUWeight": 100,
            "TasksMax": 512,
            "IOWeight": UNSET,
            "LoadState": "loaded",
        }
        self.error: SystemdError | None = None
        self.asked = 0
        launch = Launch(
            unit=NAME,
            description="",
            argv=("/bin/true",),
            slice="ffmpeg-default.slice",
            limits=UnitLimits(cpu_percent=200, memory_bytes=500 * MIB, cpu_weight=100),
            stdout=base / "out",
        )
        self.unit = SimpleNamespace(name=NAME, launch=launch, state=RUNNING)
        self.overrides = Overrides(
            cast("Launcher", SimpleNamespace(bus=self)),
            cast("Unit", self.unit),
            base,
            cgroups=self.cgroups,
        )

    async def get(self, path: str, interface: str, name: str) -> object:
        assert path == object_path(NAME)
        assert interface == ("Unit" if name == "LoadState" else "Service")
        self.asked += 1
        if self.error is not None:
            raise self.error
        if name not in self.values:
            raise SystemdError(f"no {name}")
        return self.values[name]

    def change(self, **values: object) -> None:
        self.values |= values
        self.folder.mkdir(exist_ok=True)
        stamp = time.time_ns() + self.asked  # as if time had passed
        os.utime(self.folder, ns=(stamp, stamp))


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overrides, "_SETTLED_SEC", 0.0)


def test_nothing_is_asked_while_nobody_changes_anything(setting: Setting) -> None:
    assert not setting.overrides.noticed()
    assert setting.asked == 0


@pytest.mark.usefixtures("settled")
async def test_a_change_is_noticed_until_it_is_read(setting: Setting) -> None:
    setting.change(CPUQuotaPerSecUSec=500_000)
    assert setting.overrides.noticed()
    assert setting.overrides.noticed()
    assert await setting.overrides.read() == {"cpu_percent": (200, 50)}
    assert not setting.overrides.noticed()
    setting.change(CPUQuotaPerSecUSec=505_000, MemoryMax=UNSET)
    assert setting.overrides.noticed()
    assert await setting.overrides.read() == {
        "cpu_percent": (200, 50.5),
        "memory_bytes": (500 * MIB, None),
    }
    setting.change(CPUQuotaPerSecUSec=2_000_000, MemoryMax=500 * MIB)
    assert await setting.overrides.read() == {}


async def test_a_change_is_read_again_when_it_has_settled(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one may have come at the same tick of the file system's clock."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    setting.change(CPUQuotaPerSecUSec=500_000)
    await setting.overrides.read()
    setting.values["CPUQuotaPerSecUSec"] = 400_000
    assert setting.overrides.noticed()
    now += 1
    assert await setting.overrides.read() == {"cpu_percent": (200, 40)}
    assert not setting.overrides.noticed()


async def test_drop_ins_that_are_removed_at_once(setting: Setting) -> None:
    """The folder is as if nothing had been, but not what was read meanwhile."""
    setting.change(CPUQuotaPerSecUSec=500_000)
    await setting.overrides.read()
    setting.folder.rmdir()
    setting.values["CPUQuotaPerSecUSec"] = 2_000_000
    assert setting.overrides.noticed()
    assert await setting.overrides.read() == {}


@pytest.mark.usefixtures("settled")
async def test_a_property_that_this_systemd_does_not_know(setting: Setting) -> None:
    setting.change(CPUWeight=5)
    del setting.values["IOWeight"]
    assert await setting.overrides.read() == {"cpu_weight": (100, 5)}


@pytest.mark.usefixtures("settled")
async def test_a_lost_bus_is_asked_again(setting: Setting) -> None:
    setting.change(CPUQuotaPerSecUSec=500_000)
    setting.error = BusGone("gone")
    assert await setting.overrides.read() == {}
    assert setting.overrides.noticed()
    setting.error = None
    assert await setting.overrides.read() == {"cpu_percent": (200, 50)}


@pytest.mark.usefixtures("settled")
async def test_a_unit_that_is_gone_keeps_what_was_read(setting: Setting) -> None:
    """systemd answers for a unit that is not there, too: it has no limits."""
    setting.change(CPUQuotaPerSecUSec=500_000)
    before = await setting.overrides.read()
    setting.values = dict.fromkeys(setting.values, UNSET) | {"LoadState": "not-found"}
    setting.folder.rmdir()
    assert setting.overrides.noticed()
    assert await setting.overrides.read() == before
    setting.unit.state = UnitState(load_state="not-found")
    asked = setting.asked
    assert await setting.overrides.read() == before
    assert setting.asked == asked


async def test_v1_refuses_to_take_memory_away(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told once, and is no limit of the job, not after its end either."""
    caplog.set_level(logging.WARNING)
    kernel = setting.cgroups / f"memory{GROUP}/memory.limit_in_bytes"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(f"{500 * MIB}\n")
    setting.change(MemoryMax=50 * MIB)
    for _ in range(2):
        assert await setting.overrides.read() == {}
    assert caplog.text.count("MemoryMax of 50 MB is not in force") == 1
    kernel.unlink()
    assert await setting.overrides.read() == {}
    kernel.write_text(f"{50 * MIB}\n")
    assert await setting.overrides.read() == {"memory_bytes": (500 * MIB, 50 * MIB)}


async def test_as_people_read_it(setting: Setting) -> None:
    setting.change(
        CPUQuotaPerSecUSec=UNSET, MemoryMax=300 * MIB, CPUWeight=77, TasksMax=40, IOWeight=33
    )
    assert described(await setting.overrides.read()) == (
        "CPUQuota 200% → none, MemoryMax 500 MB → 300 MB, CPUWeight 100 → 77, TasksMax 512 → 40, "
        "IOWeight none → 33"
    )
    assert described({}) == ""


def test_where_transient_units_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert transient_folder(user=False) == Path("/run/systemd/transient")
    assert transient_folder(user=True) == Path("/run/user/7/systemd/transient")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert transient_folder(user=True) == Path(f"/run/user/{os.getuid()}/systemd/transient")
