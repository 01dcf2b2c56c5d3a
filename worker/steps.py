"""Runs the units of one job, one after the other, and judges each."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path

from worker import workspace
from worker.errors import JobError, Reason, SystemdError
from worker.jobs import ffmpeg
from worker.jobs.judge import judge
from worker.jobs.outcome import Intent, Outcome, stopped
from worker.jobs.progress import LogFacts, Progress, parse_progress, read_log
from worker.jobs.spec import JobSpec, Limits, Priority, StreamOutput, UrlInput
from worker.jobs.streams import without_key
from worker.master.wire import Job
from worker.systemd.launch import Launch, UnitLimits
from worker.systemd.launcher import Launcher
from worker.systemd.names import Step, slice_name, unit_name
from worker.systemd.state import UnitState
from worker.systemd.unit import Unit
from worker.systemd.usage import Usage
from worker.workspace import Workspace

logger = logging.getLogger(__name__)

MIB = 1024 * 1024
SAMPLE_SECONDS = 1.0
SLOW_SAMPLE_SECONDS = 5.0
"""Between two looks at a job that has run for a minute. The counters only grow, so nothing is
missed; with a hundred jobs on a node each look counts."""
PROGRESS_BYTES = 2048
"""Enough for the last blocks of ffmpeg's progress."""
PROBE_TIMEOUT_SEC = 120
PROBE_OUTPUT_BYTES = 1024 * 1024
STREAM_FILES_MB = 2048
"""A stream leaves no output; its log and progress may grow to this, whatever max_disk_mb is."""
CPU_WEIGHT = {Priority.HIGH: 200, Priority.MEDIUM: 100, Priority.LOW: 50}


@dataclass(frozen=True, slots=True)
class Programs:
    """Absolute paths of what jobs run; empty where the node lacks it."""

    ffmpeg: str
    ffprobe: str

    @classmethod
    def find(cls) -> Programs:
        return cls(shutil.which("ffmpeg") or "", shutil.which("ffprobe") or "")

    def require(self) -> None:
        """Raise JobError unless both are there."""
        missing = [name for name in ("ffmpeg", "ffprobe") if not getattr(self, name)]
        if missing:
            raise JobError(
                Reason.PLATFORM_ERROR,
                f"{' and '.join(missing)} not found on this node (looked in PATH); "
                "install the ffmpeg package and restart the worker",
            )


@dataclass(frozen=True, slots=True)
class StepRun:
    """What one unit of the job did."""

    unit: str
    outcome: Outcome
    usage: Usage
    log: LogFacts
    log_text: str
    progress: Progress | None
    wall_seconds: float


class Steps:
    """The units of one job. ``on_output`` gets the end of the running one's standard output."""

    def __init__(self, job: Job, launcher: Launcher, on_output: Callable[[str], None]) -> None:
        self.intent = Intent.NONE
        """Why the job was told to stop."""
        self.start_seconds: list[float] = []
        """How long each start took, from asking systemd to its answer."""
        self._job = job
        self._launcher = launcher
        self._on_output = on_output
        self._unit: Unit | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def stop(self, intent: Intent) -> None:
        """End the unit that runs; none is started after this."""
        if self.intent is Intent.NONE:
            self.intent = intent
            if self._unit is not None:
                self._background(self._end(self._unit))

    async def clean_up(self) -> None:
        """Return when no unit of this job is loaded any more."""
        while self._tasks:
            for error in await asyncio.gather(*self._tasks, return_exceptions=True):
                if error is not None:
                    logger.error("job %s: clean-up failed", self._job.id, exc_info=error)

    async def generate(
        self, space: Workspace, spec: JobSpec, limits: Limits, command: tuple[str, ...]
    ) -> StepRun:
        """Make the job's test input."""
        launch = self._launch(Step.INPUT, space, spec, limits, command)
        return await self._run(launch, space.log(Step.INPUT), limits, "generating the input")

    async def transcode(
        self,
        space: Workspace,
        spec: JobSpec,
        command: tuple[str, ...],
        source: str,
        output: Path | str,
    ) -> StepRun:
        """The job proper, under its own limits. ``source`` and ``output`` are paths or URLs."""
        limits, is_stream = spec.limits, isinstance(spec.output, StreamOutput)
        if is_stream:
            limits = replace(limits, disk_mb=max(limits.disk_mb, STREAM_FILES_MB))
        launch = self._launch(Step.MAIN, space, spec, limits, command)
        return await self._run(
            launch,
            space.log(Step.MAIN),
            limits,
            source=source,
            output=str(output),
            is_url=isinstance(spec.source, UrlInput),
            is_stream=is_stream,
        )

    async def probe(
        self, space: Workspace, spec: JobSpec, limits: Limits, command: tuple[str, ...]
    ) -> str:
        """What ffprobe says of the output. Raises JobError if it could not be run."""
        limits = Limits(
            cpu_percent=limits.cpu_percent,
            memory_mb=limits.memory_mb,
            disk_mb=limits.disk_mb,
            timeout_sec=min(limits.timeout_sec, PROBE_TIMEOUT_SEC),
        )
        launch = self._launch(Step.PROBE, space, spec, limits, command)
        run = await self._run(
            launch, space.log(Step.PROBE), limits, "probing the output", "ffprobe"
        )
        text = workspace.read_tail(space.stdout(Step.PROBE), PROBE_OUTPUT_BYTES)
        # An exit status of 1 is ffprobe's verdict on the file, to be read from what it printed.
        if not run.outcome.completed and run.outcome.reason in (
            Reason.PLATFORM_ERROR, Reason.RESOURCE_ERROR, Reason.TIMEOUT,
        ):  # fmt: skip
            raise JobError(run.outcome.reason, run.outcome.message)
        return text

    def _launch(
        self,
        step: Step,
        space: Workspace,
        spec: JobSpec,
        limits: Limits,
        command: tuple[str, ...],
    ) -> Launch:
        what = {
            Step.INPUT: "test input of", Step.MAIN: "transcode", Step.PROBE: "check of",
        }[step]  # fmt: skip
        if step is Step.MAIN and isinstance(spec.output, StreamOutput):
            what = "stream of"
        return Launch(
            unit=unit_name(self._job.id, step),
            description=f"FFmpeg {what} job {spec.id} ({spec.scenario or 'no scenario'}, "
            f"{spec.queue}/{spec.priority})",
            argv=command,
            slice=slice_name(spec.queue),
            limits=UnitLimits(
                cpu_percent=limits.cpu_percent,
                memory_bytes=limits.memory_mb * MIB,
                runtime_sec=limits.timeout_sec,
                file_bytes=limits.disk_mb * MIB,
                cpu_weight=limits.cpu_weight or CPU_WEIGHT[spec.priority],
                devices=(limits.io,) if limits.io else (),
            ),
            stdout=space.stdout(step),
            environment=ffmpeg.report_environment(space.log(step)),
            working_directory=space.path,
            journal_fields={"JOB_ID": self._job.id, "SCENARIO": spec.scenario},
        )

    async def _run(
        self,
        launch: Launch,
        log_path: Path,
        limits: Limits,
        step: str = "",
        program: str = "ffmpeg",
        source: str | None = None,
        output: str | None = None,
        is_url: bool = False,
        is_stream: bool = False,
    ) -> StepRun:
        if self.intent is not Intent.NONE:
            raise JobError(Reason.PLATFORM_ERROR, stopped(self.intent).message)
        asked = time.monotonic()
        unit = await self._launcher.start(launch)
        self.start_seconds.append(time.monotonic() - asked)
        self._unit = unit
        try:
            self._announce(unit)
            if self.intent is not Intent.NONE:  # told to stop while systemd was starting it
                self._background(self._end(unit))
            state = await self._follow(unit, launch.stdout)
            usage = await unit.usage()
        finally:
            self._unit = None
            self._background(self._reap(unit))
        log_text = workspace.read_ends(log_path)
        if is_stream and output is not None:
            log_text = without_key(log_text, output)
        log = read_log(log_text)
        usage = usage.merged(
            # ffmpeg's own account of itself, the only one of a job that ends within a second.
            Usage(
                cpu_seconds=log.bench_cpu_seconds,
                # Counts shared libraries in full, though the kernel charges them to whoever used
                # them first, so it can be above the limit without any harm.
                memory_peak_bytes=_at_most(log.bench_maxrss_bytes, launch.limits.memory_bytes),
                io_read_bytes=log.bytes_read,
                io_write_bytes=log.bytes_written,
            )
        )
        outcome = judge(
            state, usage, self.intent, log, limits,
            step=step, program=program, source=source, output=output, is_url=is_url,
            is_stream=is_stream, executed=unit.started or bool(log_text),
        )  # fmt: skip
        wall = state.wall_seconds
        return StepRun(
            unit=unit.name,
            outcome=outcome,
            usage=usage,
            log=log,
            log_text=log_text,
            progress=parse_progress(workspace.read_tail(launch.stdout)),
            wall_seconds=time.monotonic() - asked if wall is None else wall,
        )

    def _announce(self, unit: Unit) -> None:
        """The facts that an operator checks a job's limits by."""
        state, limits = unit.state, unit.launch.limits
        logger.info(
            "job %s: %s: Process started with PID: %d, cgroup %s, nice=%d, CPUQuota=%s%%, "
            "MemoryMax=%s MB, RuntimeMaxSec=%s",
            self._job.id, unit.name, state.main_pid, state.control_group, unit.launch.nice,
            limits.cpu_percent, (limits.memory_bytes or 0) // MIB, limits.runtime_sec,
        )  # fmt: skip

    async def _follow(self, unit: Unit, stdout: Path) -> UnitState:
        """Wait for the unit's end; look at it now and then meanwhile."""
        ended = asyncio.create_task(unit.finished())
        begun = time.monotonic()
        try:
            while True:
                unit.sample()
                young = time.monotonic() - begun < 60
                wait = SAMPLE_SECONDS if young else SLOW_SAMPLE_SECONDS
                await asyncio.wait({ended}, timeout=wait)
                if ended.done():
                    return ended.result()
                self._on_output(workspace.read_tail(stdout, PROGRESS_BYTES))
        finally:
            ended.cancel()

    async def _end(self, unit: Unit) -> None:
        try:
            await unit.stop()
        except SystemdError as error:
            logger.error("job %s: %s", self._job.id, error)

    async def _reap(self, unit: Unit) -> None:
        try:
            await unit.reap()
        except SystemdError as error:
            logger.error("job %s: %s is left over: %s", self._job.id, unit.name, error)

    def _background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _at_most(value: int | None, limit: int | None) -> int | None:
    return value if value is None or limit is None else min(value, limit)
