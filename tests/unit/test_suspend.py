"""Pauses: the drop-in, its arithmetic, and what an agent that died half way has left."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from worker.errors import NoSuchUnit, SystemdError
from worker.systemd import suspend
from worker.systemd.launcher import Launcher
from worker.systemd.names import object_path
from worker.systemd.state import UNSET, UnitState
from worker.systemd.suspend import Pause, Suspension
from worker.systemd.unit import Unit

SEC = 1_000_000
NAME = "ffmpeg-job-one.service"


def test_pauses_add_up() -> None:
    pause = Pause(limit=10 * SEC)
    assert (pause.effective, pause.total(5)) == (10 * SEC, 0)
    pause = pause.begun(100 * SEC)
    assert pause.begun(105 * SEC) == pause
    assert (pause.effective, pause.total(103 * SEC)) == (UNSET, 3 * SEC)
    pause = pause.ended(104 * SEC)
    assert pause.ended(110 * SEC) == pause
    assert (pause.effective, pause.total(200 * SEC)) == (14 * SEC, 4 * SEC)
    pause = pause.begun(200 * SEC).ended(201 * SEC)
    assert (pause.effective, pause.paused, pause.since) == (15 * SEC, 5 * SEC, 0)


def test_no_limit_stays_none() -> None:
    assert Pause(UNSET).begun(1).ended(2).effective == UNSET


@pytest.mark.parametrize(
    ("pause", "setting"),
    [
        (Pause(3 * SEC, 0, 7), "RuntimeMaxSec=infinity"),
        (Pause(3 * SEC, 2 * SEC, 0), "RuntimeMaxSec=5000000us"),
        (Pause(UNSET, 2 * SEC, 0), "RuntimeMaxSec=infinity"),
    ],
)
def test_the_drop_in(pause: Pause, setting: str) -> None:
    assert Pause.parse(pause.text()) == pause
    lines = [line for line in pause.text().splitlines() if not line.startswith("#")]
    assert lines == ["[Service]", setting]


def test_a_file_of_somebody_else() -> None:
    assert Pause.parse("[Service]\nRuntimeMaxSec=5\n") is None


class FakeLauncher:
    """Reads drop-ins at a reload, as systemd does, and counts."""

    def __init__(self, folder: Path, limit: int = 10 * SEC) -> None:
        self.folder = folder
        self.limits: dict[str, int] = {}
        self.default = limit
        self.signals: list[tuple[str, int]] = []
        self.reloads = 0
        self.reloading = asyncio.Event()
        self.reloading.set()
        self.missing = False

    async def read(self, path: str, interface: str, name: str) -> object:
        assert name == "RuntimeMaxUSec"
        await asyncio.sleep(0)
        return self.limits.get(path, self.default)

    async def repeat(self, member: str, signature: str, *body: object) -> list[object]:
        await asyncio.sleep(0)
        if member == "KillUnit":
            name, who, number = body
            assert who == "all"
            if self.missing:
                raise NoSuchUnit("gone")
            self.signals.append((str(name), cast("int", number)))
        else:
            assert member == "Reload"
            self.reloads += 1
            found = {
                object_path(file.parent.name.removesuffix(".d")): Pause.parse(file.read_text())
                for file in self.folder.glob("*.d/*.conf")
            }
            await self.reloading.wait()
            self.limits = {path: pause.effective for path, pause in found.items() if pause}
        return []


class Setting:
    """A launcher, a unit and a clock."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launcher = FakeLauncher(folder)
        self.now = 1000 * SEC
        monkeypatch.setattr(suspend, "_now", lambda: self.now)
        self.unit = self.make(NAME)
        self.suspension = self.agent()

    def make(self, name: str) -> Unit:
        return cast("Unit", SimpleNamespace(name=name, state=UnitState(active_state="active")))

    def agent(self) -> Suspension:
        """As an agent has it that was just started."""
        return Suspension(cast("Launcher", self.launcher), self.launcher.folder)

    @property
    def limit(self) -> int:
        return self.launcher.limits.get(object_path(NAME), self.launcher.default)

    @property
    def signals(self) -> list[int]:
        return [number for _, number in self.launcher.signals]

    @property
    def file(self) -> Path:
        return self.launcher.folder / f"{NAME}.d" / "60-ffmpeg-worker-pause.conf"


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    return Setting(tmp_path, monkeypatch)


async def test_pause_and_resume(setting: Setting) -> None:
    suspension, unit = setting.suspension, setting.unit
    assert (suspension.paused(unit), suspension.paused_seconds(unit)) == (False, 0)
    await suspension.pause(unit)
    assert setting.signals == [signal.SIGSTOP]
    assert setting.limit == UNSET
    setting.now += 4 * SEC
    assert (suspension.paused(unit), suspension.paused_seconds(unit)) == (True, 4)
    await suspension.resume(unit)
    assert setting.signals == [signal.SIGSTOP, signal.SIGCONT]
    assert setting.limit == 14 * SEC
    setting.now += 4 * SEC
    assert (suspension.paused(unit), suspension.paused_seconds(unit)) == (False, 4)
    assert setting.launcher.reloads == 2
    await suspension.pause(unit)
    setting.now += 1 * SEC
    await setting.agent().resume(unit)
    assert setting.limit == 15 * SEC


async def test_each_may_be_repeated(setting: Setting) -> None:
    suspension, unit = setting.suspension, setting.unit
    await suspension.resume(unit)
    assert setting.signals == []
    for step in (suspension.pause, suspension.resume):
        await step(unit)
        setting.now += 2 * SEC
        await step(unit)
    assert setting.limit == 12 * SEC
    assert setting.launcher.reloads == 2


@pytest.mark.parametrize("wanted", ["pause", "resume"])
@pytest.mark.parametrize("died", ["KillUnit", "Reload"])
@pytest.mark.parametrize("before", ["pause", "resume"])
async def test_an_agent_that_died_half_way(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, before: str, died: str, wanted: str
) -> None:
    """Whatever the step and wherever it ended, the next agent gets to what it wants."""
    if before == "resume":
        await setting.suspension.pause(setting.unit)
    setting.launcher.signals.clear()
    repeat = setting.launcher.repeat

    async def dying(member: str, signature: str, *body: object) -> list[object]:
        if member == died:
            raise RuntimeError
        return await repeat(member, signature, *body)

    with monkeypatch.context() as patch:
        patch.setattr(setting.launcher, "repeat", dying)
        with pytest.raises(RuntimeError):
            await getattr(setting.suspension, before)(setting.unit)
    agent = setting.agent()
    await getattr(agent, wanted)(setting.unit)
    assert setting.signals[-1] == (signal.SIGSTOP if wanted == "pause" else signal.SIGCONT)
    assert agent.paused(setting.unit) == (wanted == "pause")
    assert setting.limit == (UNSET if wanted == "pause" else 10 * SEC)


async def test_a_unit_without_a_limit_needs_no_reload(setting: Setting) -> None:
    setting.launcher.default = UNSET
    await setting.suspension.pause(setting.unit)
    setting.now += 3 * SEC
    await setting.suspension.resume(setting.unit)
    assert setting.suspension.paused_seconds(setting.unit) == 3
    assert setting.launcher.reloads == 0


async def test_concurrent_pauses_share_reloads(setting: Setting) -> None:
    setting.launcher.reloading.clear()
    units = [setting.make(f"ffmpeg-job-{i}.service") for i in range(10)]
    pausing = [asyncio.create_task(setting.suspension.pause(unit)) for unit in units]
    while setting.launcher.reloads < 1 or len(setting.launcher.signals) < 10:
        await asyncio.sleep(0)
    late = asyncio.create_task(setting.suspension.pause(setting.unit))
    pausing[3].cancel()  # takes nobody else's reload away
    while len(setting.launcher.signals) < 11:
        await asyncio.sleep(0)
    assert not any(task.done() for task in (late, *pausing[:3]))
    setting.launcher.reloading.set()
    await asyncio.gather(late, *pausing, return_exceptions=True)
    assert setting.launcher.reloads == 2
    assert len(setting.launcher.limits) == 11
    assert set(setting.launcher.limits.values()) == {UNSET}


async def test_a_reload_that_fails_is_told_to_all_and_made_again(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeat = setting.launcher.repeat

    async def refused(member: str, signature: str, *body: object) -> list[object]:
        if member == "Reload":
            raise SystemdError("refused")
        return await repeat(member, signature, *body)

    with monkeypatch.context() as patch:
        patch.setattr(setting.launcher, "repeat", refused)
        with pytest.raises(SystemdError, match="refused"):
            await setting.suspension.pause(setting.unit)
    await setting.suspension.pause(setting.unit)
    assert setting.limit == UNSET


async def test_the_end_of_the_unit_ends_the_pause(setting: Setting) -> None:
    await setting.suspension.pause(setting.unit)
    setting.unit.__dict__["state"] = UnitState(
        active_state="failed", exec_main_exit_usec=setting.now + 2 * SEC
    )
    setting.now += 9 * SEC
    assert setting.suspension.paused_seconds(setting.unit) == 2
    await setting.suspension.pause(setting.unit)
    await setting.suspension.resume(setting.unit)
    assert setting.signals == [signal.SIGSTOP]


async def test_a_unit_that_went_away_is_no_error(setting: Setting) -> None:
    setting.launcher.missing = True
    await setting.suspension.pause(setting.unit)
    await setting.suspension.resume(setting.unit)


async def test_everybody_may_read_the_drop_in_and_nothing_else_is_left(setting: Setting) -> None:
    mask = os.umask(0o077)
    try:
        await setting.suspension.pause(setting.unit)
    finally:
        os.umask(mask)
    assert [path.name for path in setting.file.parent.iterdir()] == [setting.file.name]
    assert setting.file.stat().st_mode & 0o777 == 0o644
    assert setting.file.parent.stat().st_mode & 0o777 == 0o755


async def test_forget_and_sweep(setting: Setting) -> None:
    two = setting.make("ffmpeg-job-two.service")
    await setting.suspension.forget(two)
    for unit in (setting.unit, two):
        await setting.suspension.pause(unit)
    await setting.suspension.forget(two)
    assert list(setting.launcher.folder.iterdir()) == [setting.file.parent]
    setting.suspension.sweep({NAME})
    assert setting.file.exists()
    setting.suspension.sweep(set())
    assert list(setting.launcher.folder.iterdir()) == []


async def test_drop_ins_of_others_are_left_alone(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    await setting.suspension.pause(setting.unit)
    other = setting.file.with_name("50-other.conf")
    other.write_text("[Service]\nNice=3\n")
    await setting.suspension.forget(setting.unit)
    assert list(setting.file.parent.iterdir()) == [other]
    assert caplog.records == []


async def test_a_folder_that_cannot_be_written(tmp_path: Path, setting: Setting) -> None:
    agent = Suspension(cast("Launcher", setting.launcher), tmp_path / "missing")
    with pytest.raises(SystemdError, match=r"missing.*ReadWritePaths="):
        await agent.pause(setting.unit)
    assert setting.signals == []


def test_where_transient_units_are(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = cast("Launcher", None)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert Suspension(launcher)._folder == Path("/run/systemd/transient")
    assert Suspension(launcher, user=True)._folder == Path("/run/user/7/systemd/transient")
