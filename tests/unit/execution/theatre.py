"""A launcher that plays what a test tells it to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from worker.execution import Execution
from worker.master.wire import JobResult
from worker.systemd.launch import Launch
from worker.systemd.state import UnitState
from worker.systemd.usage import Usage

DONE = UnitState(
    load_state="loaded",
    active_state="active",
    sub_state="exited",
    result="success",
    exec_main_code=1,
    exec_main_start_usec=1_000_000,
    exec_main_exit_usec=3_000_000,
)
FAILED = replace(
    DONE, active_state="failed", sub_state="failed", result="exit-code", exec_main_status=1
)
KILLED = replace(FAILED, result="signal", exec_main_code=2, exec_main_status=9)
STOPPED = replace(FAILED, exec_main_status=255)
LOG = """\
[info] Input #0, mov,mp4,m4a,3gp,3g2,mj2, from 'file:/in.mp4':
[info]   Duration: 00:00:10.00, start: 0.000000, bitrate: 666 kb/s
[info]   Stream #0:0: Video: h264, yuv420p
[info]   Stream #0:0 -> #0:0 (h264 (native) -> h264 (libx264))
[info] bench: utime=1.500s stime=0.500s rtime=0.061s
[info] bench: maxrss=57420kB
[AVIOContext @ 0x55] [verbose] Statistics: 4321 bytes read, 0 seeks
[AVIOContext @ 0x56] [verbose] Statistics: 7000 bytes written, 0 seeks
"""
PROGRESS = "frame=300\nfps=150.0\nout_time_us=10000000\nspeed=5.0x\nprogress=end\n"
ANSWER = {
    "streams": [{"codec_type": "video", "codec_name": "h264", "width": 640, "height": 360,
                 "avg_frame_rate": "30/1", "nb_frames": "300"}],
    "frames": [{"media_type": "video"}],
    "format": {"format_name": "mp4", "duration": "10.0", "size": "7", "bit_rate": "800"},
}  # fmt: skip
BACKSTAGE = {"input": "-input.service", "probe": "-probe.service"}


def step_of(launch: Launch) -> str:
    found = [step for step, end in BACKSTAGE.items() if launch.unit.endswith(end)]
    return found[0] if found else "main"


class Scene:
    """What the unit of one step does: the files it leaves, and how it ends."""

    def __init__(
        self,
        state: UnitState | Exception = DONE,
        *,
        stdout: str = PROGRESS,
        log: str = LOG,
        output: str | None = "7 bytes",
        waits: bool = False,
        usage: Usage | None = None,
    ) -> None:
        self.state, self.stdout, self.log, self.output = state, stdout, log, output
        self.waits, self.usage = waits, usage or Usage()

    def play(self, launch: Launch) -> None:
        with launch.stdout.open("a") as file:  # as systemd does
            file.write(self.stdout)
        report = launch.environment["FFREPORT"].removeprefix("file=").removesuffix(":level=40")
        Path(report).write_text(self.log)
        if self.output is not None and launch.argv[-1].startswith("file:"):
            Path(launch.argv[-1].removeprefix("file:")).write_text(self.output)


class FakeUnit:
    def __init__(self, theatre: Theatre, launch: Launch, scene: Scene) -> None:
        self.launch, self.name, self.started = launch, launch.unit, True
        self.state = replace(DONE, sub_state="running", main_pid=7, control_group="/x")
        self._theatre, self._scene = theatre, scene
        self._ended = asyncio.Event()
        if not scene.waits:
            self._ended.set()

    async def finished(self) -> UnitState:
        await self._ended.wait()
        if isinstance(self._scene.state, Exception):
            raise self._scene.state
        self.state = self._scene.state
        return self.state

    def sample(self) -> Usage:
        return Usage()

    async def usage(self) -> Usage:
        return self._scene.usage

    async def stop(self) -> None:
        self._theatre.stopped.append(self.name)
        self._scene.state = STOPPED
        self._ended.set()

    async def reap(self) -> None:
        await asyncio.sleep(0)
        self._theatre.loaded.discard(self.name)
        if self._theatre.reap_error:
            raise self._theatre.reap_error


class Theatre:
    """A launcher whose units do what ``scenes`` has for their step."""

    def __init__(self) -> None:
        self.scenes: dict[str, Scene] = {
            "input": Scene(output="test input"),
            "main": Scene(),
            "probe": Scene(stdout=json.dumps(ANSWER), log="", output=None),
        }
        self.launches: list[Launch] = []
        self.secrets: list[str] = []
        self.units: dict[str, FakeUnit] = {}
        self.adopted: list[str] = []
        self.loaded: set[str] = set()
        self.stopped: list[str] = []
        self.started = asyncio.Event()
        self.on_start: Callable[[str], None] = lambda step: None
        self.refusal: Exception | None = None
        self.reap_error: Exception | None = None
        self.tracker = SimpleNamespace(unfinished=1)
        self.bus = self
        self.user = False
        self.state = "running"

    async def get(self, *_property: str) -> str:
        """Of the manager's properties, SystemState is asked for."""
        return self.state

    async def start(self, launch: Launch) -> FakeUnit:
        await asyncio.sleep(0)
        if self.refusal:
            raise self.refusal
        scene = self.scenes[step_of(launch)]
        if "-fpre" in launch.argv:
            self.secrets.append(Path(launch.argv[launch.argv.index("-fpre") + 1]).read_text())
        self.launches.append(launch)
        self.loaded.add(launch.unit)
        scene.play(launch)
        unit = self.units[launch.unit] = FakeUnit(self, launch, scene)
        self.on_start(step_of(launch))
        self.started.set()
        return unit

    async def adopt(self, launch: Launch) -> FakeUnit | None:
        """Takes the place of worker.systemd.adoption.adopt()."""
        self.adopted.append(step_of(launch))
        return self.units[launch.unit] if launch.unit in self.loaded else None

    async def stop_and_reap(self, unit: str) -> None:
        self.loaded.discard(unit)

    async def reached(self, step: str) -> None:
        """Return when its unit was started."""
        while step not in self.steps:
            self.started.clear()
            await self.started.wait()

    @property
    def steps(self) -> list[str]:
        return [step_of(launch) for launch in self.launches]


async def finish(execution: Execution, theatre: Theatre) -> JobResult:
    """Run it; whatever became of it, no unit is left, and the folder stays until close()."""
    result = await asyncio.wait_for(execution.run(), 10)
    assert result is not None
    await asyncio.wait_for(execution.release(), 10)
    assert theatre.loaded == set()
    folder = execution._settings.work_dir / "jobs/j"
    assert list(folder.glob("*")) == []
    execution.close()
    execution.close()
    assert not folder.exists()
    return result


Make = Callable[..., Execution]
"""A job of these parameters."""
