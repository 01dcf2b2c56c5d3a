"""One job through its units, with a launcher that plays what a test tells it to."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from worker import workspace
from worker.acceptance import StepRecords, boot_id
from worker.config import Settings
from worker.diskwatch import DiskWatch
from worker.errors import JobError, LedgerError, Reason, SystemdError
from worker.execution import Execution
from worker.files import publish as publishing
from worker.jobs.capabilities import TYPICAL
from worker.jobs.outcome import Intent
from worker.master.wire import Job, JobResult
from worker.node import disk
from worker.node.disk import DiskUsage
from worker.programs import Programs
from worker.site import Site
from worker.systemd.launch import Launch
from worker.systemd.launcher import Launcher
from worker.systemd.names import Step
from worker.systemd.sandbox import JobRoot
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

    @property
    def steps(self) -> list[str]:
        return [step_of(launch) for launch in self.launches]


@pytest.fixture
def theatre(monkeypatch: pytest.MonkeyPatch) -> Theatre:
    plenty = DiskUsage(total=2**50, used=0, available=2**50)
    monkeypatch.setattr(disk, "usage", lambda folder: plenty)
    theatre = Theatre()
    monkeypatch.setattr("worker.steps.adopt", lambda _launcher, launch: theatre.adopt(launch))
    return theatre


@pytest.fixture
def disk_watch() -> Iterator[DiskWatch]:
    watch = DiskWatch()
    yield watch
    watch.close()


@pytest.fixture
def make(theatre: Theatre, tmp_path: Path, disk_watch: DiskWatch) -> Callable[..., Execution]:
    def make(
        parameters: Any = None,
        programs: Programs | None = None,
        records: StepRecords | None = None,
        **more: Any,
    ) -> Execution:
        (tmp_path / "work").mkdir(exist_ok=True)
        more = {"input_dirs": (tmp_path,), "output_dirs": (tmp_path,), **more}
        settings = Settings(work_dir=tmp_path / "work", node_name="node", **more)
        root = JobRoot(tmp_path / "work/root", ("/usr",))
        job = Job(id="j", scenario="640x360p30-h264", parameters=parameters or {})
        return Execution(
            job,
            node_id="n",
            launcher=cast("Launcher", theatre),
            capabilities=TYPICAL,
            programs=programs or Programs("/usr/bin/ffmpeg", "/usr/bin/ffprobe"),
            settings=settings,
            site=Site(root, settings.policy),
            disk=disk_watch,
            records=records,
        )

    return make


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


async def test_the_way_of_a_job(
    make: Callable[..., Execution], theatre: Theatre, tmp_path: Path
) -> None:
    target = tmp_path / "out.mp4"
    execution = make({"output": str(target)})
    result = await finish(execution, theatre)

    assert (result.status, result.error) == ("completed", None)
    assert theatre.steps == ["input", "main", "probe"]
    assert target.read_text() == "7 bytes"
    assert result.metrics is not None
    figures = {
        "frames_encoded": 300, "output_file_bytes": 7, "input_file_bytes": len("test input"),
        "cpu_seconds": 2.0, "memory_peak_bytes": 57420 * 1024, "transcode_duration_sec": 2.0,
        "io_read_bytes": 4321, "io_write_bytes": 7000, "unit": "ffmpeg-job-j.service",
    }  # fmt: skip
    assert {key: result.metrics[key] for key in figures} == figures
    assert "verbose" not in (result.logs or "")


async def test_the_folder_is_held_until_the_report_has_arrived(
    make: Callable[..., Execution], theatre: Theatre, tmp_path: Path
) -> None:
    execution = make()
    await execution.run()
    assert list(workspace.abandoned(tmp_path / "work/jobs")) == []
    assert (tmp_path / "work/jobs/j").is_dir()
    execution.close()
    assert not (tmp_path / "work/jobs/j").exists()


@pytest.mark.parametrize("state", ["stopping", "running"])
async def test_a_unit_that_ends_with_the_machine(
    make: Callable[..., Execution], theatre: Theatre, state: str
) -> None:
    """systemd stops it before it tells the worker to stop."""
    theatre.state = state
    theatre.scenes["main"].state = STOPPED
    execution = make()
    error = (await finish(execution, theatre)).error or ""
    assert ("the machine was shut down" in error) is (state == "stopping")
    intent = Intent.POWEROFF if state == "stopping" else Intent.NONE
    assert execution.steps.intent is intent


async def test_a_job_that_is_to_blame_itself_fails_during_a_shutdown_as_well(
    make: Callable[..., Execution], theatre: Theatre
) -> None:
    theatre.state = "stopping"
    execution = make({"codec": "betamax"})
    assert ((await finish(execution, theatre)).error or "").startswith("user_error: ")
    assert execution.steps.intent is Intent.NONE


async def test_memory_is_never_above_its_limit(
    make: Callable[..., Execution], theatre: Theatre
) -> None:
    # ffmpeg's own figure counts shared libraries, which others may have paid for.
    result = await finish(make({"resource_limits": {"max_memory_mb": 24}}), theatre)
    assert result.metrics is not None
    assert result.metrics["memory_peak_bytes"] == 24 * 2**20


@pytest.mark.parametrize(
    ("step", "scene", "reason", "words", "steps"),
    [
        ("input", Scene(FAILED, log="[error] boom"), "runtime_error", "generating the input", 1),
        ("input", Scene(output=None), "runtime_error", "no test input", 1),
        ("main", Scene(FAILED, log="[error] a: Invalid data found when processing input"),
         "input_error", "Invalid data", 2),
        ("main", Scene(KILLED, usage=Usage(oom_kills=1, memory_limit_hits=1)),
         "resource_error", "memory limit of 2048 MB", 2),
        ("main", Scene(output=None), "runtime_error", "left no output", 2),
        ("main", Scene(SystemdError("lost")), "platform_error", "lost", 2),
        ("main", Scene(RuntimeError("bug")), "platform_error", "internal error", 2),
        ("main", Scene(UnitState(load_state="not-found")), "platform_error", "lost the unit", 2),
        ("probe", Scene(FAILED, stdout="", log="", output=None), "runtime_error", "ffprobe", 3),
        ("probe", Scene(stdout="{}", log="", output=None), "runtime_error", "video stream", 3),
        ("probe", Scene(KILLED, log="", output=None, usage=Usage(oom_kills=1)),
         "resource_error", "probing the output failed", 3),
        ("probe", Scene(SystemdError("refused"), log="", output=None),
         "platform_error", "refused", 3),
    ],
)  # fmt: skip
async def test_every_step_may_fail(
    make: Callable[..., Execution], theatre: Theatre, tmp_path: Path,
    step: str, scene: Scene, reason: str, words: str, steps: int,
) -> None:  # fmt: skip
    theatre.scenes[step] = scene
    target = tmp_path / "out.mp4"
    result = await finish(make({"output": str(target)}), theatre)

    assert result.status == "failed"
    assert result.error is not None
    assert result.error.startswith(f"{reason}: ")
    assert words in result.error
    assert len(theatre.steps) == steps
    assert not target.exists()


async def test_a_failed_step_tells_what_it_used(
    make: Callable[..., Execution], theatre: Theatre
) -> None:
    used = Usage(cpu_seconds=1.5, memory_peak_bytes=5, io_read_bytes=6, io_write_bytes=1)
    theatre.scenes["main"] = Scene(KILLED, log="", usage=used)
    result = await finish(make(), theatre)
    assert result.metrics is not None
    assert result.metrics["cpu_seconds"] == 1.5
    assert result.metrics["io_write_bytes"] == len("7 bytes"), "what a killed ffmpeg left"

    theatre.scenes["input"] = Scene(KILLED, log="", usage=used)
    result = await finish(make(), theatre)
    assert result.metrics is not None
    assert result.metrics["unit"] == "ffmpeg-job-j-input.service"
    assert result.metrics["cpu_seconds"] == 1.5
    assert "transcode_duration_sec" not in result.metrics


async def test_a_node_without_ffmpeg(make: Callable[..., Execution], theatre: Theatre) -> None:
    result = await finish(make(programs=Programs("", "/usr/bin/ffprobe")), theatre)
    assert result.error is not None
    assert result.error.startswith("platform_error: ffmpeg not found")
    assert theatre.steps == []


async def test_systemd_refuses(make: Callable[..., Execution], theatre: Theatre) -> None:
    theatre.refusal = SystemdError("StartTransientUnit: no", "org.x")
    result = await finish(make(), theatre)
    assert result.error == "platform_error: StartTransientUnit: no"


async def test_a_unit_that_cannot_be_reaped_is_named(
    make: Callable[..., Execution], theatre: Theatre, caplog: pytest.LogCaptureFixture
) -> None:
    for error in (SystemdError("stuck"), RuntimeError("bug")):
        theatre.reap_error = error
        result = await finish(make(), theatre)
        assert result.status == "completed"
    assert "ffmpeg-job-j.service is left over: stuck" in caplog.text
    assert "clean-up failed" in caplog.text


async def test_stopped_before_it_began(make: Callable[..., Execution], theatre: Theatre) -> None:
    execution = make()
    execution.stop(Intent.SHUTDOWN)
    result = await finish(execution, theatre)
    assert result.error is not None
    assert "the worker was stopped" in result.error
    assert theatre.steps == []


@pytest.mark.parametrize("step", ["input", "main", "probe"])
async def test_stopped_while_a_unit_runs(
    make: Callable[..., Execution], theatre: Theatre, step: str
) -> None:
    theatre.scenes[step].waits = True
    execution = make()
    running = asyncio.create_task(finish(execution, theatre))
    while step not in theatre.steps:
        theatre.started.clear()
        await theatre.started.wait()
    await asyncio.sleep(0)
    execution.stop(Intent.CANCELLED)
    execution.stop(Intent.SHUTDOWN)  # the first word counts

    result = await running
    assert result.error == "platform_error: the job was cancelled"
    assert theatre.steps[-1] == step
    assert len(theatre.stopped) == 1


@pytest.mark.parametrize("step", ["input", "main", "probe"])
async def test_stopped_while_systemd_starts_a_unit(
    make: Callable[..., Execution], theatre: Theatre, step: str
) -> None:
    execution = make()
    theatre.scenes[step].waits = True

    def stop(started: str) -> None:
        if started == step:
            execution.stop(Intent.CANCELLED)

    theatre.on_start = stop
    result = await finish(execution, theatre)
    assert result.error == "platform_error: the job was cancelled"
    assert theatre.steps[-1] == step
    assert len(theatre.stopped) == 1


async def test_a_stop_that_comes_too_late_changes_nothing(
    make: Callable[..., Execution], theatre: Theatre, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    execution = make({"output": str(tmp_path / "out.mp4")})
    publish = publishing.publish

    def stop_and_publish(*args: Any, **more: Any) -> int:
        execution.stop(Intent.CANCELLED)
        return publish(*args, **more)

    monkeypatch.setattr("worker.jobfiles.publish", stop_and_publish)
    assert (await finish(execution, theatre)).status == "completed"
    assert (tmp_path / "out.mp4").exists()


async def test_disk_space_that_cannot_be_seen(
    make: Callable[..., Execution], theatre: Theatre, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> DiskUsage:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(disk, "usage", fail)
    result = await asyncio.wait_for(make().run(), 10)
    assert result is not None
    assert result.error is not None
    assert result.error.startswith("platform_error: cannot see how much disk space")
    assert "Input/output error" in result.error


async def test_a_disk_limit_that_does_not_fit(
    make: Callable[..., Execution], theatre: Theatre, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "usage", lambda folder: DiskUsage(10 * 2**20, 0, 10 * 2**20))
    result = await asyncio.wait_for(make({"resource_limits": {"max_disk_mb": 11}}).run(), 10)
    assert result is not None
    assert result.error is not None
    assert result.error.startswith("resource_error: the job may need 11 MB of disk, but only 10 MB")


async def test_a_disk_that_is_full_when_ffmpeg_fails(
    make: Callable[..., Execution], theatre: Theatre, monkeypatch: pytest.MonkeyPatch
) -> None:
    theatre.scenes["main"] = Scene(FAILED, log="", output=None)
    full = DiskUsage(2**30, 2**30, 0)
    execution = make()
    theatre.on_start = lambda step: (
        monkeypatch.setattr(disk, "usage", lambda folder: full) if step == "main" else None
    )
    error = (await finish(execution, theatre)).error or ""
    assert error.startswith("resource_error: no space is left in ")


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(28, "No space left on device"), "resource_error"),
     (OSError(5, "Input/output error"), "platform_error"),
     (JobError(Reason.RESOURCE_ERROR, "full"), "resource_error")],
)  # fmt: skip
async def test_a_disk_that_fails_while_publishing(
    make: Callable[..., Execution], theatre: Theatre, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str,
) -> None:  # fmt: skip
    def fail(*args: Any, **more: Any) -> int:
        raise error

    monkeypatch.setattr("worker.jobfiles.publish", fail)
    result = await finish(make({"output": str(tmp_path / "out.mp4")}), theatre)
    assert result.error is not None
    assert result.error.startswith(f"{reason}: ")


@pytest.mark.parametrize("persist", [False, True])
async def test_what_is_kept(
    make: Callable[..., Execution], theatre: Theatre, tmp_path: Path, persist: bool
) -> None:
    await finish(make(persist_inputs=persist, persist_outputs=persist), theatre)
    kept = {path.name for path in (tmp_path / "work").iterdir() if path.is_file()}
    assert kept == ({"input_j.mp4", "job_j_output.mp4"} if persist else set())


async def test_no_secret_of_a_url_is_told(
    make: Callable[..., Execution], theatre: Theatre, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = "http://user:hunter2@h/x.mp4?token=hunter3"
    theatre.scenes["main"] = Scene(FAILED, log=f"[info] {url}\n[error] {url}: Connection refused\n")
    execution = make({"input": url})
    result = await finish(execution, theatre)
    assert result.error is not None
    assert result.error.startswith("network_error: ")
    [launch] = theatre.launches
    told = result.model_dump_json() + caplog.text + launch.description + str(launch.journal_fields)
    assert "hunter" not in told
    assert "level+quiet" in launch.argv, "standard error goes to the journal"


STREAM = {"output_mode": "rtmp", "stream_key": "hunter2", "duration": 10}


async def test_the_way_of_a_stream(
    make: Callable[..., Execution], theatre: Theatre, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(disk, "usage", lambda folder: DiskUsage(2**20, 2**20, 0))
    theatre.scenes["main"] = Scene(stdout="total_size=5000\n" + PROGRESS, log="")
    execution = make(
        STREAM | {"resource_limits": {"max_disk_mb": 1}}, master_url="https://[fd00::1]:8443/m"
    )
    assert execution.progress_text() == "streaming: starting"
    result = await finish(execution, theatre)

    assert (result.status, result.error) == ("completed", None)
    assert theatre.steps == ["main"], "nothing is generated, nothing is probed"
    [launch] = theatre.launches
    assert launch.argv[-1] == "rtmp://[fd00::1]:1935/live"
    assert theatre.secrets == ["rtmp_app=live\nrtmp_playpath=hunter2\n"]
    assert launch.sandbox is not None
    assert launch.sandbox.network
    assert launch.limits.file_bytes == 2048 * 2**20, "its log is none of the job's disk limit"
    assert result.metrics is not None
    assert result.metrics["output_size_bytes"] == 5000
    assert result.metrics["frames"] == 300
    assert "input_file_bytes" not in result.metrics
    assert execution.progress_text() == "streaming: frame 300, 150 fps, speed 5.00x, 100 %"
    assert [path.name for path in (tmp_path / "work").rglob("*") if path.is_file()] == []
    told = result.model_dump_json() + caplog.text + launch.description + str(launch.journal_fields)
    assert "streaming to rtmp://[fd00::1]:1935/live/***" in told
    assert "hunter2" not in told
    assert "level+quiet" in launch.argv


async def test_what_is_streamed_cannot_be_swapped(
    make: Callable[..., Execution], theatre: Theatre, tmp_path: Path
) -> None:
    folder = tmp_path / "everybodys"
    folder.mkdir()
    folder.chmod(0o777)
    source = folder / "in.mp4"
    source.write_text("video")
    await finish(make(STREAM | {"input": str(source), "rtmp_url": "rtmp://h/app"}), theatre)
    [launch] = theatre.launches
    assert launch.sandbox is not None
    given = tmp_path / "work/jobs/j/given.mp4"
    assert given in launch.sandbox.readable
    assert source not in launch.sandbox.readable
    assert f"file:{given}" in launch.argv


async def test_a_given_file_is_streamed(
    make: Callable[..., Execution], theatre: Theatre, tmp_path: Path
) -> None:
    source = tmp_path / "in.mp4"
    source.write_text("video")
    theatre.scenes["main"] = Scene(FAILED, log=f"[error] file:{source}: Input/output error\n")
    parameters = STREAM | {"input": str(source), "rtmp_url": "rtmp://h/app"}
    result = await finish(make(parameters), theatre)
    assert theatre.launches[0].argv[-1] == "rtmp://h/app"
    assert theatre.secrets == ["rtmp_app=app\nrtmp_playpath=hunter2\n"]
    assert result.error is not None
    assert result.error.startswith("runtime_error: "), "it is not the network's fault"
    assert result.metrics is not None
    assert result.metrics["input_file_bytes"] == 5


@pytest.mark.parametrize(
    ("scene", "reason", "words"),
    [
        (Scene(stdout=PROGRESS.replace("10000000", "7900000"), log=""),
         "runtime_error", "7.90 s of the 10.00 s"),
        (Scene(stdout="", log=""), "runtime_error", "no frame was sent"),
        (Scene(FAILED, stdout="", log="[error] [rtmp] Server error: hunter2 is taken"),
         "network_error", "*** is taken"),
        (Scene(log="[error] Error writing trailer of rtmp://master:1935/live/hunter2: Broken pipe"),
         "network_error", "live/***: Broken pipe"),
        (Scene(replace(KILLED, result="timeout", exec_main_exit_usec=4_000_000_000), log=""),
         "timeout", "time limit"),
    ],
)  # fmt: skip
async def test_a_stream_that_fails(
    make: Callable[..., Execution], theatre: Theatre, caplog: pytest.LogCaptureFixture,
    scene: Scene, reason: str, words: str,
) -> None:  # fmt: skip
    theatre.scenes["main"] = scene
    result = await finish(make(STREAM, master_url="http://master:8080"), theatre)
    assert result.status == "failed"
    assert result.error is not None
    assert result.error.startswith(f"{reason}: ")
    assert words in result.error
    assert "hunter2" not in result.model_dump_json() + caplog.text


async def test_a_stream_without_a_master_needs_a_url(
    make: Callable[..., Execution], theatre: Theatre
) -> None:
    result = await asyncio.wait_for(make(STREAM).run(), 10)
    assert result is not None
    assert result.error is not None
    assert result.error.startswith("user_error: parameters.rtmp_url: must be given")
    assert theatre.steps == []


async def test_progress_is_told_and_logged(
    make: Callable[..., Execution], theatre: Theatre, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.following.SAMPLE_SECONDS", 0.01)
    told: list[str] = []
    execution = make()
    seen = asyncio.Event()

    def show(shown: Execution) -> None:
        told.append(shown.progress_text())
        seen.set()

    execution._on_progress = show
    theatre.scenes["main"] = Scene(waits=True, stdout=PROGRESS.replace("end", "continue"))
    assert execution.progress_text() == "generating the input: starting"
    running = asyncio.create_task(execution.run())
    await asyncio.wait_for(seen.wait(), 10)
    execution.stop(Intent.CANCELLED)
    await running
    assert told[0] == "transcoding: frame 300, 150 fps, speed 5.00x, 100 %"
    execution.close()


class Notes:
    """What outlives an agent; ``die_at`` names the step at whose note it dies."""

    def __init__(self) -> None:
        self.steps: dict[str, dict[str, Any]] = {}
        self.die_at = ""
        self.full = False

    def recorded(self, step: Step) -> Mapping[str, Any] | None:
        return self.steps.get(step.value)

    async def starting(self, step: Step, unit: str, facts: Mapping[str, Any]) -> None:
        if self.full:
            raise LedgerError("the ledger is full")
        self.steps[step.value] = {"boot_id": boot_id(), **facts}
        if step.value == self.die_at:
            raise Died


class Died(BaseException):
    """The agent was killed: nothing of it runs any more."""


async def die(execution: Execution) -> None:
    """Run up to the death; the lock of the folder goes with the process."""
    with pytest.raises(Died):
        await execution.run()
    assert execution._workspace is not None
    execution._workspace.let_go()


@pytest.mark.parametrize("step", ["input", "main", "probe"])
async def test_a_job_that_was_left_is_taken_up_where_it_is(
    make: Callable[..., Execution], theatre: Theatre, tmp_path: Path, step: str
) -> None:
    notes, target = Notes(), tmp_path / "out.mp4"
    theatre.scenes[step].waits = True
    first = make({"output": str(target)}, records=notes)
    running = asyncio.create_task(first.run())
    while step not in theatre.steps:
        theatre.started.clear()
        await theatre.started.wait()
    first.leave()
    assert await asyncio.wait_for(running, 10) is None
    assert f"ffmpeg-job-j{BACKSTAGE.get(step, '.service')}" in theatre.loaded
    assert theatre.stopped == []

    theatre.scenes[step].waits = False
    for unit in theatre.units.values():
        unit._ended.set()
    result = await finish(make({"output": str(target)}, records=notes), theatre)
    assert (result.status, result.error) == ("completed", None)
    assert target.read_text() == "7 bytes"
    for once in ("input", "main"):
        assert theatre.steps.count(once) == 1
    assert result.metrics["input_generation_duration_sec"] == 2.0
    assert result.metrics["input_file_bytes"] == len("test input")


async def test_what_was_never_started_is_started_once(
    make: Callable[..., Execution], theatre: Theatre
) -> None:
    notes = Notes()
    notes.die_at = "main"
    await die(make(records=notes))
    assert theatre.steps == ["input"]
    notes.die_at = ""
    result = await finish(make(records=notes), theatre)
    assert result.status == "completed"
    assert theatre.steps == ["input", "main", "probe"]


async def test_what_is_gone_is_never_started_again(
    make: Callable[..., Execution], theatre: Theatre
) -> None:
    notes = Notes()
    theatre.on_start = _die_at("main")
    await die(make(records=notes))
    theatre.on_start = lambda step: None
    theatre.loaded.clear()
    result = await finish(make(records=notes), theatre)
    assert theatre.steps == ["input", "main"]
    assert result.error is not None
    assert result.error.startswith("platform_error: ffmpeg-job-j.service was started before")


async def test_after_a_reboot_nothing_is_started_again(
    make: Callable[..., Execution], theatre: Theatre
) -> None:
    notes = Notes()
    notes.die_at = "main"
    await die(make(records=notes))
    notes.steps["main"]["boot_id"] = "another"
    result = await finish(make(records=notes), theatre)
    assert theatre.steps == ["input"]
    assert result.error is not None
    assert "the machine was restarted" in result.error


async def test_what_is_published_is_not_published_again(
    make: Callable[..., Execution],
    theatre: Theatre,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notes, target = Notes(), tmp_path / "out.mp4"
    publish = publishing.publish

    def die_after(staged: Path, target: Path, **more: Any) -> int:
        publish(staged, target, **more)
        raise Died

    monkeypatch.setattr("worker.jobfiles.publish", die_after)
    await die(make({"output": str(target)}, records=notes))
    monkeypatch.setattr("worker.jobfiles.publish", publish)
    result = await finish(make({"output": str(target)}, records=notes), theatre)
    assert (result.status, result.error) == ("completed", None)
    assert target.read_text() == "7 bytes"
    assert result.metrics["output_file_bytes"] == 7
    assert theatre.steps == ["input", "main", "probe", "probe"]
    assert theatre.launches[-1].argv[-1].endswith(str(target))


async def test_a_unit_is_judged_by_the_limits_it_was_started_with(
    make: Callable[..., Execution], theatre: Theatre
) -> None:
    notes = Notes()
    theatre.on_start = _die_at("main")
    theatre.scenes["main"] = Scene(replace(KILLED, result="oom-kill"), output=None)
    await die(make({"resource_limits": {"max_memory_mb": 64}}, records=notes))
    theatre.on_start = lambda step: None
    result = await finish(make({"resource_limits": {"max_memory_mb": 999}}, records=notes), theatre)
    assert result.error is not None
    assert "memory limit of 64 MB exceeded" in result.error


async def test_nothing_starts_that_cannot_be_put_on_record(
    make: Callable[..., Execution], theatre: Theatre
) -> None:
    notes = Notes()
    notes.full = True
    result = await finish(make(records=notes), theatre)
    assert result.error == "platform_error: the ledger is full"
    assert theatre.launches == []


def _die_at(step: str) -> Callable[[str], None]:
    def look(started: str) -> None:
        if started == step:
            raise Died

    return look
