"""A private dbus-daemon at a fixed address, and a systemd stand-in on it."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from dbusmock.testcase import BusType, SpawnedMock

from tests.bus.launching import ONE, connected
from worker.systemd.launch import Launch, UnitLimits
from worker.systemd.launcher import Launcher
from worker.systemd.unit import Unit

TEMPLATE = Path(__file__).with_name("systemd_template.py")
CONTROL = "ffmpeg_worker.tests.Systemd"
_CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <keep_umask/>
  <listen>unix:path={socket}</listen>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
</busconfig>
"""


class Systemd:
    """The bus and the stand-in: each can go and come back, as after a restart."""

    def __init__(self, folder: Path) -> None:
        self._config = folder / "bus.conf"
        self._socket = folder / "bus"
        self._config.write_text(_CONFIG.format(socket=self._socket))
        self.address = f"unix:path={self._socket}"
        self._daemon: subprocess.Popen[bytes] | None = None
        self._mock: Any = None

    def start_bus(self) -> None:
        self._socket.unlink(missing_ok=True)
        command = ["dbus-daemon", f"--config-file={self._config}", "--print-address", "--nopidfile"]
        self._daemon = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self._daemon.stdout is not None
        assert self._daemon.stdout.readline()  # it listens
        self._daemon.stdout.close()

    def start_systemd(self, **parameters: object) -> None:
        self._mock = SpawnedMock.spawn_with_template(
            str(TEMPLATE), parameters, BusType.SYSTEM, subprocess.DEVNULL, subprocess.DEVNULL
        )

    def start(self) -> None:
        self.start_bus()
        self.start_systemd()

    def stop_bus(self) -> None:
        """The bus dies, and with it the stand-in: it knows no unit when started again."""
        if self._daemon is not None:
            self._daemon.kill()
            self._daemon.wait()
            self._daemon = None
        self.stop_systemd()

    def stop_systemd(self) -> None:
        if self._mock is not None:
            self._mock.process.kill()
            self._mock.process.wait()
            self._mock = None

    def __getattr__(self, member: str) -> Any:
        """A method of the stand-in's control interface."""
        proxy = self._mock.obj

        def call(*args: object) -> Any:
            return proxy.get_dbus_method(member, CONTROL)(*args)

        return call

    def manager(self, member: str, *args: object) -> Any:
        """A call of the manager from another connection."""
        return self._mock.obj.get_dbus_method(member, "org.freedesktop.systemd1.Manager")(*args)


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    systemd = Systemd(tmp_path)
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", systemd.address)
    try:
        systemd.start()
        yield systemd
    finally:
        systemd.stop_bus()


@pytest.fixture
async def launcher(systemd: Systemd) -> AsyncIterator[Launcher]:
    async with connected(reconnect_timeout=10) as launcher:
        yield launcher


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    return Launch(
        unit=ONE,
        description="a job",
        argv=("/usr/bin/true",),
        slice="ffmpeg-default.slice",
        limits=UnitLimits(cpu_weight=100),
        stdout=tmp_path / "main.out",
        stop_timeout_sec=0.1,
    )


@pytest.fixture
async def unit(launcher: Launcher, launch: Launch) -> Unit:
    """One that runs."""
    return await launcher.start(launch)
