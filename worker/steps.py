"""Runs the units of one job, one after the other, and judges each."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from worker import workspace
from worker.acceptance import StepRecords, boot_id
from worker.errors import JobError, Reason, SystemdError
from worker.jobs import ffmpeg
from worker.jobs.judge import judge
from worker.jobs.outcome import Intent, Outcome, stopped
from worker.jobs.progress import LogFacts, Progress, parse_progress, read_log
from worker.jobs.spec import JobSpec, Limits, Priority, StreamOutput, UrlInput
from worker.jobs.streams import without_key
from worker.master.wire import Job
from worker.systemd.adoption import adopt
from worker.systemd.launch import Launch, UnitLimits
from worker.systemd.launcher import Launcher
from worker.systemd.names import Step, slice_name, unit_name
from worker.systemd.state import UnitState
from worker.systemd.suspend import Suspension
from worker.systemd.unit import Unit
from worker.systemd.usage import Usage
from worker.workspace import Workspace

logger = logging.getLogger(__name__)

MIB = 1024 * 1024
SAMPLE_SECONDS = 1.0
SLOW_SAMPLE_SECONDS = 5.0
"""Between two looks at a job that has run for a minute. The counters only grow, so nothing is
missed; only the progress that is told is some seconds old."""
YOUNG_SECONDS = 60.0
LOOKS_PER_SECOND = 10
"""At all jobs together, as with a hundred on a node each look counts."""
MOST_SAMPLE_SECONDS = 10.0
"""Between two looks at a job, however many there are."""
PROGRESS_BYTES = 1024
"""Enough for the last blocks of ffmpeg's progress, which have some 250 bytes each."""
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
    state: UnitState
    usage: Usage
    log: LogFacts
    log_text: str
    progress: Progress | None
    wall_seconds: float
    """Without the time for which it was paused."""


class Left(Exception):
    """The job is left to the next agent, its unit running or not."""


class Steps:
    """The units of one job. ``on_output`` gets the end of the running one's standard output.

    A unit whose start is on record is never started again: it is followed where it is still
    there. So that it is, each stays loaded, verdict and all, until release().
    """

    def __init__(
        self,
        job: Job,
        launcher: Launcher,
        on_output: Callable[[str], None],
        records: StepRecords,
        suspension: Suspension | None = None,
    ) -> None:
        self.intent = Intent.NONE
        """Why the job was told to stop."""
        self.resumed = any(records.recorded(step) is not None for step in Step)
        """An earlier agent has begun the job."""
        self.start_seconds: list[float] = []
        """How long each start took, from asking systemd to its answer."""
        self._job = job
        self._launcher = launcher
        self._on_output = on_output
        self._records = records
        self._suspension = suspension
        self._unit: Unit | None = None
        self._ended: list[Unit] = []
        self._reaped: set[str] = set()
        self._left = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def stop(self, intent: Intent) -> None:
        """End the unit that runs; none is started after this."""
        if self.intent is Intent.NONE:
            self.intent = intent
            if self._unit is not None:
                self._background(self._end(self._unit))

    @property
    def paused(self) -> bool:
        """The unit that runs is held; where none runs, none is."""
        return bool(self._unit and self._suspension and self._suspension.paused(self._unit))

    async def pause(self) -> None:
        """Hold the unit that runs, if one does. Raises SystemdError."""
        if self._unit and self._suspension:
            await self._suspension.pause(self._unit)

    async def resume(self) -> None:
        """Let it go on. Raises SystemdError."""
        if self._unit and self._suspension:
            await self._suspension.resume(self._unit)

    def leave(self) -> None:
        """Let the unit run and follow it no longer; none is started after this."""
        self._left.set()

    async def release(self) -> None:
        """Drop the units from systemd: return when none of this job is loaded any more.

        To be called when the result is on record, or will not be needed.
        """
        self._reap_ended()
        for step in (Step.INPUT, Step.MAIN):
            name = unit_name(self._job.id, step)
            if self._records.recorded(step) is not None and name not in self._reaped:
                self._background(self._end_by_name(name))  # followed by nobody, for some reason
        while self._tasks:
            for error in await asyncio.gather(*self._tasks, return_exceptions=True):
                if error is not None:
                    logger.error("job %s: clean-up failed", self._job.id, exc_info=error)

    async def generate(
        self, space: Workspace, spec: JobSpec, limits: Limits, command: tuple[str, ...]
    ) -> StepRun:
        """Make the job's test input."""
        return await self._run(
            Step.INPUT, space, spec, limits, command, what="generating the input"
        )

    async def transcode(
        self,
        space: Workspace,
        spec: JobSpec,
        command: tuple[str, ...],
        source: str,
        output: Path | str,
        facts: Mapping[str, Any],
    ) -> StepRun:
        """The job proper, under its own limits. ``source`` and ``output`` are paths or URLs.

        ``facts`` is what was learnt before, to be put on record with the start.
        """
        limits, is_stream = spec.limits, isinstance(spec.output, StreamOutput)
        if is_stream:
            limits = replace(limits, disk_mb=max(limits.disk_mb, STREAM_FILES_MB))
        return await self._run(
            Step.MAIN,
            space,
            spec,
            limits,
            command,
            facts=facts,
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
        run = await self._run(
            Step.PROBE, space, spec, limits, command, what="probing the output", program="ffprobe"
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
        step: Step,
        space: Workspace,
        spec: JobSpec,
        limits: Limits,
        command: tuple[str, ...],
        *,
        facts: Mapping[str, Any] | None = None,
        what: str = "",
        program: str = "ffmpeg",
        source: str | None = None,
        output: str | None = None,
        is_url: bool = False,
        is_stream: bool = False,
    ) -> StepRun:
        record = self._records.recorded(step)
        limits = _recorded_limits(limits, record)
        launch = self._launch(step, space, spec, limits, command)
        asked = time.monotonic()
        unit = await self._unit_of(step, launch, limits, record, facts or {})
        self._unit = unit
        try:
            if self.intent is not Intent.NONE:  # told to stop while systemd was starting it
                self._background(self._end(unit))
            state = await self._follow(unit, launch.stdout)
            usage = await unit.usage()
            held = self._suspension.paused_seconds(unit) if self._suspension else 0.0
        finally:
            self._unit = None
            self._ended.append(unit)
        if step is Step.PROBE:
            self._ended.remove(unit)
            self._background(self._reap(unit))
        log_text = workspace.read_ends(space.log(step))
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
            step=what, program=program, source=source, output=output, is_url=is_url,
            is_stream=is_stream, executed=unit.started or bool(log_text),
        )  # fmt: skip
        wall = state.wall_seconds
        if wall is None:
            wall = time.monotonic() - asked
        return StepRun(
            unit=unit.name,
            outcome=outcome,
            state=state,
            usage=usage,
            log=log,
            log_text=log_text,
            progress=parse_progress(workspace.read_tail(launch.stdout)),
            wall_seconds=max(0.0, wall - held),
        )

    async def _unit_of(
        self,
        step: Step,
        launch: Launch,
        limits: Limits,
        record: Mapping[str, Any] | None,
        facts: Mapping[str, Any],
    ) -> Unit:
        """The step's unit: a new one, or the one that an earlier agent started."""
        if self._left.is_set():
            raise Left
        if record is not None:
            unit = await adopt(self._launcher, launch)
            if unit is not None:
                logger.info("job %s: following %s, started earlier", self._job.id, unit.name)
                return unit
            # Its standard output is made before the program is run, so it never was.
            if record.get("boot_id") != boot_id() or launch.stdout.exists():
                raise JobError(Reason.PLATFORM_ERROR, _gone(launch.unit, record))
        if self.intent is not Intent.NONE:
            raise JobError(Reason.PLATFORM_ERROR, stopped(self.intent).message)
        if step is Step.PROBE:
            if self.resumed:  # looked at by an agent that died meanwhile: look again
                await self._launcher.stop_and_reap(launch.unit)
                launch.stdout.unlink(missing_ok=True)  # else the new answer follows the old one
        elif record is None:
            kept = {
                "cpu_percent": limits.cpu_percent,
                "memory_mb": limits.memory_mb,
                "disk_mb": limits.disk_mb,
                "timeout_sec": limits.timeout_sec,
            }
            await self._records.starting(step, launch.unit, {**facts, "limits": kept})
            self._reap_ended()  # of the step before: what it told is on record now
        asked = time.monotonic()
        unit = await self._launcher.start(launch)
        self.start_seconds.append(time.monotonic() - asked)
        self._announce(unit)
        return unit

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
        left = asyncio.create_task(self._left.wait())
        begun = time.monotonic()
        try:
            while True:
                unit.sample()
                running = self._launcher.tracker.unfinished
                pause = look_pause(time.monotonic() - begun, running)
                await asyncio.wait({ended, left}, timeout=pause, return_when="FIRST_COMPLETED")
                if ended.done():
                    return ended.result()
                if left.done():
                    raise Left
                self._on_output(workspace.read_tail(stdout, PROGRESS_BYTES))
        finally:
            ended.cancel()
            left.cancel()

    def _reap_ended(self) -> None:
        for unit in self._ended:
            self._reaped.add(unit.name)
            self._background(self._reap(unit))
        self._ended.clear()

    async def _end_by_name(self, name: str) -> None:
        try:
            await self._launcher.stop_and_reap(name)
        except SystemdError as error:
            logger.error("job %s: %s is left over: %s", self._job.id, name, error)

    async def _end(self, unit: Unit) -> None:
        try:
            await unit.stop()
        except SystemdError as error:
            logger.error("job %s: %s", self._job.id, error)

    async def _reap(self, unit: Unit) -> None:
        try:
            await unit.reap()
            if self._suspension is not None:
                await self._suspension.forget(unit)
        except SystemdError as error:
            logger.error("job %s: %s is left over: %s", self._job.id, unit.name, error)

    def _background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def look_pause(age: float, running: int) -> float:
    """Seconds until the next look at a job of that age in seconds, one of so many that run."""
    least = SAMPLE_SECONDS if age < YOUNG_SECONDS else SLOW_SAMPLE_SECONDS
    return min(MOST_SAMPLE_SECONDS, max(least, running / LOOKS_PER_SECOND))


def _at_most(value: int | None, limit: int | None) -> int | None:
    return value if value is None or limit is None else min(value, limit)


def _recorded_limits(limits: Limits, record: Mapping[str, Any] | None) -> Limits:
    """What the unit was started with, should the configuration have changed since."""
    known = record.get("limits") if record is not None else None
    return replace(limits, **known) if isinstance(known, dict) else limits


def _gone(unit: str, record: Mapping[str, Any]) -> str:
    if record.get("boot_id") != boot_id():
        return f"the machine was restarted while {unit} ran; run the job again"
    return (
        f"{unit} was started before the worker was, and is gone: somebody stopped it, or it ran "
        "into a stop of systemd; run the job again"
    )
